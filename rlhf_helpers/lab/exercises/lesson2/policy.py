"""From rewards to a gradient: the policy-gradient loss, a baseline, a training step, GAE, PPO's clip."""

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from rlhf_helpers.core import policy_losses
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.lab.exercises.exercise import Function, as_asked, exercise, negated


def policy_gradient(logps: Tensor, advantages: Tensor) -> Tensor:
    """Loss of each token whose gradient is the policy gradient: -A_t log pi_t, advantages held constant.

    logps, advantages (B, T); returns (B, T). Williams 1992. Raises ValueError where shapes differ. Lesson 2.
    """
    require_shapes("B T", logps=logps, advantages=advantages)
    return -advantages.detach() * logps


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """`core.policy_losses.gae` of rows without padding: the advantages (B, T) alone, without gradient."""
    return policy_losses.gae(rewards, values, torch.ones_like(rewards), gamma=gamma, lam=lam)[0]


clipped_loss = as_asked(policy_losses.clipped_policy_loss, "logps")
rloo = as_asked(policy_losses.rloo_advantages)


def rloo_step(logits: Tensor, answers: Tensor, rewards: Tensor, learning_rate: float) -> Tensor:
    """Return the logits (P, K) after one step of gradient descent on RLOO's loss.

    loss = mean over all P G answers of -A log pi(answer), A = reward minus the mean of the others of its row.
    answers (P, G): indices into the K answers of each prompt; rewards (P, G). Lesson 2.
    """
    leaf = logits.detach().requires_grad_()
    log_pi = leaf.log_softmax(1).gather(1, answers)
    loss = -(rloo(rewards) * log_pi).mean()
    return logits.detach() - learning_rate * torch.autograd.grad(loss, leaf)[0]


def _discounted(deltas: Tensor, decay: float) -> Tensor:
    """Sum backwards: A_t = deltas_t + decay A_{t+1}."""
    return gae(deltas, torch.zeros_like(deltas), 1.0, decay)


def _with_next(ahead: Function) -> Function:
    """GAE with another value where V_{t+1} belongs."""
    return lambda gain, values, gamma, decay: _discounted(gain + gamma * ahead(values), decay)


def _surrogate(ratio: Tensor, clipped: Tensor, advantages: Tensor) -> Tensor:
    return torch.maximum(-advantages * ratio, -advantages * clipped)


LOGPS = tensor([[-1.0, -2.0, -0.7, -1.6, -3.0], [-0.4, -1.2, -2.5, -0.9, -1.1]])
ADVANTAGES = tensor([[1.0, -0.5, 2.0], [-1.5, 0.3, 0.8]])
GROUPS = tensor([[1.0, 0.0, 0.5, 0.25], [1.0, 1.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.8]])
TABLE = torch.cat([GROUPS - 0.3, GROUPS.flip(0)[:, :2]], 1)
DRAWN = tensor([[0, 1, 1, 2], [2, 0, 1, 0], [1, 2, 0, 2]])
REWARDS = tensor([[0.0, -0.1, 0.2, 1.0], [-0.3, 0.4, 0.0, -0.5], [0.1, 0.1, -0.2, 0.7]])
CRITIC = tensor([[0.5, 0.3, 0.6, 0.8], [-0.2, 0.1, 0.4, -0.3], [0.2, 0.9, -0.4, 0.3]])
# no ratio is 1 or stands at the edge of a range: the gradient has no single value there
NEW_LOGPS = LOGPS + tensor([[0.4, 0.95, 1.02, 1.06, 1.7], [4.0, 1.15, 0.7, 0.85, 0.97]]).log()
CLIP_ADVANTAGES = tensor([[1.0, 0.5, -2.0, 1.5, 0.8], [-1.0, -0.6, -1.2, 0.4, -0.3]])

