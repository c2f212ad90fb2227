"""How labels and rewards are measured: agreement, calibration, a cautious ensemble, best-of-n."""

from collections.abc import Callable
from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_helpers.core.tensors import as_bool_mask, require_number, require_shapes
from rlhf_helpers.lab.exercises.exercise import Exercise, named


def _rates(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of rows on which both agree, and each one's share of ones."""
    return (first == second).double().mean(), first.double().mean(), second.double().mean()


def _kappa(observed: Tensor, chance: Tensor | float) -> Tensor:
    return (observed - chance) / (1 - chance)


def cohen_kappa(first: Tensor, second: Tensor) -> Tensor:
    """Agreement of two annotators beyond chance: (observed - chance) / (1 - chance).

    first, second: 0/1 labels (N,); with shares of ones p and q, chance = p q + (1 - p)(1 - q). Returns a
    scalar, NaN when chance is 1. Raises ValueError for shapes that differ and other labels. Cohen 1960.
    Lesson 1.
    """
    require_shapes("N", first=first, second=second)
    observed, p, q = _rates(as_bool_mask(first, "first"), as_bool_mask(second, "second"))
    return _kappa(observed, p * q + (1 - p) * (1 - q))


def _members(confidence: Tensor, bins: int) -> Tensor:
    """1 where answer n lies in bin k, (N, bins)."""
    return F.one_hot((confidence * bins).long().clamp(max=bins - 1), bins).to(confidence)


@torch.no_grad()
def calibration_error(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Expected calibration error: sum_k n_k / N |mean correct in bin k - mean confidence in bin k|.

    confidence (N,) in [0, 1], correct (N,) 0 or 1; bin k holds k / bins <= confidence < (k + 1) / bins, the
    last one 1 as well; an empty bin adds nothing. Returns a scalar without gradient. Raises ValueError for
    shapes that differ, a confidence outside [0, 1], bins < 1. Guo 2017, eq. 3. Lesson 1.
    """
    require_shapes("N", confidence=confidence, correct=correct)
    require_number("bins", bins, at_least=1)
    for end in confidence.aminmax():
        require_number("confidence (a probability)", end.item(), at_least=0, at_most=1)
    return ((correct - confidence) @ _members(confidence, bins)).abs().sum() / len(confidence)


@torch.no_grad()
def pessimistic(rewards: Tensor, penalty: float) -> Tensor:
    """Reward of a cautious ensemble: mean - penalty * variance, both over the M members, both divided by M.

    rewards (M, B); returns (B,) without gradient. Raises ValueError for another shape or a penalty that is
    not finite. Coste 2023, uncertainty-weighted optimisation. Lesson 1.
    """
    require_shapes("M B", rewards=rewards)
    require_number("penalty", penalty)
    return rewards.mean(0) - penalty * rewards.var(0, correction=0)


def _expected(gold: Tensor, order: Tensor, weight: Callable[[int, int], float]) -> Tensor:
    """Sum gold values in an order, each times weight(index from 1, N)."""
    return gold[order] @ torch.tensor([weight(i + 1, len(gold)) for i in range(len(gold))]).to(gold)


@torch.no_grad()
def best_of_n_gold(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Expected gold value of the best of n by proxy, unbiased, from N samples.

    sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold_(i), sorted ascending by the proxy: of the C(N, n) subsets,
    C(i-1, n-1) have sample i as their best. proxy, gold (N,), no ties in proxy; returns a scalar without
    gradient. Raises ValueError for shapes that differ and n outside 1..N. Lesson 1.
    """
    require_shapes("N", proxy=proxy, gold=gold)
    require_number("n", n, at_least=1, at_most=len(proxy))
    return _expected(gold, proxy.argsort(), lambda i, total: comb(i - 1, n - 1) / comb(total, n))


def _kappa_probes() -> list[tuple[Tensor, Tensor]]:
    return [
        (torch.tensor([1, 1, 1, 0, 1, 0, 0, 1, 1, 0]), torch.tensor([1, 1, 0, 0, 1, 0, 0, 0, 1, 0])),
        (torch.tensor([1, 1, 1, 1, 0, 1, 1, 0]), torch.tensor([1, 0, 1, 1, 1, 1, 1, 1])),  # below chance
    ]


def _calibration_probes() -> list[tuple[Tensor, Tensor, int]]:
    confidence = torch.tensor([0.52, 0.58, 0.63, 0.71, 0.74, 0.77, 0.85, 0.93, 0.97, 1.0])
    return [  # no confidence lies on an edge between two bins: the statement leaves the side open
        (confidence, torch.tensor([1.0, 0, 0, 1, 0, 1, 1, 1, 1, 0]), 10),  # the lower five bins are empty
        (torch.tensor([0.12, 0.31, 0.38, 0.66, 0.92, 0.87]), torch.tensor([1.0, 0, 0, 1, 0, 1]), 3),
        (torch.tensor([0.0, 0.13, 0.4, 0.55, 0.8]), torch.tensor([1.0, 0, 1, 0, 0]), 4),
    ]


def _ensemble_probes() -> list[tuple[Tensor, float]]:
    rewards = torch.tensor([[1.0, 0.2, -0.5, 2.5], [1.4, -0.9, -0.3, 1.0], [0.3, 0.8, -0.6, 4.1]])
    return [(rewards, 0.5), (rewards[1:], 2.0), (rewards.T, 1.0)]


def _best_of_n_probes() -> list[tuple[Tensor, Tensor, int]]:
    proxy = torch.tensor([0.3, 1.9, -0.4, 1.2, 0.8, 2.6])
    gold = torch.tensor([0.35, 0.9, 0.1, 0.6, 0.75, 0.2])  # the proxy's favourite is not the best
    equal = torch.tensor([0.6, 0.2, 0.75, 0.2, 0.5])  # two answers are equally good
    return [
        (proxy, gold, 2),
        (proxy, gold, 4),
        (proxy[:5], equal, 3),
        (proxy[:5], gold[1:], 1),
        (proxy[1:], equal, 5),
    ]


def _by_rates(wrong: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """`wrong` of observed agreement, chance agreement, and the two shares of ones."""

    def compare(first: Tensor, second: Tensor) -> Tensor:
        observed, p, q = _rates(first, second)
        return wrong(observed, p * q + (1 - p) * (1 - q), p, q)

    return compare


def _by_bins(wrong: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """`wrong` of the share of answers and the signed gap (NaN when empty) of each bin."""

    def compare(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
        members = _members(confidence, bins)
        return wrong(members.mean(0), (correct - confidence) @ members / members.sum(0))

    return compare


COHEN_KAPPA = Exercise(
    name="cohen_kappa",
    lesson=1,
    reference=cohen_kappa,
    probes=_kappa_probes,
    mistakes=named(
        "this is the raw agreement: two people who only guess agree as well, by chance",
        _by_rates(lambda o, e, p, q: o),
        "chance is not always 0.5: two people who nearly always say 1 agree by chance far more often",
        _by_rates(lambda o, e, p, q: _kappa(o, 0.5)),
        "chance was computed from ONE annotator's labels: each of them has a share of ones",
        _by_rates(lambda o, e, p, q: _kappa(o, p**2 + (1 - p) ** 2)),
        _by_rates(lambda o, e, p, q: _kappa(o, q**2 + (1 - q) ** 2)),
        "both shares were pooled into one: that is Scott's pi; Cohen keeps each annotator's own",
        _by_rates(lambda o, e, p, q: _kappa(o, ((p + q) / 2) ** 2 + (1 - (p + q) / 2) ** 2)),
        "chance counts only both saying 1: both saying 0 is agreement too",
        _by_rates(lambda o, e, p, q: _kappa(o, p * q)),
        "that is how often they DISAGREE by chance",
        _by_rates(lambda o, e, p, q: _kappa(o, 1 - e)),
        "the denominator is wrong: divide by 1 - chance, what chance leaves to be gained",
        _by_rates(lambda o, e, p, q: o - e),
        _by_rates(lambda o, e, p, q: (o - e) / (1 - o)),
        _by_rates(lambda o, e, p, q: (o - e) / e),
        "this is the correlation of the labels: it ignores that one annotator says 1 more often",
        lambda a, b: torch.corrcoef(torch.stack([a, b]).double())[0, 1],
        "this is a Python number: return a tensor of shape (), without .item() or float()",
        lambda a, b: cohen_kappa(a, b).item(),
    ),
)

CALIBRATION_ERROR = Exercise(
    name="calibration_error",
    lesson=1,
    reference=calibration_error,
    probes=_calibration_probes,
    mistakes=named(
        "the bins were averaged as equals: a bin with more answers must weigh more",
        _by_bins(lambda share, gap: gap.abs().nanmean()),
        _by_bins(lambda share, gap: gap.abs().nansum() / len(gap)),
        "over- and underconfident bins cancel, which leaves the gap of the whole set: add up absolute gaps",
        lambda p, y, bins: (y - p).mean(),
        lambda p, y, bins: (p - y).mean(),
        lambda p, y, bins: (y - p).mean().abs(),
        "this is the LARGEST gap (maximum calibration error), not the expected one",
        _by_bins(lambda share, gap: gap.abs().nan_to_num().max()),
        "an empty bin gave 0 / 0, and NaN spoils the sum: leave empty bins out",
        _by_bins(lambda share, gap: (share * gap.abs()).sum()),
        "the gaps were squared: small ones nearly vanish, and the unit is no longer a probability",
        _by_bins(lambda share, gap: (share * gap**2).nansum()),
        _by_bins(lambda share, gap: (share * gap**2).nansum().sqrt()),
        "the bins are not used: a single answer with confidence 0.7 is right or wrong, never 0.7 right",
        lambda p, y, bins: (y - p).abs().mean(),
        "the middle of the bin stands in for its mean confidence: take the mean",
        lambda p, y, bins: (
            ((y - ((p * bins).long().clamp(max=bins - 1) + 0.5) / bins) @ _members(p, bins)).abs().sum()
            / len(p)
        ),
        "confidence 1 fell out of the last bin, where it belongs",
        lambda p, y, bins: ((y - p) * (p < 1) @ _members(p, bins)).abs().sum() / len(p),
        "confidence 0 fell out of the first bin, where it belongs",
        lambda p, y, bins: ((y - p) * (p > 0) @ _members(p, bins)).abs().sum() / len(p),
    ),
)

PESSIMISTIC = Exercise(
    name="pessimistic",
    lesson=1,
    reference=pessimistic,
    probes=_ensemble_probes,
    mistakes=named(
        "the wrong dimension: members are the rows (dim 0); return one value per answer, shape (B,)",
        lambda r, c: r.mean(1) - c * r.var(1, correction=0),
        lambda r, c: r.mean(1) - c * r.var(1),
        "this is the standard deviation, not its square, the variance",
        lambda r, c: r.mean(0) - c * r.std(0),
        lambda r, c: r.mean(0) - c * r.std(0, correction=0),
        "the sign is flipped: disagreement between the members is rewarded",
        lambda r, c: r.mean(0) + c * r.var(0, correction=0),
        lambda r, c: r.mean(0) + c * r.var(0),
        "this is the smallest member (worst case), which ignores the penalty",
        lambda r, c: r.amin(0),
        "one variance was taken for the whole batch: each answer has its own, over the members",
        lambda r, c: r.mean(0) - c * r.mean(0).var(),
        lambda r, c: r.mean(0) - c * r.var(),
        lambda r, c: r.mean(0) - c * r.var(correction=0),
        "the penalty also multiplies the mean: it belongs to the variance alone",
        lambda r, c: c * (r.mean(0) - r.var(0, correction=0)),
        lambda r, c: (1 - c) * r.mean(0) - c * r.var(0, correction=0),
        "this is the sample variance (divided by M - 1, the default of var): divide by M",
        lambda r, c: r.mean(0) - c * r.var(0),
        "the penalty never enters: multiply the variance by it",
        lambda r, c: r.mean(0) - r.var(0, correction=0),
        "this is the plain mean: nothing is subtracted where the members disagree",
        lambda r, c: r.mean(0),
    ),
)

BEST_OF_N_GOLD = Exercise(
    name="best_of_n_gold",
    lesson=1,
    reference=best_of_n_gold,
    probes=_best_of_n_probes,
    mistakes=named(
        "gold chose the samples: best-of-n knows only the proxy, and gold is looked up afterwards",
        lambda p, g, n: best_of_n_gold(g, g, n),
        lambda p, g, n: g.max(),
        "the order is descending: the weights of the best went to the worst by proxy",
        lambda p, g, n: best_of_n_gold(-p, g, n),
        "an index is off by one: i counts from 1, and sample i needs n - 1 partners among the i - 1 below it",
        lambda p, g, n: _expected(g, p.argsort(), lambda i, total: comb(i, n) / comb(total, n)),
        lambda p, g, n: _expected(g, p.argsort(), lambda i, total: comb(i - 1, n) / comb(total, n)),
        lambda p, g, n: _expected(g, p.argsort(), lambda i, total: comb(i, n - 1) / comb(total, n)),
        "only the first n samples were used: average over every subset of size n",
        lambda p, g, n: g[p[:n].argmax()],
        "n never enters: the mean of gold is best of 1, and gold at the largest proxy is best of all N",
        lambda p, g, n: g.mean(),
        lambda p, g, n: g[p.argmax()],
        "no sample is drawn twice: there are C(N, n) subsets, not N^n",
        lambda p, g, n: _expected(g, p.argsort(), lambda i, total: comb(i - 1, n - 1) / total**n),
        lambda p, g, n: _expected(g, p.argsort(), lambda i, total: (i**n - (i - 1) ** n) / total**n),
        "this is the PROXY's value of the chosen answers: return gold's",
        lambda p, g, n: best_of_n_gold(p, p, n),
        "gold is still in its old order: put it in the order of the sorted proxy",
        lambda p, g, n: _expected(
            g, torch.arange(len(g)), lambda i, total: comb(i - 1, n - 1) / comb(total, n)
        ),
        "these are the top n by proxy, averaged: you want the best of a random n",
        lambda p, g, n: g[p.topk(n).indices].mean(),
    ),
)

EXERCISES = (COHEN_KAPPA, CALIBRATION_ERROR, PESSIMISTIC, BEST_OF_N_GOLD)
