"""From rewards to a gradient: the policy-gradient loss, baselines, GAE, PPO's clip, GRPO's advantages."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core import policy_losses
from rlhf_helpers.core.tensors import require_shapes
from rlhf_helpers.lab.exercises.exercise import Exercise, named


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


def clipped_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """`core.policy_losses.clipped_policy_loss`, (B, T), with a gradient by logps alone."""
    kept = old_logps.detach(), advantages.detach()
    return policy_losses.clipped_policy_loss(logps, *kept, cliprange=cliprange)


rloo = torch.no_grad()(policy_losses.rloo_advantages)
group_advantages = torch.no_grad()(policy_losses.group_advantages)

OLD = torch.tensor([[-1.0, -2.0, -0.7, -1.6, -3.0], [-0.4, -1.2, -2.5, -0.9, -1.1]])
SMALL = [[0.0, 0.001, 0.0, 0.002], [0.5, 0.0, 0.25, 1.0]]  # eps is a large part of the first group's std


def _gradient_probes() -> list[tuple[Tensor, Tensor]]:
    advantages = torch.tensor([[1.0, -0.5, 2.0], [-1.5, 0.3, 0.8]])
    tall = 3 * OLD.T  # more rows than tokens, and large numbers, which nothing may clip
    return [
        (OLD[:, :3].clone(), advantages),
        (OLD[:1, 2:].clone(), advantages[:1]),
        (tall, -2 * OLD.flip(0).T),
    ]


def _group_probes() -> list[tuple[Tensor]]:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.25], [1.0, 1.0, 1.0, 1.0], [0.2, 0.9, 0.4, 0.8]])
    return [(rewards,), (torch.tensor(SMALL),), (rewards[:, 1:],), (3 - 4 * rewards.T,)]


def _gae_probes() -> list[tuple[Tensor, Tensor, float, float]]:
    rewards = torch.tensor([[0.0, -0.1, 0.2, 1.0], [-0.3, 0.4, 0.0, -0.5], [0.1, 0.1, -0.2, 0.7]])
    values = torch.tensor([[0.5, 0.3, 0.6, 0.8], [-0.2, 0.1, 0.4, -0.3], [0.2, 0.9, -0.4, 0.3]])
    return [
        (rewards, values, 0.9, 0.8),
        (rewards[:2, :3], values[:2, :3], 1.0, 0.95),
        (rewards.T, 3 * values.T, 0.7, 0.6),  # more rows than tokens
        (rewards[:1], values[:1], 0.95, 0.5),
        (rewards[:, :1], values[:, :1], 0.9, 0.9),
    ]


def _clip_probes() -> list[tuple[Tensor, Tensor, Tensor, float]]:
    # no ratio is 1 or stands at the edge of a range: the gradient has no single value there
    ratios = torch.tensor([[0.4, 0.95, 1.02, 1.06, 1.7], [4.0, 1.15, 0.7, 0.85, 0.97]])
    advantages = torch.tensor([[1.0, 0.5, -2.0, 1.5, 0.8], [-1.0, -0.6, -1.2, 0.4, -0.3]])
    logps = OLD + ratios.log()
    return [
        *((logps, OLD.clone(), advantages, c) for c in (0.2, 0.1, 0.5)),
        (logps.T, OLD.T, advantages.T, 0.25),  # more rows than tokens
        (logps[:1], OLD[:1].clone(), advantages[:1], 0.35),
    ]


POLICY_GRADIENT = Exercise(
    name="policy_gradient",
    lesson=2,
    reference=policy_gradient,
    probes=_gradient_probes,
    mistakes=named(
        "the sign is flipped: an optimizer lowers the loss, so this makes GOOD tokens rarer",
        lambda lp, a: a * lp,
        "the tokens were averaged: return one loss per token, shape (B, T)",
        lambda lp, a: (-a * lp).mean(),
        lambda lp, a: (-a * lp).mean(1),
        "the tokens were summed: return one loss per token, shape (B, T)",
        lambda lp, a: (-a * lp).sum(),
        lambda lp, a: (-a * lp).sum(1),
        "exp(logp) is the probability: the policy gradient of a sample needs its log-prob",
        lambda lp, a: -a * lp.exp(),
        "the logarithm was taken twice: logps are logarithms already",
        lambda lp, a: -a * lp.log(),
        "the advantages never enter: this imitates every sample, good or bad",
        lambda lp, a: -lp,
        "no log-prob is left in the value: it never entered, or it cancelled out",
        lambda lp, a: -a,
        "the sign of the advantage is lost: bad tokens become likelier too",
        lambda lp, a: -a.abs() * lp,
        "negative advantages were dropped: a bad token never becomes rarer",
        lambda lp, a: -a.clamp(min=0) * lp,
        "the advantages were standardized on the way: use them as they are given",
        lambda lp, a: -(a - a.mean()) / a.std() * lp,
        lambda lp, a: -(a - a.mean()) * lp,
        "logps were normalized again: each is the log-prob of one sampled token, not a row of logits",
        lambda lp, a: -a * lp.log_softmax(-1),
        "advantage and log-prob were added: the one weighs the other, so multiply them",
        lambda lp, a: -(a + lp),
    ),
)

RLOO = Exercise(
    name="rloo",
    lesson=2,
    reference=rloo,
    probes=_group_probes,
    mistakes=named(
        "the mean includes the sample itself: compare it with the OTHERS of its row",
        lambda r: r - r.mean(1, keepdim=True),
        "the sign is flipped: a sample better than the others gets a negative advantage",
        lambda r: -rloo(r),
        "this is the baseline: subtract it from the reward",
        lambda r: r - rloo(r),
        "the wrong dimension: the samples of one prompt are a row, dim 1",
        lambda r: r - (r.sum(0) - r) / (len(r) - 1),
        lambda r: r - r.mean(0),
        "the mean is that of the whole batch: compare only samples of one prompt",
        lambda r: r - r.mean(),
        lambda r: rloo(r.flatten()[None]).view_as(r),
        "the factor is upside down: it is G / (G - 1), larger than 1",
        lambda r: rloo(r) * ((r.shape[1] - 1) / r.shape[1]) ** 2,
        "the others were summed, not averaged: divide by their number",
        lambda r: r - (r.sum(1, keepdim=True) - r),
        "the sum of the others was divided by G: there are G - 1 of them",
        lambda r: r - (r.sum(1, keepdim=True) - r) / r.shape[1],
        "the sum of the others was divided by the number of prompts: G is rewards.shape[1]",
        lambda r: r - (r.sum(1, keepdim=True) - r) / len(r),
        lambda r: r - (r.sum(1, keepdim=True) - r) / (len(r) - 1),
        "the sample's own reward is still in the sum, which was divided by G - 1",
        lambda r: r - r.sum(1, keepdim=True) / (r.shape[1] - 1),
        "the advantages were divided by a standard deviation: that is GRPO's step, RLOO has none",
        lambda r: group_advantages(r),
        lambda r: (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True),
        "only ONE other sample is the baseline: take the mean of all others",
        lambda r: r - r.roll(1, 1),
        lambda r: r - r.roll(-1, 1),
        "one number per prompt came back: every sample has its own advantage, shape (P, G)",
        lambda r: r.mean(1),
    ),
)


def _next(values: Tensor) -> Tensor:
    return F.pad(values[:, 1:], (0, 1))


def _trace(deltas: Tensor, decay: float) -> Tensor:
    """Sum backwards: A_t = deltas_t + decay A_{t+1}."""
    weights = decay ** (torch.arange(deltas.shape[1]) - torch.arange(deltas.shape[1])[:, None]).float()
    return deltas @ weights.triu().T


def _whitened(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


GAE = Exercise(
    name="gae",
    lesson=2,
    reference=gae,
    probes=_gae_probes,
    mistakes=named(
        "the value of the NEXT state is missing from delta: r_t + gamma V_{t+1} - V_t",
        lambda r, v, g, lam: _trace(r - v, g * lam),
        "V_t was not subtracted: an advantage says how much better it went than V_t expected",
        lambda r, v, g, lam: _trace(r + g * _next(v), g * lam),
        "time runs forwards: A_t needs A_{t+1}, so begin at the last token",
        lambda r, v, g, lam: _trace((r + g * _next(v) - v).flip(1), g * lam).flip(1),
        "after the last token there is no state: its next value is 0, not the last value again",
        lambda r, v, g, lam: _trace(r + g * torch.cat([v[:, 1:], v[:, -1:]], 1) - v, g * lam),
        "the next value of the last token wrapped round to the first (roll): it is 0",
        lambda r, v, g, lam: _trace(r + g * v.roll(-1, 1) - v, g * lam),
        "the value of another step stands where V_{t+1} belongs",
        lambda r, v, g, lam: _trace(r + g * F.pad(v[:, :-1], (1, 0)) - v, g * lam),
        lambda r, v, g, lam: _trace(r + g * v - v, g * lam),
        "lam never enters: this is its value at lam = 1, the return minus V",
        lambda r, v, g, lam: gae(r, v, g, 1.0),
        "only delta came back, the value at lam = 0: carry A_{t+1} over to the next turn of the loop",
        lambda r, v, g, lam: gae(r, v, g, 0.0),
        "gamma is missing in delta: the next value is discounted too",
        lambda r, v, g, lam: _trace(r + _next(v) - v, g * lam),
        "A_{t+1} was discounted by lam alone: the factor is gamma lam",
        lambda r, v, g, lam: _trace(r + g * _next(v) - v, lam),
        "gamma never enters",
        lambda r, v, g, lam: gae(r, v, 1.0, lam),
        "A_{t+1} was added whole: its factor is gamma lam",
        lambda r, v, g, lam: _trace(r + g * _next(v) - v, 1.0),
        "these are the returns, A + V: return the advantages",
        lambda r, v, g, lam: gae(r, v, g, lam) + v,
        "two tensors came back: return the advantages alone",
        lambda r, v, g, lam: (gae(r, v, g, lam), gae(r, v, g, lam) + v),
        "the last token was left out: its advantage is r - V",
        lambda r, v, g, lam: _trace(F.pad((r + g * _next(v) - v)[:, :-1], (0, 1)), g * lam),
        "the sign is flipped: a reward above what V_t expected is a positive advantage",
        lambda r, v, g, lam: -gae(r, v, g, lam),
        "the loop went over the rows: time is dim 1",
        lambda r, v, g, lam: gae(r.T, v.T, g, lam).T,
        "the advantages were standardized: PPO does that later, over the whole batch",
        lambda r, v, g, lam: _whitened(gae(r, v, g, lam)),
    ),
)


def _by_ratio(wrong: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """`wrong` of the ratio rho, the advantages and the clip range."""
    return lambda lp, old, a, c: wrong((lp - old).exp(), a, c)


def _surrogate(rho: Tensor, clipped: Tensor, advantages: Tensor) -> Tensor:
    return torch.maximum(-advantages * rho, -advantages * clipped)


CLIPPED_LOSS = Exercise(
    name="clipped_loss",
    lesson=2,
    reference=clipped_loss,
    probes=_clip_probes,
    mistakes=named(
        "nothing is clipped: this is -A rho, which pays for any step, however far",
        _by_ratio(lambda rho, a, c: -a * rho),
        "only the clipped term is there: a move in the WRONG direction loses its gradient as well",
        _by_ratio(lambda rho, a, c: -a * rho.clamp(1 - c, 1 + c)),
        "min and max are swapped: of two LOSSES take the larger one, the cautious choice",
        _by_ratio(lambda rho, a, c: torch.minimum(-a * rho, -a * rho.clamp(1 - c, 1 + c))),
        "this is the objective, to be maximized: a loss is its negative",
        _by_ratio(lambda rho, a, c: -_surrogate(rho, rho.clamp(1 - c, 1 + c), a)),
        "the sign of the advantage is flipped: good tokens are made rarer",
        _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(1 - c, 1 + c), -a)),
        "the ratio is upside down: divide the policy now by the policy that sampled",
        lambda lp, old, a, c: clipped_loss(old, lp, a, c),
        "the difference of log-probs is not the ratio: take exp of it",
        lambda lp, old, a, c: _surrogate(lp - old, (lp - old).clamp(1 - c, 1 + c), a),
        "this is the ratio of the LOG-probs: divide probabilities, exp(logps - old_logps)",
        lambda lp, old, a, c: _surrogate(lp / old, (lp / old).clamp(1 - c, 1 + c), a),
        "the range lies around 0: the ratio is 1 where nothing has changed, so clip to 1 - c ... 1 + c",
        _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(-c, c), a)),
        "the LOG-ratio was clipped to -c ... c: take exp first, then clip the ratio",
        _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(math.exp(-c), math.exp(c)), a)),
        "this is clipped above only: with a negative advantage the ratio must not fall without limit either",
        _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(max=1 + c), a)),
        "this is clipped below only: with a positive advantage the ratio must not grow without limit either",
        _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(min=1 - c), a)),
        "the ADVANTAGES were clipped: it is the ratio that must stay near 1",
        _by_ratio(lambda rho, a, c: -rho * a.clamp(1 - c, 1 + c)),
        _by_ratio(lambda rho, a, c: -rho * a.clamp(-c, c)),
        "there is one ratio for the whole row: take one per token; that of a long row explodes",
        lambda lp, old, a, c: _by_ratio(lambda rho, a, c: _surrogate(rho, rho.clamp(1 - c, 1 + c), a))(
            lp.sum(1, keepdim=True), old.sum(1, keepdim=True), a, c
        ),
        "0.2 is written into the function: use cliprange",
        lambda lp, old, a, c: clipped_loss(lp, old, a, 0.2),
        "the tokens were averaged: return one loss per token, shape (B, T)",
        lambda lp, old, a, c: clipped_loss(lp, old, a, c).mean(),
        lambda lp, old, a, c: clipped_loss(lp, old, a, c).mean(1),
    ),
)


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.mean(1, keepdim=True)


GROUP_ADVANTAGES = Exercise(
    name="group_advantages",
    lesson=2,
    reference=group_advantages,
    probes=_group_probes,
    mistakes=named(
        "this standard deviation divides by G (population): divide by G - 1, the default of std",
        lambda r: _centred(r) / (r.std(1, keepdim=True, correction=0) + 1e-4),
        "without eps a group of equal rewards gives 0 / 0",
        lambda r: _centred(r) / r.std(1, keepdim=True),
        lambda r: _centred(r) / r.std(1, keepdim=True, correction=0),
        "eps is too small, or a floor instead of added: add 1e-4, or tiny differences count as large ones",
        lambda r: group_advantages(r, eps=1e-8),
        lambda r: group_advantages(r, eps=1e-6),
        lambda r: group_advantages(r, eps=1e-5),
        "eps stands under the root, next to the variance: it belongs next to the standard deviation",
        lambda r: _centred(r) / (r.var(1, keepdim=True) + 1e-4).sqrt(),
        "eps was added to the quotient: brackets around (std + 1e-4) are missing",
        lambda r: _centred(r) / r.std(1, keepdim=True) + 1e-4,
        "the mean was not subtracted: samples below it must become rarer",
        lambda r: r / (r.std(1, keepdim=True) + 1e-4),
        "nothing was divided: this is only R - mean",
        lambda r: _centred(r),
        "this was divided by the variance: take its root",
        lambda r: _centred(r) / (r.var(1, keepdim=True) + 1e-4),
        "the sign is flipped: a sample above the mean of its group gets a negative advantage",
        lambda r: -group_advantages(r),
        "the wrong dimension: the samples of one prompt are a row, dim 1",
        lambda r: (r - r.mean(0)) / (r.std(0) + 1e-4),
        "the mean or the std is that of the whole batch: each prompt has its own",
        lambda r: (r - r.mean()) / (r.std() + 1e-4),
        lambda r: _centred(r) / (r.std() + 1e-4),
        lambda r: _centred(r) / (_centred(r).std() + 1e-4),
        lambda r: (r - r.mean()) / (r.std(1, keepdim=True) + 1e-4),
        "the baseline leaves the sample out, as RLOO's: GRPO takes the mean of the whole group",
        lambda r: rloo(r) / (r.std(1, keepdim=True) + 1e-4),
        lambda r: rloo(r),
    ),
)


EXERCISES = (POLICY_GRADIENT, RLOO, GAE, CLIPPED_LOSS, GROUP_ADVANTAGES)
