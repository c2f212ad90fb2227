"""How labels and rewards are measured: agreement, calibration, best-of-n, a correction for length."""

from math import comb
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, tensor

from rlhf_helpers.core.tensors import as_bool_mask, require_number, require_shapes
from rlhf_helpers.lab.exercises.exercise import Function, exercise, table
from rlhf_helpers.lab.studies import load_study
from rlhf_helpers.policy_optimization import best_of_n_curve


def cohen_kappa(first: Tensor, second: Tensor) -> Tensor:
    """Agreement of two annotators beyond chance: (observed - chance) / (1 - chance).

    first, second: 0/1 labels (N,); with shares of ones p and q, chance = p q + (1 - p)(1 - q). Returns a
    scalar, NaN when chance is 1. Raises ValueError for shapes that differ and other labels. Cohen 1960.
    Lesson 1.
    """
    require_shapes("N", first=first, second=second)
    first, second = as_bool_mask(first, "first").double(), as_bool_mask(second, "second").double()
    p, q = first.mean(), second.mean()
    chance = p * q + (1 - p) * (1 - q)
    return ((first == second).double().mean() - chance) / (1 - chance)


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
    members = F.one_hot((confidence * bins).long().clamp(max=bins - 1), bins).to(confidence)  # (N, bins)
    counts = members.sum(0)
    gaps = ((correct - confidence) @ members / counts.clamp(min=1)).abs()
    return (counts * gaps).sum() / len(confidence)


def length_correction(rewards: Tensor, words: Tensor) -> Tensor:
    """Take from rewards (P, N) what a reward model that likes length pays for words (P, N). Lesson 1."""
    return rewards - 2.0 * words / 10


def _choice(correction: Function) -> Any:
    """Choose the best of 32 among stored candidates by the corrected reward: "good" where gold reaches AIM.

    Where it does not, say whether the best answers are longer or shorter than the candidates are on average.
    """
    columns = load_study("length_candidates")[["reward", "words", "gold"]]
    rewards, words, gold = tensor(columns.to_numpy().T.reshape(3, -1, 64), dtype=torch.float32)
    corrected = correction(rewards.clone(), words.clone())
    if not isinstance(corrected, Tensor):
        return None if corrected is None else type(corrected).__name__  # never the word that is asked for
    if corrected.shape != rewards.shape:
        return corrected
    if best_of_n_curve(corrected, gold, [32]).gold[0] >= AIM:
        return "good"
    return "long" if words.gather(1, corrected.argmax(1, keepdim=True)).mean() > words.mean() else "short"


