"""The functions that lesson 2's exercises compare with, where the package has none: values by hand."""

import math

import pytest
import torch

from rlhf_helpers.core.policy_losses import AdaptiveKLController
from rlhf_helpers.lab.exercises import EXERCISES

policy_gradient, gae, best_of_n_shares, next_beta = (
    EXERCISES[name].reference for name in ("policy_gradient", "gae", "best_of_n_shares", "next_beta")
)


def value(x):
    return pytest.approx(x, abs=1e-6)


def test_policy_gradient_by_hand():
    logps = torch.tensor([[math.log(0.25), math.log(0.5)]], requires_grad=True)
    advantages = torch.tensor([[2.0, -1.0]], requires_grad=True)
    loss = policy_gradient(logps, advantages)
    assert loss.tolist() == [value([2 * math.log(4), -math.log(2)])]
    loss.sum().backward()
    assert logps.grad.tolist() == [[-2.0, 1.0]]
    assert advantages.grad is None  # a constant: the policy is not trained to have better advantages


def test_policy_gradient_is_the_gradient_of_the_expected_reward():
    # two answers, rewards 1 and 0: E R = p and dE R / dlogit = p (1 - p), the sum over answers of p_a times
    # the loss's negative gradient
    logit = torch.tensor(0.3, requires_grad=True)
    logps = torch.stack([logit, torch.tensor(0.0)]).log_softmax(0)[None]
    (logps.exp().detach() * policy_gradient(logps, torch.tensor([[1.0, 0.0]]))).sum().backward()
    p = torch.sigmoid(logit).item()
    assert logit.grad.item() == value(-p * (1 - p))


def test_gae_by_hand_over_whole_rows():
    # delta = [0 + 0.5 * 4 - 2, 1 + 0 - 4] = [0, -3];  A = [0 + 0.5 * 0.5 * -3, -3]
    advantages = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 4.0]]), 0.5, 0.5)
    assert advantages.tolist() == [[-0.75, -3.0]]


def test_shares_by_hand_with_a_tie():
    # two draws of the three outcomes: the lowest wins when both are it, 1/4; the other two share 3/4 as 2 : 1
    rewards, probabilities = torch.tensor([3.0, 1.0, 3.0]), torch.tensor([1 / 3, 1 / 2, 1 / 6])
    assert best_of_n_shares(rewards, probabilities, 2).tolist() == value([0.5, 0.25, 0.25])


def test_next_beta_by_hand_and_as_the_controller():
    assert next_beta(0.1, 5.5, 5.0) == value(0.11)
    assert [next_beta(0.1, kl, 5.0) for kl in (50.0, 5.0, 0.0)] == value([0.12, 0.1, 0.08])
    for kl in (0.3, 1.9, 2.0, 2.3, 40.0):
        controller = AdaptiveKLController(0.3, target=2.0, horizon=10)
        controller.update(kl, n=10)
        assert next_beta(0.3, kl, 2.0) == value(controller.value)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: policy_gradient(torch.ones(2, 3), torch.ones(3, 2)), r"advantages has shape \(3, 2\)"),
        (lambda: policy_gradient(torch.ones(3), torch.ones(3)), r"logps must have shape \(B, T\)"),
        (lambda: next_beta(0.0, 1.0, 1.0), "beta.* 0"),
        (lambda: next_beta(0.1, 1.0, 0.0), "target.* 0"),
        (lambda: next_beta(0.1, math.nan, 1.0), "kl.* nan"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
