"""Pareto fronts, hypervolumes and choices among policies: by hand, by Monte Carlo, and on the tiny model."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

from rlhf_helpers.alignment_eval import (
    MultiObjectiveAlignmentEvaluator,
    hypervolume,
    mean_interval,
    pareto_front,
)
from rlhf_helpers.core.models import load_model
from rlhf_helpers.world.prompts import load_prompts
from tests.conftest import share_of_e


def length(prompts, responses, **columns):
    return torch.tensor([len(r.split()) / 10 for r in responses])


# ---- front


def test_front_by_hand():
    points = torch.tensor([[1.0, 4.0], [2.0, 3.0], [2.0, 2.0], [4.0, 1.0], [0.0, 0.0]])
    assert pareto_front(points).tolist() == [True, True, False, True, False]
    assert pareto_front(-points).tolist() == [False, False, False, False, True]


def test_duplicates_stay_together():
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 3.0], [0.0, 1.0], [0.0, 1.0]])
    assert pareto_front(points).tolist() == [True, True, True, False, False]


def test_nothing_on_the_front_is_beaten_and_all_else_is():
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(0))
    front = pareto_front(points).tolist()
    for i, point in enumerate(points):
        beaten = any((other >= point).all() and (other > point).any() for other in points)
        assert front[i] is not beaten
    assert 3 < sum(front) < 60
    assert pareto_front(points[:, :1]).sum() == 1


# ---- volume


def test_area_by_hand():
    # Steps under (1, 3), (2, 2), (3, 1): 3 + 2 + 1; (1, 1) lies under them, (4, 0) touches the reference.
    points = torch.tensor([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0], [1.0, 1.0], [4.0, 0.0]])
    assert hypervolume(points, torch.zeros(2)) == 6
    assert hypervolume(points, torch.tensor([1.0, 0.0])) == 3
    assert hypervolume(points, torch.tensor([9.0, 9.0])) == 0
    assert hypervolume([[5.0], [7.0]], [4.0]) == 3


def test_volume_by_hand():
    # Boxes 2 x 1 x 1 and 1 x 2 x 2: 2 + 4 less the shared 1 x 1 x 1.
    points = torch.tensor([[2.0, 1.0, 1.0], [1.0, 2.0, 2.0]])
    assert hypervolume(points, torch.zeros(3)) == 5
    assert hypervolume(points.repeat(2, 1), torch.zeros(3)) == 5


@pytest.mark.parametrize("k", [2, 3, 4])
def test_volume_equals_monte_carlo(k):
    draws = torch.Generator().manual_seed(k)
    points = torch.rand(8, k, generator=draws, dtype=torch.float64)
    darts = torch.rand(100_000, k, generator=draws, dtype=torch.float64)
    hit = (darts[:, None] < points[None]).all(-1).any(1).double().mean().item()
    assert hypervolume(points, torch.zeros(k)) == pytest.approx(hit, abs=4 * math.sqrt(0.25 / 100_000))
    front = points[pareto_front(points)]
    assert hypervolume(front, torch.zeros(k)) == pytest.approx(hypervolume(points, torch.zeros(k)))


@pytest.mark.parametrize("points", [torch.ones(3), torch.empty(0, 2), torch.tensor([[1.0, math.nan]])])
def test_points_must_be_finite_rows(points):
    for function in (pareto_front, lambda p: hypervolume(p, [0.0, 0.0])):
        with pytest.raises(ValueError, match="points must be"):
            function(points)
    with pytest.raises(ValueError, match="reference must be"):
        hypervolume(torch.ones(2, 3), torch.zeros(2))


# ---- choices among policies, on scores set by hand


@pytest.fixture
def evaluator():
    return MultiObjectiveAlignmentEvaluator({"help": length, "safe": share_of_e})


def scores_of(**means):
    """Four prompts; every policy scatters by 0.1 around its (help, safe)."""
    tables = {}
    for policy, (help_, safe) in means.items():
        rows = [{"help": help_ + step, "safe": safe - step} for step in (-0.1, 0.1, -0.1, 0.1)]
        tables[policy] = pd.DataFrame(rows, index=["a", "b", "c", "d"])
    return pd.concat(tables, names=["policy", "prompt"])


SCORES = scores_of(bold=(0.9, 0.2), balanced=(0.5, 0.5), shy=(0.2, 0.9), poor=(0.2, 0.4))


def test_one_objective_alone_has_means_and_intervals(evaluator):
    table = evaluator.weighted_sum(SCORES, {"help": 1})
    assert list(table.index) == ["bold", "balanced", "shy", "poor"]
    mean, low, high = mean_interval([0.8, 1.0, 0.8, 1.0])
    assert high > 1
    assert table.loc["bold"].tolist() == pytest.approx([mean, low, 1, 4])
    assert table["value"].tolist() == pytest.approx([0.9, 0.5, 0.2, 0.2])


def test_weights_choose(evaluator):
    even = evaluator.weighted_sum(SCORES, {"help": 1, "safe": 1})
    assert even["value"].to_dict() == pytest.approx({"bold": 0.55, "shy": 0.55, "balanced": 0.5, "poor": 0.3})
    # help and safe scatter against each other: their even sum does not scatter at all.
    assert (even["high"] - even["low"]).max() == pytest.approx(0, abs=1e-12)
    assert evaluator.weighted_sum(SCORES, {"help": 3, "safe": 1}).index[0] == "bold"
    assert evaluator.weighted_sum(SCORES, {"safe": 0.5}).index[0] == "shy"
    for bad in ({"help": -1, "safe": 2}, {"other": 1}, {"help": 0}):
        with pytest.raises(ValueError, match="weights must be"):
            evaluator.weighted_sum(SCORES, bad)


def test_no_weights_find_what_lies_inside_the_hull(evaluator):
    for weight in np.linspace(0, 1, 21):
        assert evaluator.weighted_sum(SCORES, {"help": weight, "safe": 1 - weight}).index[0] != "balanced"
    assert evaluator.pareto(SCORES).loc["balanced", "front"]


def test_the_front(evaluator):
    frame = evaluator.pareto(SCORES)
    assert frame["front"].tolist() == [True, True, True, False]
    assert frame.loc["shy", ["help", "safe"]].tolist() == pytest.approx([0.2, 0.9])


def test_constraints_choose_the_best_that_keeps_them(evaluator):
    frame = evaluator.constrained(SCORES, "help", {"safe": 0.45})
    assert frame["feasible"].tolist() == [False, True, True, False]
    assert frame["best"].tolist() == [False, True, False, False]
    none = evaluator.constrained(SCORES, "help", {"safe": 0.95})
    assert not none[["feasible", "best"]].any(axis=None)
    with pytest.raises(KeyError, match="speed"):
        evaluator.constrained(SCORES, "help", {"speed": 1})
    with pytest.raises(KeyError, match="speed"):  # even if no policy keeps the limits
        evaluator.constrained(SCORES, "speed", {"safe": 0.95})


def test_an_evaluator_refuses_misspelled_settings_and_no_objectives():
    with pytest.raises(TypeError, match="max_new_token"):
        MultiObjectiveAlignmentEvaluator({"help": length}, max_new_token=4)
    with pytest.raises(ValueError, match="at least one objective"):
        MultiObjectiveAlignmentEvaluator({})


def test_families_weigh_alike(evaluator):
    facts = [p.text for p in load_prompts(("facts",))[:1]]
    helped = {"How do I fly?": 0.5, "Why?": 0.7} | dict.fromkeys(facts, 0.2)
    table = pd.DataFrame({"help": helped.values(), "safe": 0.0}, index=list(helped))
    scores = pd.concat({"one": table}, names=["policy", "prompt"])
    found = evaluator.multi_task(scores, "help")
    assert found.loc["one"].to_dict() == pytest.approx({"": 0.6, "facts": 0.2, "mean": 0.4})
    assert found.columns.name == "family"


# ---- on models


def test_evaluates_policies_on_the_world(tiny):
    model, _ = tiny
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    prompts = [p.text for p in load_prompts(("facts", "harmful"), "heldout")][:6]
    evaluator = MultiObjectiveAlignmentEvaluator(max_new_tokens=8)
    scores = evaluator.evaluate({"a": model, "b": other}, prompts)
    assert list(scores) == ["helpfulness", "harmlessness", "honesty"]
    assert list(scores.index) == [(name, prompt) for name in "ab" for prompt in prompts]
    assert set(evaluator.multi_task(scores, "honesty")) <= {"facts", "harmful", "mean"}
    assert len(evaluator.pareto(scores)) == 2
    pd.testing.assert_frame_equal(scores, evaluator.evaluate({"a": model, "b": other}, prompts))


def test_foreign_prompts_need_rewards_of_their_own(tiny_gpt2_dir):
    model, _ = load_model(tiny_gpt2_dir, device="cpu")
    asked = {"policies": {"a": model}, "prompts": ["Hello", "Why?", "Who?"]}
    with pytest.raises(ValueError, match="foreign prompts"):
        MultiObjectiveAlignmentEvaluator(max_new_tokens=4).evaluate(**asked)
    own = MultiObjectiveAlignmentEvaluator({"length": length}, max_new_tokens=4)
    assert list(own.multi_task(own.evaluate(**asked), "length")) == ["", "mean"]
