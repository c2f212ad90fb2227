"""How labels and rewards are measured: agreement, calibration, a cautious ensemble, best-of-n."""

from math import comb

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from rlhf_helpers.core.tensors import as_bool_mask, require_number, require_shapes
from rlhf_helpers.lab.exercises.exercise import exercise, table


def _kappa(observed: Tensor, chance: Tensor | float) -> Tensor:
    return (observed - chance) / (1 - chance)


def _both(p: Tensor, q: Tensor) -> Tensor:
    """Chance that two people with these shares of ones say the same."""
    return p * q + (1 - p) * (1 - q)


def cohen_kappa(first: Tensor, second: Tensor) -> Tensor:
    """Agreement of two annotators beyond chance: (observed - chance) / (1 - chance).

    first, second: 0/1 labels (N,); with shares of ones p and q, chance = p q + (1 - p)(1 - q). Returns a
    scalar, NaN when chance is 1. Raises ValueError for shapes that differ and other labels. Cohen 1960.
    Lesson 1.
    """
    require_shapes("N", first=first, second=second)
    first, second = as_bool_mask(first, "first").double(), as_bool_mask(second, "second").double()
    return _kappa((first == second).double().mean(), _both(first.mean(), second.mean()))


def _members(confidence: Tensor, bins: int) -> Tensor:
    """1 where answer n lies in bin k, (N, bins)."""
    return F.one_hot((confidence * bins).long().clamp(max=bins - 1), bins).to(confidence)


def _mean_gap(error: Tensor, members: Tensor) -> Tensor:
    return (error @ members).abs().sum() / len(error)


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
    return _mean_gap(correct - confidence, _members(confidence, bins))


@torch.no_grad()
def pessimistic(rewards: Tensor, penalty: float) -> Tensor:
    """Reward of a cautious ensemble: mean - penalty * variance, both over the M members, both divided by M.

    rewards (M, B); returns (B,) without gradient. Raises ValueError for another shape or a penalty that is
    not finite. Coste 2023, uncertainty-weighted optimisation. Lesson 1.
    """
    require_shapes("M B", rewards=rewards)
    require_number("penalty", penalty)
    return rewards.mean(0) - penalty * rewards.var(0, correction=0)


def _weighted(ranked: Tensor, n: int, *, below: int = 0, partners: int) -> Tensor:
    """Sum of gold values in an order, the i-th times C(i + below, partners) / C(N, n), i from 0."""
    weights = [comb(i + below, partners) for i in range(len(ranked))]
    return ranked @ tensor(weights).to(ranked) / comb(len(ranked), n)


