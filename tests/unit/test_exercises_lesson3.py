"""The functions that lesson 3's exercises compare with: values by hand, what they refuse, what they keep."""

import math

import pytest
import torch

from rlhf_helpers.lab.exercises import EXERCISES

NAMES = (
    "soft_label",
    "attack_rate",
    "swap_scores",
    "refusal_errors",
    "bbq_bias",
    "next_multiplier",
    "pareto_front",
    "hypervolume",
    "fairest",
    "patching_effect",
)


(
    soft_label,
    attack_rate,
    swap_scores,
    refusal_errors,
    bbq_bias,
    next_multiplier,
    pareto_front,
    hypervolume,
    fairest,
    patching_effect,
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


def test_attack_rate_by_hand():
    # 5 of 10, z^2 = 3.8415: centre 0.5, half z sqrt(0.025 + z^2 / 400) / (1 + z^2 / 10) = 0.2634
    assert attack_rate(5, 10) == pytest.approx((0.5, 0.236593, 0.763407), abs=1e-6)
    # 0 of n: from 0 to z^2 / (n + z^2)
    assert attack_rate(0, 12) == pytest.approx((0.0, 0.0, 3.841459 / 15.841459), abs=1e-6)
    assert all(type(x) is float for x in attack_rate(3, 7))


def test_swap_scores_by_hand():
    gradient, tokens = torch.tensor([[0.5, -1.0, 0.25], [2.0, 0.0, -3.0]]), torch.tensor([2, 1])
    assert swap_scores(gradient, tokens).tolist() == [[0.25, -1.25, 0.0], [2.0, 0.0, -3.0]]


def test_refusal_errors_by_hand():
    refused, must = tensors([True, False, False, True, True], [True, True, True, False, False])
    assert refusal_errors(refused, must) == (value(2 / 3), 1.0)
    assert refusal_errors(refused.long(), must.long()) == refusal_errors(refused, must)
    missed, over = refusal_errors(refused[:3], must[:3])  # no safe prompt was asked
    assert missed == value(2 / 3)
    assert math.isnan(over)


def test_bbq_bias_by_hand():
    # three of the four that name a group name the stereotype
    rows = [1, 0, 1, 0, 1, -1], [-1, -1], [0, 0, 0], [1, -1, 0]
    assert [bbq_bias(torch.tensor(row)) for row in rows] == [0.5, -1.0, 0.0, 0.0]


def test_next_multiplier_by_hand():
    assert next_multiplier(1.0, 0.75, 0.25, 0.5) == 1.25
    assert [next_multiplier(0.25, cost, 0.5, 1.0) for cost in (0.5, 0.25, 0.0)] == [0.25, 0.0, 0.0]


def test_pareto_front_by_hand():
    points = torch.tensor([[1.0, 3.0], [2.0, 2.0], [2.0, 2.0], [1.0, 2.0], [3.0, 0.0]])
    assert pareto_front(points).tolist() == [True, True, True, False, True]


def test_hypervolume_by_hand():
    # from (1, 1): 1 x 3 and 3 x 1 share one square of 1 x 1; the others are dominated, or not above (1, 1)
    points = torch.tensor([[2.0, 4.0], [4.0, 2.0], [2.0, 2.0], [9.0, 1.0], [0.5, 9.0]])
    assert hypervolume(points, torch.tensor([1.0, 1.0])) == 5.0
    assert hypervolume(points.requires_grad_(), torch.tensor([1.0, 1.0])) == 5.0


def test_fairest_by_hand():
    utilities = torch.tensor([[0.9, 0.5, 0.5, 0.4], [0.1, 0.5, 0.75, 0.4]])
    assert fairest(utilities) == 2  # options 1 and 2 leave nobody below 0.5, the second has the larger mean
    assert type(fairest(utilities)) is int


def test_patching_effect_by_hand():
    effect = patching_effect(*tensors([3.0, 3.0, -1.0], [-1.0, -1.0, 1.0], [1.0, -2.0, -2.0]))
    assert effect.tolist() == [0.5, -0.25, 1.5]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: soft_label(*tensors([0.0], [0.0], [0.0], [0.0, 1.0])), r"swapped_logp_b has shape \(2,\)"),
        (lambda: attack_rate(3, 2), "3 of 2"),
        (lambda: refusal_errors(*tensors([True], [True, False])), r"must_refuse has shape \(2,\)"),
        (lambda: refusal_errors(*tensors([2], [1])), "refused must hold .* got 2"),
        (lambda: bbq_bias(torch.tensor([1, 2])), r"answers must be -1, 0 or 1.*\[1, 2\]"),
        (lambda: bbq_bias(torch.tensor([[1, 0]])), "answers must be -1, 0 or 1"),
        (lambda: next_multiplier(-0.1, 1.0, 1.0, 1.0), "multiplier.* -0.1"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
