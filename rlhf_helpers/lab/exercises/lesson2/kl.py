"""What ties a policy to the reference: an estimator of the KL, and the KL in the reward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core import policy_losses
from rlhf_helpers.lab.exercises.exercise import Exercise, named


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """`core.policy_losses.kl_estimate` "k3", (B, T), with a gradient by logps alone."""
    return policy_losses.kl_estimate(logps, ref_logps.detach(), estimator="k3")


@torch.no_grad()
def shaped_rewards(
    scores: Tensor, old_logps: Tensor, ref_logps: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    """`core.policy_losses.kl_shaped_rewards`, (B, T), without gradient."""
    return policy_losses.kl_shaped_rewards(scores, old_logps, ref_logps, mask, kl_coef=kl_coef)


LOGPS = torch.tensor([[-1.0, -2.0, -0.7, -1.6, -3.0], [-0.4, -1.2, -2.5, -0.9, -1.1]])
GAPS = torch.tensor([[0.5, -0.4, 0.3, 1.5, -0.9], [0.1, -1.7, 0.8, -0.2, 2.2]])


def _kl_probes() -> list[tuple[Tensor, Tensor]]:
    tall = LOGPS.T.clone()  # more rows than tokens
    return [
        (LOGPS.clone(), LOGPS - GAPS),
        (LOGPS[:1] + GAPS[1:], LOGPS[:1].clone()),
        (tall, tall - 2 * GAPS.T),
    ]


def _shaped_probes() -> list[tuple[Tensor, Tensor, Tensor, Tensor, float]]:
    scores = torch.tensor([0.7, -1.2, 3.0])
    columns = torch.arange(5)
    lengths = (torch.tensor([[3], [4]]), 0.1), (torch.tensor([[1], [5]]), 0.5)  # padding is not 0: mask it
    wide = [(scores[:2], LOGPS.clone(), LOGPS - GAPS, columns < length, c) for length, c in lengths]
    tall, gaps = LOGPS[:, :3].T.clone(), GAPS[:, 2:].T  # more rows than tokens
    return [
        *wide,
        (scores, tall, tall - gaps, columns[:2] < torch.tensor([[2], [1], [2]]), 0.3),
        (scores[2:], LOGPS[:1].clone(), LOGPS[:1] - GAPS[1:], columns[None] < 4, 0.2),
    ]


def _by_gap(wrong: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """`wrong` of d = log pi - log ref."""
    return lambda lp, ref: wrong(lp - ref)


K3 = Exercise(
    name="k3",
    lesson=2,
    reference=k3,
    probes=_kl_probes,
    mistakes=named(
        "d is reversed: d = log pi - log ref (this measures chi^2 - KL)",
        _by_gap(lambda d: torch.expm1(d) - d),
        "this is exp of the wrong difference: it is exp(-d), which is ref / pi",
        _by_gap(lambda d: torch.expm1(d) + d),
        "the last d has the wrong sign: the three terms must cancel to first order in d",
        _by_gap(lambda d: torch.expm1(-d) - d),
        "this is k1 = d: it has the right mean, but it is often negative and has a large variance",
        _by_gap(lambda d: d),
        "this is -d, k1 with its sign flipped",
        _by_gap(lambda d: -d),
        "this is k2 = d^2 / 2, which is biased",
        _by_gap(lambda d: d.square() / 2),
        "the - 1 is missing: at pi = ref the estimate must be 0",
        _by_gap(lambda d: torch.exp(-d) + d),
        "+ d is missing: without it the mean is 0, whatever the KL",
        _by_gap(lambda d: torch.expm1(-d)),
        "the sign of the whole is flipped: k3 is never negative",
        _by_gap(lambda d: -torch.expm1(-d) - d),
        "this is p log(p / q), a term of the exact sum: samples already occur with weight p",
        lambda lp, ref: lp.exp() * (lp - ref),
        "this is kl_div, made for whole distributions: k3 needs the two log-probs of the sampled token",
        lambda lp, ref: F.kl_div(lp, ref.exp(), reduction="none"),
        lambda lp, ref: F.kl_div(lp, ref, reduction="none", log_target=True),
        "d was computed from probabilities: it is a difference of LOG-probs",
        lambda lp, ref: k3(lp.exp(), ref.exp()),
        "the absolute value of d is biased: k3 is exp(-d) - 1 + d",
        _by_gap(lambda d: d.abs()),
        "the tokens were averaged or summed: return one value per token, shape (B, T)",
        lambda lp, ref: k3(lp, ref).mean(),
        lambda lp, ref: k3(lp, ref).sum(1),
        lambda lp, ref: k3(lp, ref).mean(1),
    ),
)


def _placed(scores: Tensor, mask: Tensor, at: Tensor | int) -> Tensor:
    """Zeros (B, T) with each row's score at one index."""
    placed = torch.zeros(mask.shape)
    placed[torch.arange(len(scores)), at] = scores
    return placed


