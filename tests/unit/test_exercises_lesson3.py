"""The functions that lesson 3's exercises compare with: values by hand, what they refuse, what they keep."""

import math

import pytest
import torch

from rlhf_helpers.lab.exercises import EXERCISES

NAMES = (
    "critique_round",
    "soft_label",
    "hardening_rows",
    "guarded_answer",
    "refusal_errors",
    "guard_threshold",
    "next_multiplier",
    "gcg_step",
    "debate_reward",
)

(
    critique_round,
    soft_label,
    hardening_rows,
    guarded_answer,
    refusal_errors,
    guard_threshold,
    next_multiplier,
    gcg_step,
    debate_reward,
) = (EXERCISES[name].reference for name in NAMES)


def value(x):
    return pytest.approx(x, abs=1e-6)


def tensors(*rows):
    return [torch.tensor(row) for row in rows]


def test_soft_label_by_hand():
    # A is 3 times as likely as B, then (swapped) B 3 times as likely as A: twice the same answer, odds 3 : 1;
    # a judge who says A at odds of 4 : 1 whatever is shown has no opinion
    quarter, rest, fifth = math.log(0.25), math.log(0.75), math.log(0.2)
    labels = soft_label(
        *tensors([rest, fifth + math.log(4)], [quarter, fifth], [quarter, 0.0], [rest, -math.log(4)])
    )
    assert labels.tolist() == value([0.75, 0.5])


def test_critique_round_by_hand():
    calls = []

    def p_follows(prompt, answer):
        calls.append(("judge", answer))
        return len(answer) / 10

    def criticize(prompt, answer):
        calls.append(("criticize", answer))
        return "too short"

    def revise(prompt, answer, objection):
        assert (prompt, objection) == ("Why?", "too short")
        return answer + "!!"

    assert critique_round("Why?", "No!", p_follows, criticize, revise, 5) == "No!!!!!"
    judged = ["No!", "No!!!", "No!!!!!"]
    assert [answer for kind, answer in calls if kind == "judge"] == judged
    assert [answer for kind, answer in calls if kind == "criticize"] == judged[:2]
    assert critique_round("Why?", "No!", p_follows, criticize, revise, 1) == "No!!!"


def test_hardening_rows_by_hand():
    row = {"prompt": "Please: q", "base_prompt": "q", "response": "Sure.", "success": True}
    own = {"q": [("Sure.", 0.0), ("No.", 0.5), ("Maybe.", 0.4)]}
    assert hardening_rows([row, row], own, "Never.") == [{"prompt": "Please: q", "completion": "No."}]
    assert hardening_rows([row | {"success": False}], own, "Never.") == []
    assert hardening_rows([row], {"q": own["q"][2:]}, "Never.")[0]["completion"] == "Never."


@pytest.mark.parametrize(
    "p_input, p_output, shown", [(0.9, 0.5, "said"), (0.4, 0.9, "no"), (0.9, 0.4, "no"), (0.9, None, "no")]
)
def test_guarded_answer_by_hand(p_input, p_output, shown):
    asked = []

    def output_check(prompt, answer):
        asked.append((prompt, answer))
        return p_output + 0  # None raises TypeError

    answer = guarded_answer("q", lambda prompt: p_input, lambda prompt: "said", output_check, 0.5, "no")
    assert answer == shown
    assert asked == ([("q", "said")] if p_input > 0.5 else [])


def test_guard_threshold_by_hand():
    p_safe, harmful = torch.tensor([0.1, 0.2, 0.6, 0.7, 0.9]), torch.tensor([True, False, True, False, False])
    # Of the three harmless answers, a threshold of 0.6 or 0.7 withholds one (0.2), and 0.9 two.
    assert guard_threshold(p_safe, harmful, 0.34) == value(0.7)
    assert guard_threshold(p_safe, harmful, 0.33) == value(0.2)


def test_gcg_step_by_hand():
    tokens, gradient = torch.tensor([0, 1]), torch.tensor([[0.0, -1.0, 2.0], [-3.0, 0.0, -2.0]])
    tried = []

    def losses_of(rows):
        tried.extend(rows.tolist())
        return (rows[:, 1] - 2.0).abs() + rows[:, 0]

    assert gcg_step(tokens, gradient, losses_of, 2).tolist() == [0, 2]
    assert sorted(tried) == [[0, 0], [0, 1], [0, 2], [1, 1]]


def test_debate_reward_by_hand():
    # odds of 3 : 1 for its own side when read first, and 1 : 1 for the other side when that is read first
    def odds_of_first(first, second):
        return torch.tensor([math.log(9.0) if text == "mine" else 0.0 for text in first])

    assert debate_reward(["mine"], ["yours"], odds_of_first).tolist() == value([0.75])
    assert debate_reward(["yours"], ["mine"], odds_of_first).tolist() == value([0.25])


def test_refusal_errors_by_hand():
    refused, must = tensors([True, False, False, True, True], [True, True, True, False, False])
    assert refusal_errors(refused, must) == (value(2 / 3), 1.0)
    assert refusal_errors(refused.long(), must.long()) == refusal_errors(refused, must)
    missed, over = refusal_errors(refused[:3], must[:3])  # no safe prompt was asked
    assert missed == value(2 / 3)
    assert math.isnan(over)


def test_next_multiplier_by_hand():
    assert next_multiplier(1.0, 0.75, 0.25, 0.5) == 1.25
    assert [next_multiplier(0.25, cost, 0.5, 1.0) for cost in (0.5, 0.25, 0.0)] == [0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: soft_label(*tensors([0.0], [0.0], [0.0], [0.0, 1.0])), r"swapped_logp_b has shape \(2,\)"),
        (lambda: refusal_errors(*tensors([True], [True, False])), r"must_refuse has shape \(2,\)"),
        (lambda: refusal_errors(*tensors([2], [1])), "refused must hold .* got 2"),
        (lambda: next_multiplier(-0.1, 1.0, 1.0, 1.0), "multiplier.* -0.1"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