@torch.no_grad()
def best_of_n_gold(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Expected gold value of the best of n by proxy, unbiased, from N samples.

    sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold_(i), sorted ascending by the proxy: of the C(N, n) subsets,
    C(i-1, n-1) have sample i as their best. proxy, gold (N,), no ties in proxy; returns a scalar without
    gradient. Raises ValueError for shapes that differ and n outside 1..N. Lesson 1.
    """
    require_shapes("N", proxy=proxy, gold=gold)
    require_number("n", n, at_least=1, at_most=len(proxy))
    return _weighted(gold[proxy.argsort()], n, partners=n - 1)


REWARDS = tensor([[1.0, 0.2, -0.5, 2.5], [1.4, -0.9, -0.3, 1.0], [0.3, 0.8, -0.6, 4.1]])

PROXY = tensor([0.3, 1.9, -0.4, 1.2, 0.8, 2.6])
GOLD = tensor([0.35, 0.9, 0.1, 0.6, 0.75, 0.2])  # the proxy's favourite is not the best
EQUAL = tensor([0.6, 0.2, 0.75, 0.2, 0.5])  # two answers are equally good

EXERCISES = {
    "cohen_kappa": exercise(
        cohen_kappa,
        table(
            ([1, 1, 1, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]),
            ([1, 1, 1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1]),  # below chance
        ),
        "this is the raw agreement: two people who only guess agree as well, by chance",
        lambda observed: observed,
        "chance is not always 0.5: two people who nearly always say 1 agree by chance far more often",
        lambda observed: _kappa(observed, 0.5),
        "chance was computed from ONE annotator's labels: each of them has a share of ones",
        lambda observed, p: _kappa(observed, _both(p, p)),
        lambda observed, q: _kappa(observed, _both(q, q)),
        "both shares were pooled into one: that is Scott's pi; Cohen keeps each annotator's own",
        lambda observed, p, q: _kappa(observed, _both((p + q) / 2, (p + q) / 2)),
        "chance counts only both saying 1: both saying 0 is agreement too",
        lambda observed, p, q: _kappa(observed, p * q),
        "that is how often they DISAGREE by chance",
        lambda observed, chance: _kappa(observed, 1 - chance),
        "the denominator is wrong: divide by 1 - chance, what chance leaves to be gained",
        lambda observed, chance: observed - chance,
        lambda observed, chance: (observed - chance) / (1 - observed),
        lambda observed, chance: (observed - chance) / chance,
        "this is the correlation of the labels: it ignores that one annotator says 1 more often",
        lambda first, second: torch.corrcoef(torch.stack([first, second]).double())[0, 1],
        "this is a Python number: return a tensor of shape (), without .item() or float()",
        lambda right: right.item(),
        observed=lambda first, second: (first == second).double().mean(),
        p=lambda first: first.double().mean(),
        q=lambda second: second.double().mean(),
        chance=_both,
    ),
    "calibration_error": exercise(
        calibration_error,
        table(  # no confidence lies on an edge between two bins: the statement leaves the side open
            (
                [0.52, 0.58, 0.63, 0.71, 0.74, 0.77, 0.85, 0.93, 0.97, 1.0],
                [1.0, 0, 0, 1, 0, 1, 1, 1, 1, 0],
                10,  # the lower five bins are empty
            ),
            ([0.12, 0.31, 0.38, 0.66, 0.92, 0.87], [1.0, 0, 0, 1, 0, 1], 3),
            ([0.0, 0.13, 0.4, 0.55, 0.8], [1.0, 0, 1, 0, 0], 4),
        ),
        "the bins were averaged as equals: a bin with more answers must weigh more",
        lambda gaps: gaps.nanmean(),
        lambda gaps: gaps.nansum() / len(gaps),
        "over- and underconfident bins cancel, which leaves the gap of the whole set: add up absolute gaps",
        lambda error: error.mean(),
        lambda error: -error.mean(),
        lambda error: error.mean().abs(),
        "this is the LARGEST gap (maximum calibration error), not the expected one",
        lambda gaps: gaps.nan_to_num().max(),
        "an empty bin gave 0 / 0, and NaN spoils the sum: leave empty bins out",
        lambda shares, gaps: shares @ gaps,
        "the gaps were squared: small ones nearly vanish, and the unit is no longer a probability",
        lambda shares, gaps: (shares * gaps**2).nansum(),
        lambda shares, gaps: (shares * gaps**2).nansum().sqrt(),
        "the bins are not used: a single answer with confidence 0.7 is right or wrong, never 0.7 right",
        lambda error: error.abs().mean(),
        "the middle of the bin stands in for its mean confidence: take the mean",
        lambda correct, members, bins: _mean_gap(correct - (members.argmax(1) + 0.5) / bins, members),
        "confidence 1 fell out of the last bin, where it belongs",
        lambda error, members, confidence: _mean_gap(error * (confidence < 1), members),
        "confidence 0 fell out of the first bin, where it belongs",
        lambda error, members, confidence: _mean_gap(error * (confidence > 0), members),
        members=_members,
        error=lambda confidence, correct: correct - confidence,
        shares=lambda members: members.mean(0),
        gaps=lambda error, members: (error @ members).abs() / members.sum(0),
    ),
    "pessimistic": exercise(
        pessimistic,
        [(REWARDS, 0.5), (REWARDS[1:], 2.0), (REWARDS.T, 1.0)],
        "the wrong dimension: members are the rows (dim 0); return one value per answer, shape (B,)",
        lambda rewards, penalty: rewards.mean(1) - penalty * rewards.var(1, correction=0),
        lambda rewards, penalty: rewards.mean(1) - penalty * rewards.var(1),
        "this is the standard deviation, not its square, the variance",
        lambda mean, penalty, sample_variance: mean - penalty * sample_variance.sqrt(),
        lambda mean, penalty, variance: mean - penalty * variance.sqrt(),
        "the sign is flipped: disagreement between the members is rewarded",
        lambda mean, penalty, variance: mean + penalty * variance,
        lambda mean, penalty, sample_variance: mean + penalty * sample_variance,
        "this is the smallest member (worst case), which ignores the penalty",
        lambda rewards: rewards.amin(0),
        "one variance was taken for the whole batch: each answer has its own, over the members",
        lambda mean, penalty: mean - penalty * mean.var(),
        lambda mean, penalty, rewards: mean - penalty * rewards.var(),
        lambda mean, penalty, rewards: mean - penalty * rewards.var(correction=0),
        "the penalty also multiplies the mean: it belongs to the variance alone",
        lambda mean, penalty, variance: penalty * (mean - variance),
        lambda mean, penalty, right: right - penalty * mean,
        "this is the sample variance (divided by M - 1, the default of var): divide by M",
        lambda mean, penalty, sample_variance: mean - penalty * sample_variance,
        "the penalty never enters: multiply the variance by it",
        lambda mean, variance: mean - variance,
        "this is the plain mean: nothing is subtracted where the members disagree",
        lambda mean: mean,
        mean=lambda rewards: rewards.mean(0),
        variance=lambda rewards: rewards.var(0, correction=0),
        sample_variance=lambda rewards: rewards.var(0),
    ),
    "best_of_n_gold": exercise(
        best_of_n_gold,
        [
            (PROXY, GOLD, 2),
            (PROXY, GOLD, 4),
            (PROXY[:5], EQUAL, 3),
            (PROXY[:5], GOLD[1:], 1),
            (PROXY[1:], EQUAL, 5),
        ],
        "gold chose the samples: best-of-n knows only the proxy, and gold is looked up afterwards",
        lambda gold, n: best_of_n_gold(gold, gold, n),
        lambda gold: gold.max(),
        "the order is descending: the weights of the best went to the worst by proxy",
        lambda proxy, gold, n: best_of_n_gold(-proxy, gold, n),
        "an index is off by one: i counts from 1, and sample i needs n - 1 partners among the i - 1 below it",
        lambda ranked, n: _weighted(ranked, n, below=1, partners=n),
        lambda ranked, n: _weighted(ranked, n, partners=n),
        lambda ranked, n: _weighted(ranked, n, below=1, partners=n - 1),
        "only the first n samples were used: average over every subset of size n",
        lambda proxy, gold, n: gold[proxy[:n].argmax()],
        "n never enters: the mean of gold is best of 1, and gold at the largest proxy is best of all N",
        lambda gold: gold.mean(),
        lambda proxy, gold: gold[proxy.argmax()],
        "no sample is drawn twice: there are C(N, n) subsets, not N^n",
        lambda right, gold, n: right * comb(len(gold), n) / len(gold) ** n,
        lambda ranked, n: ranked @ (torch.arange(len(ranked) + 1) ** n).diff().to(ranked) / len(ranked) ** n,
        "this is the PROXY's value of the chosen answers: return gold's",
        lambda proxy, n: best_of_n_gold(proxy, proxy, n),
        "gold is still in its old order: put it in the order of the sorted proxy",
        lambda gold, n: _weighted(gold, n, partners=n - 1),
        "these are the top n by proxy, averaged: you want the best of a random n",
        lambda proxy, gold, n: gold[proxy.topk(n).indices].mean(),
        ranked=lambda proxy, gold: gold[proxy.argsort()],
    ),
}