def _by_parts(wrong: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`wrong` of the penalty -kl_coef d on real tokens, the scores and the mask."""
    return lambda s, old, ref, m, c: wrong(-c * (old - ref) * m, s, m)


def _ends(scores: Tensor, mask: Tensor) -> Tensor:
    return _placed(scores, mask, mask.sum(1) - 1)


SHAPED_REWARDS = Exercise(
    name="shaped_rewards",
    lesson=2,
    reference=shaped_rewards,
    probes=_shaped_probes,
    mistakes=named(
        "KL is added: a policy that leaves the reference is REWARDED; subtract it",
        lambda s, old, ref, m, c: shaped_rewards(s, ref, old, m, c),
        "the score stands in the last COLUMN: in shorter rows that is padding",
        _by_parts(lambda p, s, m: p + _placed(s, m, -1)),
        "the score stands one index too late: a row of n real tokens ends at index n - 1",
        _by_parts(lambda p, s, m: p + _placed(s, m, m.sum(1))),
        _by_parts(lambda p, s, m: p + _placed(s, m, m.sum(1).clamp(max=m.shape[1] - 1))),
        "the score stands one index too early: a row of n real tokens ends at index n - 1",
        _by_parts(lambda p, s, m: p + _placed(s, m, m.sum(1) - 2)),
        "the score stands at the first token: it judges the finished response, so it belongs to the last",
        _by_parts(lambda p, s, m: p + _placed(s, m, 0)),
        "every token got the whole score: only the last real one does",
        _by_parts(lambda p, s, m: p + s[:, None] * m),
        _by_parts(lambda p, s, m: p + s[:, None]),
        "the score was shared out among the tokens: the last real one gets all of it",
        _by_parts(lambda p, s, m: p + s[:, None] * m / m.sum(1, keepdim=True)),
        "padding got a penalty: it is 0 wherever mask is 0",
        lambda s, old, ref, m, c: -c * (old - ref) + _ends(s, m),
        "the score REPLACED the penalty of the last token: add it",
        _by_parts(lambda p, s, m: p * ~_ends(torch.ones_like(s), m).bool() + _ends(s, m)),
        "kl_coef multiplies the score too: it weighs the KL alone",
        lambda s, old, ref, m, c: c * shaped_rewards(s, old, ref, m, 1.0),
        "kl_coef never enters",
        lambda s, old, ref, m, c: shaped_rewards(s, old, ref, m, 1.0),
        "the score never enters: this is the penalty alone",
        _by_parts(lambda p, s, m: p),
        "there is no penalty: this is the score alone",
        _by_parts(lambda p, s, m: _ends(s, m)),
        "the whole penalty stands at the last token: each token pays its own",
        _by_parts(lambda p, s, m: _ends(s + p.sum(1), m)),
        "the penalty is made of k3 (or k2, or |d|): in the reward only k1 = d has the right gradient",
        lambda s, old, ref, m, c: -c * k3(old, ref) * m + _ends(s, m),
        lambda s, old, ref, m, c: -c * (old - ref).square() / 2 * m + _ends(s, m),
        lambda s, old, ref, m, c: -c * (old - ref).abs() * m + _ends(s, m),
        "the reward of a row was summed: return one reward per token, shape (B, T)",
        lambda s, old, ref, m, c: shaped_rewards(s, old, ref, m, c).sum(1),
    ),
)

EXERCISES = (K3, SHAPED_REWARDS)
