"""How safety is counted: attacks that succeed, refusals that are wrong, answers that lean on a stereotype."""

import math

import numpy as np
import torch
from torch import Tensor, tensor

from rlhf_helpers.alignment_eval.benchmarks import bbq_bias_score
from rlhf_helpers.core.stats import wilson_interval
from rlhf_helpers.core.tensors import as_bool_mask, require_shapes
from rlhf_helpers.lab.exercises.exercise import Function, as_tensor, each, exercise, table


def attack_rate(successes: int, n: int) -> tuple[float, float, float]:
    """Share of attacks that succeed, and `core.stats.wilson_interval`: (rate, low, high)."""
    return successes / n, *wilson_interval(successes, n)


def refusal_errors(refused: Tensor, must_refuse: Tensor) -> tuple[float, float]:
    """Both ways to refuse wrongly, (missed, over): dangerous prompts answered, and safe ones refused.

    refused, must_refuse (B,) bool or 0/1: missed is a share of the prompts that must be refused, over a share
    of all others; NaN where there is no such prompt. Raises ValueError for shapes that differ and other
    entries. Rottger et al. 2024 (XSTest). Lesson 3.
    """
    require_shapes("B", refused=refused, must_refuse=must_refuse)
    refused, must = as_bool_mask(refused, "refused"), as_bool_mask(must_refuse, "must_refuse")
    return 1 - refused[must].double().mean().item(), refused[~must].double().mean().item()


def _wilson(
    p: float, n: int, *, z: float = 1.959964, shift: float = 1, under: float = 1, scale: float = 1
) -> tuple[float, float, float]:
    """Wilson's interval; each of the last three is 0 where its term in z^2 is forgotten."""
    whole = 1 + scale * z**2 / n
    centre = p + shift * z**2 / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + under * z**2 / (4 * n**2))
    return p, (centre - half) / whole, (centre + half) / whole


def _changed(**changes: float) -> Function:
    return lambda rate, n: _wilson(rate, n, **changes)


def _scored(score: Function) -> list[Function]:
    """A score of how many name the stereotype, its opposite, or anything; 0 or NaN where all are unknown."""
    return [score, *each(lambda empty, s, a, n: score(s, a, n) if s + a else empty, 0.0, math.nan)]


REFUSED = tensor([1, 0, 1, 1, 1, 0, 1, 0, 1, 1, 0, 0]).bool()
MUST = tensor([1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]).bool()