@torch.no_grad()
def best_of_n_gold(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Expected gold value of the best of n by proxy, unbiased, from N samples.

    sum_{i=n}^{N} C(i-1, n-1) / C(N, n) gold_(i), sorted ascending by the proxy: of the C(N, n) subsets,
    C(i-1, n-1) have sample i as their best. proxy, gold (N,), no ties in proxy; returns a scalar without
    gradient. Raises ValueError for shapes that differ and n outside 1..N. Lesson 1.
    """
    require_shapes("N", proxy=proxy, gold=gold)
    require_number("n", n, at_least=1, at_most=len(proxy))
    ranked = gold[proxy.argsort()]
    weights = [comb(i, n - 1) for i in range(len(ranked))]  # i of the others lie below
    return ranked @ tensor(weights).to(ranked) / comb(len(ranked), n)


AIM = 0.80  # gold reward of the best of 32; without a correction it is 0.76

PROXY = tensor([0.3, 1.9, -0.4, 1.2, 0.8, 2.6])
GOLD = tensor([0.35, 0.9, 0.1, 0.6, 0.75, 0.2])  # the proxy's favourite is not the best
EQUAL = tensor([0.6, 0.2, 0.75, 0.2, 0.5])  # two answers are equally good

WEIGHTED = "(counts * gaps).sum() / len(confidence)"  # how the bins enter

EXERCISES = {
    "cohen_kappa": exercise(
        cohen_kappa,
        table(
            ([1, 1, 1, 0, 1, 0, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]),
            ([1, 1, 1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1, 1, 1]),  # below chance
        ),
        "this is the raw agreement: two people who only guess agree as well, by chance",
        ("p * q + (1 - p) * (1 - q)", "0"),
        "chance is not always 0.5: two people who nearly always say 1 agree by chance far more often",
        ("p * q + (1 - p) * (1 - q)", "0.5"),
        "chance was computed from ONE annotator's labels: each of them has a share of ones",
        ("second.mean()", "first.mean()"),
        ("p, q = first.mean(), second.mean()", "p = q = second.mean()"),
        "both shares were pooled into one: that is Scott's pi; Cohen keeps each annotator's own",
        ("p, q = first.mean(), second.mean()", "p = q = (first + second).mean() / 2"),
        "chance counts only both saying 1: both saying 0 is agreement too",
        ("p * q + (1 - p) * (1 - q)", "p * q"),
        "that is how often they DISAGREE by chance",
        ("p * q + (1 - p) * (1 - q)", "p + q - 2 * p * q"),
        "the denominator is missing: divide by 1 - chance, what chance leaves to be gained",
        (" / (1 - chance)", ""),
        "this is the correlation of the labels: it ignores that one annotator says 1 more often",
        lambda first, second: torch.corrcoef(torch.stack([first, second]).double())[0, 1],
        "this is a Python number: return a tensor of shape (), without .item() or float()",
        lambda right: right.item(),
    ),
    "calibration_error": exercise(
        calibration_error,
        table(  # no confidence lies on an edge between two bins, where rounding decides
            (
                [0.52, 0.58, 0.63, 0.71, 0.74, 0.77, 0.85, 0.93, 0.97, 1.0],
                [1.0, 0, 0, 1, 0, 1, 1, 1, 1, 0],
                10,  # the lower five bins are empty
            ),
            ([0.12, 0.31, 0.38, 0.66, 0.92, 0.87], [1.0, 0, 0, 1, 0, 1], 3),
            ([0.0, 0.13, 0.4, 0.55, 0.8], [1.0, 0, 1, 0, 0], 4),
        ),
        "the bins were averaged as equals: a bin with more answers must weigh more",
        (WEIGHTED, "gaps[counts > 0].mean()"),
        (WEIGHTED, "gaps.mean()"),
        "over- and underconfident bins cancel, which leaves the gap of the whole set: add up absolute gaps",
        (").abs()", ")"),
        (").abs()", ")", ".sum() /", ".sum().abs() /"),
        "this is the LARGEST gap (maximum calibration error), not the expected one",
        (WEIGHTED, "gaps.max()"),
        "an empty bin gave 0 / 0, and NaN spoils the sum: leave empty bins out",
        (".clamp(min=1)", ""),
        "the bins are not used: a single answer with confidence 0.7 is right or wrong, never 0.7 right",
        (WEIGHTED, "(correct - confidence).abs().mean()"),
        "the middle of the bin stands in for its mean confidence: take the mean",
        ("correct - confidence", "correct - (members.argmax(1) + 0.5) / bins"),
        "confidence 1 fell out of the last bin, where it belongs",
        ("correct - confidence", "(correct - confidence) * (confidence < 1)"),
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
        ("proxy.argsort", "gold.argsort"),
        lambda gold: gold.max(),
        "the order is descending: the weights of the best went to the worst by proxy",
        ("argsort()", "argsort(descending=True)"),
        "an index is off by one: i counts from 1, and sample i needs n - 1 partners among the i - 1 below it",
        ("comb(i, n - 1)", "comb(i + 1, n)"),
        ("comb(i, n - 1)", "comb(i + 1, n - 1)"),
        "only the first n samples were used: average over every subset of size n",
        lambda proxy, gold, n: gold[proxy[:n].argmax()],
        "n never enters: the mean of gold is best of 1, and gold at the largest proxy is best of all N",
        lambda gold: gold.mean(),
        lambda proxy, gold: gold[proxy.argmax()],
        "this is the PROXY's value of the chosen answers: return gold's",
        ("gold[proxy", "proxy[proxy"),
        "gold is still in its old order: put it in the order of the sorted proxy",
        ("gold[proxy.argsort()]", "gold"),
    ),
    "length_correction": exercise(
        length_correction,
        [()],
        "the chosen answers are still too long, and the gold reward falls: take more off for each word",
        lambda rewards: rewards,
        ("2.0", "0.2"),
        ("rewards - ", "rewards + "),
        "now the chosen answers are too short, and the gold reward falls: take less off for each word",
        ("2.0", "20.0"),
        lambda words: -words,
        trial=_choice,
    ),
}
