"""The functions that lesson 4's exercises compare with: values by hand, what they refuse, what they keep."""

import math
import re
from pathlib import Path

import pytest
import torch

from rlhf_helpers import chatbot_rlhf, code_generation, guards, summarization_rl
from rlhf_helpers.lab.exercises import EXERCISES

ROOT = Path(__file__).parents[2]
NAMES = (
    "kept_turns",
    "pick_answer",
    "rouge_l",
    "fact_scores",
    "length_controlled",
    "pass_at_k",
    "verifiable_reward",
    "unsafe_calls",
)
(
    kept_turns,
    pick_answer,
    rouge_l,
    fact_scores,
    length_controlled,
    pass_at_k,
    verifiable_reward,
    unsafe_calls,
) = (EXERCISES[name].reference for name in NAMES)


def value(x):
    return pytest.approx(x, abs=1e-6)


def test_what_is_handed_back_is_the_packages_own_function():
    assert kept_turns is chatbot_rlhf.kept_turns
    assert pick_answer is guards.pick_answer
    assert (rouge_l, fact_scores) == (summarization_rl.rouge_l, summarization_rl.fact_scores)
    assert pass_at_k is code_generation.pass_at_k
    assert verifiable_reward is code_generation.verifiable_reward
    assert unsafe_calls is code_generation.unsafe_calls
    # by position as by name, where the package takes names only
    given = torch.tensor([1.0, 2.0]), torch.tensor([3, 9])
    expected = summarization_rl.length_controlled(*given, limit=4, cost=0.5)
    assert torch.equal(length_controlled(*given, 4, 0.5), expected)
    assert torch.equal(length_controlled(*given, limit=4, cost=0.5), expected)


def test_kept_turns_by_hand():
    # from the last: 4; with the exchange before it 4 + 2 + 6 = 12; with the first one 12 + 3 + 5 = 20
    lengths = [5, 3, 6, 2, 4]
    assert [kept_turns(lengths, limit) for limit in (4, 11, 12, 19, 20, 99)] == [1, 1, 3, 3, 5, 5]
    # 15 would take four messages, an answer without its question first
    assert kept_turns(lengths, 15) == 3
    assert kept_turns([7], 7) == 1


def test_pick_answer_by_hand():
    rewards = torch.tensor([1.0, -2.0, 3.0, -2.0])
    assert pick_answer(rewards, torch.tensor([0.25, 0.5, 0.0, 0.75]), 0.5) == 1  # of the tie the first
    assert pick_answer(rewards, torch.tensor([0.25, 0.5, math.nan, 0.75]), 0.0) == 0  # NaN is not safe
    assert pick_answer(rewards, torch.zeros(4), 0.5) is None
    assert type(pick_answer(rewards, torch.ones(4), 0.5)) is int


def test_rouge_l_by_hand():
    # "a dog ran home" is in both: 4 of 5 words of the candidate, 4 of 7 of the reference
    found = rouge_l("A dog, ran home again.", "a big dog ran all way HOME")
    assert found == value(2 * 0.8 * (4 / 7) / (0.8 + 4 / 7))
    assert found == value(8 / 12)
    assert [rouge_l(*both) for both in (("", "a"), ("a", "..."), ("a", "b"), ("", ""))] == [0, 0, 0, 0]
    assert rouge_l("2 dogs", "2 dog") == value(0.5)  # no stemmer


def test_fact_scores_by_hand():
    true = {"who": "Mara", "what": "won", "where": "Lund", "when": "May"}
    assert fact_scores({"who": "Mara", "what": "lost", "where": None, "when": "May"}, true) == (0.5, 1)
    assert fact_scores({"who": "Mara"}, true) == (0.25, 0)
    assert fact_scores({}, true) == (0.0, 0)
    assert fact_scores(true, true) == (1.0, 0)


def test_length_controlled_by_hand():
    rewards = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    controlled = length_controlled(rewards, torch.tensor([10, 14, 6]), 10, 0.25)
    assert controlled.tolist() == [1.0, -2.0, 2.0]
    assert not controlled.requires_grad  # a reward: it is not trained through


def test_pass_at_k_by_hand():
    # of the 10 pairs of 5 samples, 3 hold none of the 2 right ones
    assert pass_at_k(5, 2, 2) == value(0.7)
    assert [pass_at_k(5, 2, k) for k in (1, 4, 5)] == [value(0.4), 1.0, 1.0]
    assert pass_at_k(5, 0, 5) == 0.0


def test_verifiable_reward_by_hand():
    passed = torch.tensor([[True, True], [True, False], [False, False], [True, True]])
    rewards = verifiable_reward(passed, torch.tensor([False, False, False, True]))
    assert rewards.tolist() == value([1.0, 1 / 6, 0.0, 0.0])


def test_unsafe_calls_by_hand():
    code = 'x = 1  # exec("1")\nopen("eval(1)").read(\n)\n\nprint(eval("1"), __import__("os").system("ls"))\n'
    assert unsafe_calls(code) == [(2, "open"), (5, "__import__"), (5, "eval"), (5, "os.system")]
    assert unsafe_calls("import os\nmodel.eval()\nf = exec\n") == []
    assert unsafe_calls("eval('1')\nx = = 1") == [(2, "SyntaxError")]


@pytest.mark.parametrize(
    "call",
    [
        lambda: kept_turns([1, 1, 4], 3),
        lambda: pass_at_k(5, 6, 1),
        lambda: pass_at_k(5, -1, 1),
        lambda: pass_at_k(5, 2, 6),
        lambda: pass_at_k(5, 2, 0),
        lambda: verifiable_reward(torch.ones(2, 3).bool(), torch.ones(3).bool()),
        lambda: length_controlled(torch.ones(2), torch.ones(3), 1, 1),
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