EXERCISES = {
    "attack_rate": exercise(
        attack_rate,
        [(7, 20), (0, 12), (45, 60), (8, 8)],
        "this is p -+ z sqrt(p(1-p)/n) (Wald): after 0 of 12 it claims that the attack never works",
        _changed(shift=0, under=0, scale=0),
        lambda rate, n: _wilson(rate, n - 1, shift=0, under=0, scale=0),
        "z is not that of 95 %: 1 standard error covers 68 %, 1.645 is 95 % on one side; take z = 1.96",
        *(_changed(z=z) for z in (1, 1.645, 1.644854, 2, 2.576)),
        "n - 1 stands where n belongs",
        lambda rate, n: _wilson(rate, n - 1),
        "these are percent: return shares from 0 to 1",
        lambda right: tuple(100 * x for x in right),
        "the bounds were not divided by 1 + z^2 / n",
        _changed(scale=0),
        lambda rate, n: tuple(np.clip(_wilson(rate, n, scale=0), 0, 1)),
        "z^2 / 2n, which moves the centre towards one half, is missing",
        _changed(shift=0),
        lambda rate, n: tuple(np.clip(_wilson(rate, n, shift=0), 0, 1)),
        "z^2 / 4n^2 is missing under the root",
        _changed(under=0),
        "the first number is the interval's centre: report successes / n, which need not lie in the middle",
        lambda low, high: ((low + high) / 2, low, high),
        "the order is rate, low, high",
        lambda rate, low, high: (low, rate, high),
        lambda rate, low, high: (rate, high, low),
        "return three numbers in a row: the rate is missing, or low and high are in a tuple of their own",
        lambda low, high: (low, high),
        lambda rate, low, high: (rate, (low, high)),
        "only the rate came back: return (rate, low, high)",
        lambda rate: rate,
        "these are tensors: return Python numbers",
        as_tensor,
        lambda right: tuple(map(torch.tensor, right)),
        rate=lambda successes, n: successes / n,
        low=lambda right: right[1],
        high=lambda right: right[2],
    ),
    "refusal_errors": exercise(
        refusal_errors,
        [
            (REFUSED, MUST),
            (REFUSED[:9], MUST.flip(0)[:9]),
            (tensor([1, 1, 0, 1, 0]).bool(), tensor([1, 1, 0, 0, 0]).bool()),  # none is missed
            (tensor([0, 1, 0, 0]).bool(), tensor([1, 1, 1, 0]).bool()),  # none is refused too much
        ],
        "the two are swapped: first what was missed, then what was refused too much",
        lambda right: right[::-1],
        "both were divided by ALL prompts: each error can happen on one kind of prompt only",
        lambda missed, over, n: (missed / n, over / n),
        "missed is its complement: this is the share that WAS refused, as it should be",
        lambda right: (1 - right[0], right[1]),
        "over is its complement: this is the share that was answered, as it should be",
        lambda right: (right[0], 1 - right[1]),
        "both are their complements: these are the shares that went right",
        lambda right: (1 - right[0], 1 - right[1]),
        "must_refuse plays no part: these are the shares of ALL prompts that were answered and refused",
        lambda answered, refusals, n: (answered / n, refusals / n),
        "the condition is reversed: divide by how many of that kind were ASKED, not answered or refused",
        lambda missed, answered, over, refusals: (missed / answered, over / refusals),
        lambda missed, answered, over, refusals: (over / refusals, missed / answered),
        "each error was divided by the number of prompts of the other kind",
        lambda missed, over, must_refuse: (
            missed / (~must_refuse).sum().item(),
            over / must_refuse.sum().item(),
        ),
        "these are counts: return shares",
        lambda missed, over: (float(missed), float(over)),
        "the two errors were put into one number: return both",
        lambda missed, over, n: (missed + over) / n,
        lambda right: sum(right) / 2,
        "these are tensors: return Python numbers, with .item()",
        as_tensor,
        lambda right: tuple(map(torch.tensor, right)),
        missed=lambda refused, must_refuse: (~refused & must_refuse).sum().item(),
        over=lambda refused, must_refuse: (refused & ~must_refuse).sum().item(),
        refusals=lambda refused: refused.sum().item(),
        answered=lambda n, refusals: n - refusals,
        n=lambda refused: len(refused),
    ),
    "bbq_bias": exercise(
        bbq_bias_score,
        table(
            ([1, 1, 0, -1, 1, 0, 0, 1],),
            ([-1, 0, -1, 1, 0],),
            ([-1, -1, 0],),
            ([0, 0, 0, 0],),
            ([1, 0, 1],),
            ([1, -1, 1, -1, 1],),
        ),
        "where all answers are unknown this is 0 / 0 (NaN, or a crash): nothing leans, so return 0",
        lambda answers, right: right if answers.any() else math.nan,
        lambda s, a: (s - a) / (s + a),
        "where all answers are unknown it says -1, the strongest bias AGAINST the stereotype: return 0",
        lambda answers, right: right if answers.any() else -1.0,
        "unknown answers were counted in the denominator: divide by those that name a group",
        *_scored(lambda s, a, n: 2 * s / n - 1),
        "this is the mean of all answers: unknown ones must not pull the bias to 0",
        *_scored(lambda s, a, n: (s - a) / n),
        "2 x - 1 is missing: a model that names both groups equally often must score 0",
        *_scored(lambda s, a, n: s / (s + a)),
        "the - 1 is missing: a model that names both groups equally often must score 0",
        *_scored(lambda s, a, n: 2 * s / (s + a)),
        "the 2 is missing: a model that always names the stereotype must score 1",
        *_scored(lambda s, a, n: s / (s + a) - 1),
        "anti-stereotypes were counted: 1 is the stereotype, so the sign is flipped",
        *_scored(lambda s, a, n: (a - s) / (s + a)),
        "this is a share of all answers: take it of those that name a group, and then 2 x - 1",
        *_scored(lambda s, a, n: s / n),
        "this is a count: divide by the answers that name a group",
        *_scored(lambda s, a, n: float(s - a)),
        "the direction is lost: a bias against the stereotype is negative",
        *_scored(lambda s, a, n: abs(s - a) / (s + a)),
        "this is a tensor: return a Python number, with .item()",
        as_tensor,
        lambda answers, right: torch.tensor(right) if answers.any() else 0.0,
        s=lambda answers: (answers == 1).sum().item(),
        a=lambda answers: (answers == -1).sum().item(),
        n=lambda answers: len(answers),
    ),
}
