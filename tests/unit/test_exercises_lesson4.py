"""The functions that lesson 4's exercises compare with: values by hand, what they refuse, what they keep."""

import math
import re
from pathlib import Path

import pytest
import torch

from rlhf_helpers import code_generation, summarization_rl
from rlhf_helpers.chatbot_rlhf import chatbot
from rlhf_helpers.core.stats import Estimate
from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.exercises.lesson4 import summaries
from rlhf_helpers.world.gold_judge import gold_reward

ROOT = Path(__file__).parents[2]
NAMES = ("guarded_reply", "fact_scores", "pass_at_k", "verifiable_reward", "failed_limits")
guarded_reply, fact_scores, pass_at_k, verifiable_reward, failed_limits = (
    EXERCISES[name].reference for name in NAMES
)


def value(x):
    return pytest.approx(x, abs=1e-6)


def test_what_is_handed_back_is_the_packages_own_function():
    assert fact_scores is summarization_rl.fact_scores
    assert pass_at_k is code_generation.pass_at_k
    assert verifiable_reward is code_generation.verifiable_reward


def test_guarded_reply_by_hand():
    answers = ["a", "b", "c", "d"]
    rewards, p_safe = torch.tensor([1.0, -2.0, 3.0, -2.0]), torch.tensor([0.25, 0.5, math.nan, 0.75])
    assert guarded_reply(answers, lambda _: rewards, lambda _: p_safe, 0.5) == "b"  # of the tie the first
    assert guarded_reply(answers, lambda _: rewards, lambda _: p_safe, 0.0) == "a"  # NaN is not safe
    assert guarded_reply(answers, lambda _: rewards, lambda _: p_safe, 0.9) == chatbot.FALLBACK
    assert guarded_reply(answers, lambda _: 1 / 0, lambda _: p_safe, 0.5) == chatbot.FALLBACK


def test_failed_limits_by_hand():
    measured = {"wins": Estimate(0.7, 0.55, 0.8, 9), "harm": Estimate(0.1, 0.0, 0.2, 9)}
    limits = {"wins": ("at least", 0.5), "harm": ("at most", 0.15), "recall": ("at least", 0.1)}
    assert failed_limits(measured, limits) == ["harm", "recall"]
    assert failed_limits(measured, {"wins": ("at least", 0.55), "harm": ("at most", 0.2)}) == []


def test_failed_limits_reads_the_end_that_decides():
    measured = {"wins": Estimate(0.7, 0.55, math.nan, 9), "harm": Estimate(0.1, 0.0, math.nan, 9)}
    assert failed_limits(measured, {"wins": ("at least", 0.5), "harm": ("at most", 0.15)}) == ["harm"]
    measured = {"wins": Estimate(0.7, math.nan, 0.8, 9), "harm": Estimate(0.1, math.nan, 0.1, 9)}
    assert failed_limits(measured, {"wins": ("at least", 0.5), "harm": ("at most", 0.15)}) == ["wins"]


def test_the_weights_choose_as_gold_does():
    exercise = EXERCISES["summary_weights"]
    gold = {
        name: gold_reward([f"Summarise this article. {summaries.ARTICLE}"], [text]).item()
        for name, text in summaries.SUMMARIES.items()
    }
    for pair in exercise.probes:
        assert exercise.on_probes(exercise.reference)(*pair) == max(pair, key=gold.get)


def test_every_wrong_program_differs_somewhere():
    exercise = EXERCISES["test_inputs"]
    caught = {name: exercise.on_probes(exercise.reference)(name) for (name,) in exercise.probes}
    assert [name for name, verdict in caught.items() if verdict == "passes every test"] == ["right"]


def test_fact_scores_by_hand():
    true = {"who": "Mara", "what": "won", "where": "Lund", "when": "May"}
    assert fact_scores({"who": "Mara", "what": "lost", "where": None, "when": "May"}, true) == (0.5, 1)
    assert fact_scores({"who": "Mara"}, true) == (0.25, 0)
    assert fact_scores({}, true) == (0.0, 0)
    assert fact_scores(true, true) == (1.0, 0)


def test_pass_at_k_by_hand():
    # of the 10 pairs of 5 samples, 3 hold none of the 2 right ones
    assert pass_at_k(5, 2, 2) == value(0.7)
    assert [pass_at_k(5, 2, k) for k in (1, 4, 5)] == [value(0.4), 1.0, 1.0]
    assert pass_at_k(5, 0, 5) == 0.0


def test_verifiable_reward_by_hand():
    passed = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    rewards = verifiable_reward(passed, torch.tensor([False, False, False, True]))
    assert rewards.tolist() == value([1.0, 1 / 6, 0.0, 0.0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: pass_at_k(5, 6, 1),
        lambda: pass_at_k(5, -1, 1),
        lambda: pass_at_k(5, 2, 6),
        lambda: pass_at_k(5, 2, 0),
        lambda: verifiable_reward(torch.ones(2, 3).bool(), torch.ones(3).bool()),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError):
        call()


@pytest.mark.parametrize("room", ["chatbot_rlhf", "summarization_rl", "code_generation", "sandbox", "lab"])
def test_no_room_of_the_lesson_loads_a_heavy_library_before_it_is_used(room):
    heavy = re.compile(r"^(import|from) (bandit|rouge_score|nltk)", re.MULTILINE)
    files = [*(ROOT / "rlhf_helpers").glob(f"{room}*.py"), *(ROOT / "rlhf_helpers" / room).rglob("*.py")]
    assert files
    assert not [path.name for path in files if heavy.search(path.read_text(encoding="utf8"))]
