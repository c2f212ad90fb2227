"""What no library at hand computes any more, against numbers that other projects recorded.

- rlax (google-deepmind/rlax, Apache-2.0): expectations in rlax/_src/policy_gradients_test.py and
  rlax/_src/multistep_test.py, for the policy gradient, the clipped surrogate and GAE.
- TRL 0.11.4, the last release with its first PPO trainer: outputs of masked_whiten, AdaptiveKLController,
  PPOTrainer.compute_advantages and PPOTrainer.loss on the inputs below, run once and written down.
- ListMLE, which is Plackett-Luce: TensorFlow Ranking (losses_impl_test.py), keras-rs (list_mle_loss_test.py).
"""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf_helpers.core.policy_losses import (
    AdaptiveKLController,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    gae,
)
from rlhf_helpers.core.preference_losses import listwise_dpo_loss, plackett_luce_loss
from rlhf_helpers.core.tensors import masked_mean, masked_whiten, token_entropies, token_logps

LOGITS = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])


def close(found, wanted, atol=1e-5):
    assert_close(found, torch.as_tensor(wanted, dtype=found.dtype), atol=atol, rtol=1e-5)


# ---- rlax


def test_policy_gradient_is_rlaxs():
    logps = token_logps(torch.stack([LOGITS, LOGITS + 1]), torch.tensor([[0, 1, 2], [0, 0, 0]]))
    weights = torch.tensor([[-2.0, 2.0, 0.0], [-3.0, 1.0, -1.0]])
    advantages = torch.tensor([[0.3, 0.2, 0.1], [-0.3, -0.2, -0.1]])
    close((-advantages * logps * weights).mean(-1), [0.0788835, 0.3272009])


def test_clipped_surrogate_is_rlaxs():
    old = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 0.0], [-3.0, -2.0, -1.0]])
    actions = torch.tensor([[0, 1, 2]] * 2)
    logps, old_logps = (token_logps(torch.stack([x, x]), actions) for x in (LOGITS, old))
    advantages = torch.tensor([[0.3, 0.2, 0.1], [-0.3, -0.2, -0.1]])
    close(clipped_policy_loss(logps, old_logps, advantages, cliprange=0.2).mean(-1), [-0.1711747, 0.1933333])


def test_entropy_is_rlaxs():
    """Theirs is the weighted negative entropy; with weights (-2, 2, 0) the third row drops out."""
    rows = token_entropies(LOGITS[None, :2], torch.ones(1, 2))[0]
    close((2 * rows[0] - 2 * rows[1]) / 3, 0.288693)


@pytest.mark.parametrize(
    "lam, first, second",
    [
        (1.0, [-1.45118, -4.4557, 2.5396, 0.5249, -0.49], [3.0, 2.0, 1.0, 0.0]),
        (0.7, [-0.676979, -5.248167, 2.4846, 0.6704, -0.49], [2.2899, 1.73, 1.0, 0.0]),
        (0.4, [0.56731, -6.042, 2.3431, 0.815, -0.49], [1.725, 1.46, 1.0, 0.0]),
    ],
)
def test_gae_is_rlaxs(lam, first, second):
    """Their value after the end, -1, joins our last reward: here V is 0 after a response's last token."""
    values = torch.tensor([[1.0, 4.0, -3.0, -2.0, -1.0]])
    rewards = torch.tensor([[0.0, 0.0, 1.0, 0.0, -0.5 + 0.99 * -1]])
    close(gae(rewards, values, torch.ones(1, 5), gamma=0.99, lam=lam)[0][0], first, atol=1e-3)
    values, rewards = torch.tensor([[-3.0, -2.0, -1.0, 0.0]]), torch.zeros(1, 4)  # up to their discount of 0
    close(gae(rewards, values, torch.ones(1, 4), gamma=0.9, lam=lam)[0][0], second, atol=1e-3)


# ---- TRL 0.11.4: gamma 0.98, lam 0.9, both clip ranges 0.2

VALUES = torch.tensor([[0.5, -0.3, 0.8, 0.2], [0.1, 0.9, -0.4, 0.0]])
REWARDS = torch.tensor([[-0.1, 0.2, 0.0, 1.0], [0.3, -0.2, -1.0, 0.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
WHITE = [[0.3772166, 1.3219206, 0.1840645, 0.8088063], [-0.5336180, -1.7148501, -0.4435399, 0.0]]
RETURNS = [[0.8175251, 1.0736113, 0.9016001, 1.0], [-0.6006985, -1.1212, -1.0, 0.0]]


def test_whitened_advantages_and_returns_are_those_of_trl_0_11():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.98, lam=0.9)
    close(returns, RETURNS)
    close(masked_whiten(advantages, MASK), WHITE)


def test_whitening_is_that_of_trl_0_11_but_leaves_0_on_padding():
    unshifted = [[-0.1850092, 0.3133455, -0.0188909, 1.6422915], [0.4794638, -0.3511274, -1.6800734, 0.0]]
    shifted = [[-0.2135806, 0.2847741, -0.0474624, 1.6137201], [0.4508924, -0.3796989, -1.7086449, 0.0]]
    close(masked_whiten(REWARDS, MASK, shift_mean=False), unshifted)
    close(masked_whiten(REWARDS, MASK), shifted)


def test_ppo_losses_are_those_of_trl_0_11():
    logps = torch.tensor([[-1.0, -2.0, -0.5, -3.0], [-1.5, -0.2, -0.9, -7.0]])
    old_logps = torch.tensor([[-1.2, -1.5, -0.5, -2.9], [-2.0, -0.3, -0.4, -1.0]])
    values = torch.tensor([[0.9, -0.2, 0.1, 0.25], [0.1, 0.5, -0.1, 5.0]])
    policy = clipped_policy_loss(logps, old_logps, torch.tensor(WHITE), cliprange=0.2)
    close(masked_mean(policy, MASK), 0.1370677)
    value = clipped_value_loss(values, VALUES, torch.tensor(RETURNS), cliprange_value=0.2)
    close(masked_mean(value, MASK), 0.5327649)
    # Theirs counts the tokens whose gradient is cut (2 of 7), ours every ratio outside the range (4 of 7).
    close(clip_fraction(logps, old_logps, MASK, cliprange=0.2), 4 / 7)


def test_adaptive_controller_is_that_of_trl_0_11():
    controller, found = AdaptiveKLController(0.2, 6.0, 10_000), []
    for kl in (3.0, 20.0, 6.5, 0.0):
        controller.update(kl, 256)
        found.append(controller.value)
    assert found == pytest.approx([0.198976, 0.19999475712, 0.200421412601856, 0.1993952549693345], rel=1e-9)


# ---- ListMLE


def test_plackett_luce_is_listmle():
    ln2, ln3 = math.log(2), math.log(3)
    ranked = torch.tensor([[ln3, ln2, 0.0], [ln3, 0.0, ln2]])  # TensorFlow Ranking's scores, in label order
    wanted = [-(math.log(3 / 6) + math.log(2 / 3)), -(math.log(3 / 6) + math.log(1 / 3))]
    close(plackett_luce_loss(ranked), wanted)
    ranked = torch.tensor([[3.0, 2.0, 2.0, 1.8, 1.0]])  # keras-rs' second list, in label order
    close(plackett_luce_loss(ranked), [3.088192])
    close(listwise_dpo_loss(ranked / 0.1 - 7, torch.full((1, 5), -7.0), beta=0.1), [3.088192])
