"""The functions that lesson 2's exercises compare with, where the package has none: values by hand."""

import math

import pytest
import torch

from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.exercises.lesson2.kl import stored_search

policy_gradient, rloo_step, gae, repaired_loss = (
    EXERCISES[name].reference for name in ("policy_gradient", "rloo_step", "gae", "repaired_loss")
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


def test_a_step_by_hand():
    # one prompt, two equally likely answers, rewards 1 and 0: advantages 1 and -1; grad log pi is (1/2, -1/2)
    # for the first and its negative for the second, so the mean of A grad log pi is (1/2, -1/2)
    answers, rewards = torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]])
    assert rloo_step(torch.zeros(1, 2), answers, rewards, 4.0).tolist() == [value([2.0, -2.0])]


def test_the_repaired_loss_by_hand():
    # KL 0.5 and -1 (its last column is padding), so rewards 0.95 and 0.1; advantages 0.85 and -0.85; log pi
    # of the answers -3 and -1
    old = torch.tensor([[[-1.0, -2.0], [-1.0, -7.0]]])
    logps = old.clone().requires_grad_()
    ref = old - torch.tensor([[[0.2, 0.3], [-1.0, 9.0]]])
    mask = torch.tensor([[[True, True], [True, False]]])
    loss = repaired_loss(logps, old, ref, mask, torch.tensor([[1.0, 0.0]]), 0.1)
    assert loss.item() == value((0.85 * 3 - 0.85 * 1) / 2)
    loss.backward()
    assert logps.grad.tolist() == [[value([-0.425, -0.425]), value([0.425, 0.0])]]


def test_what_gold_does_at_each_coefficient():
    fates = {0.0: "gold falls", 0.1: "gold falls", 0.3: "gold is kept", 1.0: "gold hardly rises"}
    assert {coef: stored_search(coef) for coef in fates} == fates


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: policy_gradient(torch.ones(2, 3), torch.ones(3, 2)), r"advantages has shape \(3, 2\)"),
        (lambda: policy_gradient(torch.ones(3), torch.ones(3)), r"logps must have shape \(B, T\)"),
        (lambda: stored_search(0.2), r"runs at \[.*\], not at 0.2"),
    ],
)
def test_bad_input_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
