"""The study on a real chat model: its rule by hand, its rows, and what its stored table must show."""

import pytest

from rlhf_helpers.lab.studies import load_study
from rlhf_helpers.lab.studies.real_model import METHODS, real_model, short_and_on_topic
from rlhf_helpers.world.tables import load_table

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "response, reward",
    [
        ("The capital of France is Paris.", 1.0),  # short, both content words, a full stop
        ("The capital of France is Paris", 0.7),  # no full stop
        ("Paris.", 0.7),  # neither "capital" nor "France"
        ("It is the capital.", 0.4 + 0.3 / 2 + 0.3),
        ("Paris " * 40, 0.4 * (50 - 40) / 25),  # 40 words, off topic, no ending
        ("Paris " * 60 + ".", 0.3),
        ("", 0.0),
        ("...", 0.0),  # no word at all
    ],
)
def test_rule_by_hand(response, reward):
    found = short_and_on_topic(["What is the capital of France?"], [response])
    assert found.item() == pytest.approx(reward, abs=1e-6)


def test_training_and_held_out_prompts_differ():
    train, heldout = (load_table("real_model")[name] for name in ("train", "heldout"))
    assert len({*train, *heldout}) == len(train) + len(heldout) == 88


def test_a_small_run_on_the_tiny_model():
    table = real_model(model_name="tiny", methods=("base",), heldout=2)
    assert list(table.prompt) == list(load_table("real_model")["heldout"][:2])
    assert table.kl.abs().max() < 1e-3, "the base has no distance to itself"
    assert (table.peak_mb > 100).all()


def stored_columns(name):
    table = load_study("real_model")
    assert set(table.method) == set(METHODS)
    return table.pivot(index="prompt", columns="method", values=name)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "base"])
def test_reward_rises_by_three_standard_errors(method):
    rewards = stored_columns("reward")
    gain = rewards[method] - rewards["base"]
    assert gain.mean() > 3 * gain.sem()


def test_the_larger_kl_coefficient_stays_closer():
    kl = stored_columns("kl")
    assert kl["base"].abs().max() < 1e-3
    assert 1 < kl["RLOO, KL coefficient 0.05"].mean() < kl["RLOO, KL coefficient 0.01"].mean()
