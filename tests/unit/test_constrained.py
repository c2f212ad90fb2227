"""Constrained optimisation: the multiplier by hand, the Lagrangian's reward, a run that keeps its limit."""

from dataclasses import replace

import pytest
import torch

from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.safety_alignment import (
    LagrangianReward,
    constrained_rloo,
    next_multiplier,
    weighted_sum,
)
from tests.conftest import dies_at, resume_equals_whole, share_of_e, weights

PROMPTS = ["Say something.", "Tell me more.", "And then?", "Why?"]


def constant(value):
    return lambda prompts, responses, **columns: torch.full((len(prompts),), value)


@pytest.mark.parametrize(
    "multiplier, cost, limit, step, expected",
    [
        (1.0, 0.3, 0.1, 2.0, 1.4),
        (0.5, 0.0, 0.1, 2.0, 0.3),
        (0.1, 0.0, 0.1, 2.0, 0.0),
        (0.0, 0.1, 0.1, 5.0, 0.0),
    ],
)
def test_next_multiplier_by_hand(multiplier, cost, limit, step, expected):
    assert next_multiplier(multiplier, cost, limit, step) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "bad", [(-0.1, 0, 0, 1), (0, 0, 0, 0), (0, float("nan"), 0, 1), (0, 0, float("inf"), 1)]
)
def test_next_multiplier_refuses(bad):
    with pytest.raises(ValueError, match="must be a finite number"):
        next_multiplier(*bad)


def test_lagrangian_reward_by_hand():
    costs = {"harm": lambda p, r, **c: torch.tensor([1.0, 0.0]), "lies": constant(0.2)}
    reward = LagrangianReward(constant(0.6), costs, {"harm": 0.1, "lies": 0.3}, step_size=2.0, start=1.0)
    # (0.6 - 1 c_harm - 1 * 0.2) / 3; then harm 1 + 2 (0.5 - 0.1), lies 1 + 2 (0.2 - 0.3)
    assert reward(["a", "b"], ["x", "y"]).tolist() == pytest.approx([-0.2, 0.4 / 3])
    assert reward.multipliers == pytest.approx({"harm": 1.8, "lies": 0.8})
    assert reward.record[0] == pytest.approx(
        {
            "constraint/reward": 0.6,
            "constraint/harm": 0.5,
            "multiplier/harm": 1.0,
            "constraint/lies": 0.2,
            "multiplier/lies": 1.0,
        }
    )
    assert reward(["a", "b"], ["x", "y"]).tolist() == pytest.approx([(0.44 - 1.8) / 3.6, 0.44 / 3.6])


def test_damping_prices_the_excess_of_the_batch_itself():
    reward = LagrangianReward(constant(0.0), {"harm": constant(0.5)}, {"harm": 0.1}, start=1.0, damping=5.0)
    assert reward(["a"], ["x"]).item() == pytest.approx(-3 * 0.5 / 4)  # price 1 + 5 * 0.4
    assert reward.multipliers["harm"] == pytest.approx(1.4)
    safe = LagrangianReward(constant(1.0), {"harm": constant(0.0)}, {"harm": 1.0}, start=1.0, damping=5.0)
    assert safe(["a"], ["x"]).item() == 1.0  # a price is never below 0


def test_weighted_sum_asks_only_what_counts():
    def never(prompts, responses, **columns):
        raise AssertionError("a reward of weight 0 was asked")

    reward = weighted_sum({"a": constant(2.0), "b": constant(4.0), "c": never}, {"a": 0.5, "b": 0.25, "c": 0})
    assert reward(["p"], ["r"]).tolist() == [2.0]
    for bad in ({"a": 0.0}, {"z": 1.0}):
        with pytest.raises(ValueError, match="weights"):
            weighted_sum({"a": constant(1.0)}, bad)


def test_lagrangian_refuses():
    with pytest.raises(ValueError, match="needs its limit"):
        LagrangianReward(constant(0.0), {"harm": constant(0.0)}, {"harms": 0.1})
    with pytest.raises(ValueError, match="step_size"):
        LagrangianReward(constant(0.0), {"harm": constant(0.0)}, {"harm": 0.1}, step_size=0)


def length(prompts, responses, **columns):
    """A cost: letters said, of thirty."""
    return torch.tensor([min(1.0, len(r) / 30) for r in responses])


def make_reward(limit=0.1, **options):
    return LagrangianReward(share_of_e, {"long": length}, {"long": limit}, **options)


def settings(**changes):
    same = {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8, "learning_rate": 1e-2}
    return RLOOSettings(**{**same, "kl_coef": 0.0, "progress": False, **changes})


@pytest.mark.slow
def test_a_run_earns_within_its_limit(tiny):
    """Unconstrained, e pays and length is free; under the limit both hold at once."""
    model, tokenizer = tiny
    history = constrained_rloo(
        model, tokenizer, PROMPTS, make_reward(0.3, step_size=0.5, start=0.5, damping=2.0), settings(steps=60)
    )
    frame = history.to_frame()
    first, last = frame.iloc[:5].mean(), frame.iloc[-10:].mean()
    assert first["constraint/long"] > 0.45
    assert last["constraint/long"] < 0.35
    assert last["constraint/reward"] > first["constraint/reward"] + 0.1
    assert frame["multiplier/long"].max() > 0.6


def test_resume_goes_on_with_the_multipliers(tiny_llama_dir, tmp_path):
    from rlhf_helpers.core.models import load_model

    def run(name, cost, resume=False):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        reward = LagrangianReward(share_of_e, {"long": cost}, {"long": 0.1}, step_size=1.0)
        kept = settings(steps=4, checkpoint_every=1, run_dir=tmp_path / name)
        history = constrained_rloo(model, tokenizer, PROMPTS, reward, kept, resume=resume)
        return history, weights(model)

    history = resume_equals_whole(run, length, dies_at(4, length))
    moved = [row["multiplier/long"] for row in history]
    assert moved[0] == 0
    assert moved == sorted(moved)
    assert moved[3] > 0.3


def test_same_seed_same_run(tiny_llama_dir):
    from rlhf_helpers.core.models import load_model

    found = []
    for seed in (1, 1, 2):
        model, tokenizer = load_model(tiny_llama_dir, device="cpu")
        constrained_rloo(model, tokenizer, PROMPTS, make_reward(), replace(settings(steps=2), seed=seed))
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