EXERCISES = {
    "policy_gradient": exercise(
        policy_gradient,
        [
            (LOGPS[:, :3], ADVANTAGES),
            (LOGPS[:1, 2:], ADVANTAGES[:1]),
            # more rows than tokens, and large numbers, which nothing may clip
            (3 * LOGPS.T, -2 * LOGPS.flip(0).T),
        ],
        "the sign is flipped: an optimizer lowers the loss, so this makes GOOD tokens rarer",
        negated,
        "exp(logp) is the probability: the policy gradient of a sample needs its log-prob",
        lambda logps, advantages: -advantages * logps.exp(),
        "the advantages never enter: this imitates every sample, good or bad",
        lambda logps: -logps,
        "no log-prob is left in the value: it never entered, or it cancelled out",
        lambda advantages: -advantages,
        "the sign of the advantage is lost: bad tokens become likelier too",
        lambda logps, advantages: -advantages.abs() * logps,
        "negative advantages were dropped: a bad token never becomes rarer",
        lambda logps, advantages: -advantages.clamp(min=0) * logps,
        "the advantages were standardized on the way: use them as they are given",
        lambda logps, centred, advantages: -centred / advantages.std() * logps,
        lambda logps, centred: -centred * logps,
        "logps were normalized again: each is the log-prob of one sampled token, not a row of logits",
        lambda logps, advantages: -advantages * logps.log_softmax(-1),
        centred=lambda advantages: advantages - advantages.mean(),
    ),
    "rloo": exercise(
        rloo,
        [(GROUPS,), (GROUPS[:2] / 100,), (GROUPS[:, 1:],), (3 - 4 * GROUPS.T,)],
        "the mean includes the sample itself: compare it with the OTHERS of its row",
        lambda centred: centred,
        "the sign is flipped: a sample better than the others gets a negative advantage",
        negated,
        "this is the baseline: subtract it from the reward",
        lambda rewards, right: rewards - right,
        "the wrong dimension: the samples of one prompt are a row, dim 1",
        lambda rewards: rloo(rewards.T).T,
        lambda rewards: rewards - rewards.mean(0),
        "the mean is that of the whole batch: compare only samples of one prompt",
        lambda rewards: rewards - rewards.mean(),
        lambda rewards: rloo(rewards.reshape(1, -1)).view_as(rewards),
        "the factor is upside down: it is G / (G - 1), larger than 1",
        lambda centred, size: centred * (size - 1) / size,
        "the others were summed, not averaged: divide by their number",
        lambda rewards, others: rewards - others,
        "the sum of the others was divided by G: there are G - 1 of them",
        lambda rewards, others, size: rewards - others / size,
        "the sample's own reward is still in the sum, which was divided by G - 1",
        lambda rewards, size: rewards - rewards.sum(1, keepdim=True) / (size - 1),
        "the advantages were divided by a standard deviation: that is GRPO's step, RLOO has none",
        lambda rewards: policy_losses.group_advantages(rewards),
        lambda rewards, centred: centred / rewards.std(1, keepdim=True),
        centred=lambda rewards: rewards - rewards.mean(1, keepdim=True),
        size=lambda rewards: rewards.shape[1],
        others=lambda rewards: rewards.sum(1, keepdim=True) - rewards,
    ),
    "rloo_step": exercise(
        rloo_step,
        [
            (TABLE[:, :4], DRAWN, GROUPS, 0.5),
            (TABLE[:2, :3], DRAWN[:2], GROUPS[1:], 2.0),
            (TABLE.T[:4], DRAWN.T[:, :2], 2 - GROUPS.T[:, :2], 1.0),
            (TABLE, DRAWN[:, :3] + 2, GROUPS[:, 1:], 0.3),
        ],
        "the step goes uphill on the loss: better answers became rarer; subtract the gradient",
        ("- learning_rate", "+ learning_rate"),
        "the logits did not change: the gradient was never applied (an optimizer needs .step())",
        lambda logits: logits,
        "there is no baseline: subtract the mean reward of the OTHER answers of the row",
        ("rloo(rewards)", "rewards"),
        "the baseline includes the answer itself: compare it with the OTHERS of its row",
        ("rloo(rewards)", "(rewards - rewards.mean(1, keepdim=True))"),
        "the baseline is that of the whole batch: compare only answers to one prompt",
        ("rloo(rewards)", "(rewards - rewards.mean())"),
        "this follows the gradient of the probability: the policy gradient needs log pi",
        ("log_softmax", "softmax"),
        "the loss was summed, over the prompts or over their answers: average over all answers",
        (".mean()", ".sum()"),
        (".mean()", ".mean(0).sum()"),
        (".mean()", ".mean(1).sum()"),
        "learning_rate never enters",
        ("learning_rate * ", ""),
        "this is the gradient: take learning_rate times it off the logits",
        ("logits.detach() - learning_rate * ", ""),
    ),
    "gae": exercise(
        gae,
        [
            (REWARDS, CRITIC, 0.9, 0.8),
            (REWARDS[:2, :3], CRITIC[:2, :3], 1.0, 0.95),
            (REWARDS.T, 3 * CRITIC.T, 0.7, 0.6),  # more rows than tokens
            (REWARDS[:1], CRITIC[:1], 0.95, 0.5),
            (REWARDS[:, :1], CRITIC[:, :1], 0.9, 0.9),
        ],
        "the value of the NEXT state is missing from delta: r_t + gamma V_{t+1} - V_t",
        lambda rewards, values, decay: _discounted(rewards - values, decay),
        "V_t was not subtracted: an advantage says how much better it went than V_t expected",
        lambda delta, values, decay: _discounted(delta + values, decay),
        "time runs forwards: A_t needs A_{t+1}, so begin at the last token",
        lambda delta, decay: _discounted(delta.flip(1), decay).flip(1),
        "after the last token there is no state: its next value is 0, not the last value again",
        _with_next(lambda values: torch.cat([values[:, 1:], values[:, -1:]], 1)),
        "the next value of the last token wrapped round to the first (roll): it is 0",
        _with_next(lambda values: values.roll(-1, 1)),
        "lam never enters: this is its value at lam = 1, the return minus V",
        lambda rewards, values, gamma: gae(rewards, values, gamma, 1.0),
        "only delta came back, the value at lam = 0: carry A_{t+1} over to the next turn of the loop",
        lambda delta: delta,
        "gamma is missing in delta: the next value is discounted too",
        lambda gain, ahead, decay: _discounted(gain + ahead, decay),
        "A_{t+1} was discounted by lam alone: the factor is gamma lam",
        lambda delta, lam: _discounted(delta, lam),
        "gamma never enters",
        lambda rewards, values, lam: gae(rewards, values, 1.0, lam),
        "A_{t+1} was added whole: its factor is gamma lam",
        lambda delta: _discounted(delta, 1.0),
        "these are the returns, A + V: return the advantages",
        lambda right, values: right + values,
        "the sign is flipped: a reward above what V_t expected is a positive advantage",
        negated,
        "the loop went over the rows: time is dim 1",
        lambda rewards, values, gamma, lam: gae(rewards.T, values.T, gamma, lam).T,
        gain=lambda rewards, values: rewards - values,
        ahead=lambda values: F.pad(values[:, 1:], (0, 1)),
        delta=lambda gain, gamma, ahead: gain + gamma * ahead,
        decay=lambda gamma, lam: gamma * lam,
    ),
    "clipped_loss": exercise(
        clipped_loss,
        [
            (NEW_LOGPS, LOGPS, CLIP_ADVANTAGES, 0.2),
            (NEW_LOGPS, LOGPS, CLIP_ADVANTAGES, 0.1),
            (NEW_LOGPS, LOGPS, CLIP_ADVANTAGES, 0.5),
            (NEW_LOGPS.T, LOGPS.T, CLIP_ADVANTAGES.T, 0.25),  # more rows than tokens
            (NEW_LOGPS[:1], LOGPS[:1], CLIP_ADVANTAGES[:1], 0.35),
        ],
        "nothing is clipped: this is -A rho, which pays for any step, however far",
        lambda advantages, ratio: -advantages * ratio,
        "only the clipped term is there: a move in the WRONG direction loses its gradient as well",
        lambda advantages, clipped: -advantages * clipped,
        "min and max are swapped: of two LOSSES take the larger one, the cautious choice",
        lambda advantages, ratio, clipped: torch.minimum(-advantages * ratio, -advantages * clipped),
        "this is the objective, to be maximized: a loss is its negative",
        negated,
        "the sign of the advantage is flipped: good tokens are made rarer",
        lambda ratio, clipped, advantages: _surrogate(ratio, clipped, -advantages),
        "the ratio is upside down: divide the policy now by the policy that sampled",
        lambda logps, old_logps, advantages, cliprange: clipped_loss(old_logps, logps, advantages, cliprange),
        "the difference of log-probs is not the ratio: take exp of it",
        lambda log_ratio, low, high, advantages: _surrogate(
            log_ratio, log_ratio.clamp(low, high), advantages
        ),
        "the range lies around 0: the ratio is 1 where nothing has changed, so clip to 1 - c ... 1 + c",
        lambda ratio, advantages, cliprange: _surrogate(
            ratio, ratio.clamp(-cliprange, cliprange), advantages
        ),
        "the LOG-ratio was clipped to -c ... c: take exp first, then clip the ratio",
        lambda log_ratio, ratio, advantages, cliprange: _surrogate(
            ratio, log_ratio.clamp(-cliprange, cliprange).exp(), advantages
        ),
        "this is clipped above only: with a negative advantage the ratio must not fall without limit either",
        lambda ratio, high, advantages: _surrogate(ratio, ratio.clamp(max=high), advantages),
        "this is clipped below only: with a positive advantage the ratio must not grow without limit either",
        lambda ratio, low, advantages: _surrogate(ratio, ratio.clamp(min=low), advantages),
        "0.2 is written into the function: use cliprange",
        lambda logps, old_logps, advantages: clipped_loss(logps, old_logps, advantages, 0.2),
        log_ratio=lambda logps, old_logps: logps - old_logps,
        ratio=lambda log_ratio: log_ratio.exp(),
        low=lambda cliprange: 1 - cliprange,
        high=lambda cliprange: 1 + cliprange,
        clipped=lambda ratio, low, high: ratio.clamp(low, high),
    ),
}
