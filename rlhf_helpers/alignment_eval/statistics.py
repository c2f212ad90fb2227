"""How sure is a measured number? Intervals, win rates, and how far a judge can be trusted."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from scipy import stats

from rlhf_helpers.preference_data.quality import Estimate, cohen_kappa

# (prompts, firsts, seconds) -> probability (B,) in [0, 1] that the first answer is the better one.
Judge = Callable[[list[str], list[str], list[str]], Any]


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Give Wilson's 95 % interval of a proportion (Wilson 1927).

    successes may be halves, where ties count half.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    Raises ValueError unless 0 <= successes <= n and n > 0.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    p = successes / n
    low, high = proportion_confint(successes, n, method="wilson")
    return float(min(p, low)), float(max(p, high))  # 0 of n and n of n are ends, up to rounding


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Give (mean, low, high), 95 % by Student's t, of independent values; ValueError for fewer than two."""
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or array.size < 2 or not np.isfinite(array).all():
        raise ValueError(f"mean_interval needs at least two finite numbers in a row, got shape {array.shape}")
    half = stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean()), float(array.mean() - half), float(array.mean() + half)


def score_interval(values: ArrayLike) -> Estimate:
    """Mean of independent scores (N,), N >= 2, with `mean_interval`; for scores in [0, 1] within [0, 1].

    Where all are 0, or all 1, Wilson's takes its place: twenty times 1 does not prove always 1. Lesson 3.
    """
    scores = _vector("values", values)
    mean, low, high = mean_interval(scores)
    if scores.min() >= 0 and scores.max() <= 1:
        low, high = max(0.0, low), min(1.0, high)
        if scores.sum() in (0, len(scores)):
            low, high = wilson_interval(scores.sum(), len(scores))
    return Estimate(mean, low, high, len(scores))


def bootstrap_interval(
    *columns: ArrayLike, statistic: Callable[..., float] = np.mean, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """statistic(*columns) with its 95 % percentile bootstrap interval (Efron 1979) over rows.

    columns (N,), N >= 2: what belongs to one row (a prompt) stays together. A resample on which the statistic
    is undefined (NaN) is left out. Rows that are all alike give an interval of no width, which is too good to
    be true: see `win_rate`. Raises ValueError for other shapes or values that are not finite. Lesson 3.
    """
    arrays = [_vector("each column", column) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"columns must be alike, a value a row; got lengths {[len(a) for a in arrays]}")
    options = {"vectorized": False, "paired": True, "method": "percentile", "rng": seed}
    with warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):  # of the NaN
        drawn = stats.bootstrap(arrays, statistic, n_resamples=resamples, **options).bootstrap_distribution
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(float(statistic(*arrays)), float(low), float(high), len(arrays[0]))


@dataclass(frozen=True)
class WinRate:
    """How often the first wins, a tie as one half, with a 95 % interval, and the sign test on n prompts."""

    rate: float
    low: float
    high: float
    p_value: float
    n: int


def win_rate(first_scores: ArrayLike, second_scores: ArrayLike, *, seed: int = 0) -> WinRate:
    """Compare two policies prompt by prompt: first_scores and second_scores (N,) on the same N prompts.

    rate = (wins + ties / 2) / N;  p_value = two-sided binomial test of wins among wins + losses against 1/2

    The interval draws prompts anew; where every prompt ends alike the bootstrap sees no spread, and Wilson's
    takes its place. The test drops ties (Dixon & Mood 1946); all ties: p_value 1. A rate says how often, not
    by how much. Lesson 3. Raises ValueError unless both are (N,), N >= 2, and finite.
    """
    first, second = _vector("first_scores", first_scores), _vector("second_scores", second_scores)
    if first.shape != second.shape:
        raise ValueError(f"win_rate pairs scores by prompt: got {len(first)} first and {len(second)} second")
    won = (np.sign(first - second) + 1) / 2
    found = bootstrap_interval(won, seed=seed)
    low, high = (found.low, found.high) if np.ptp(won) else wilson_interval(won.sum(), len(won))
    wins, decided = int((won == 1).sum()), int((won != 0.5).sum())
    p_value = stats.binomtest(wins, decided).pvalue if decided else 1.0
    return WinRate(found.value, low, high, float(p_value), len(won))


def judge_agreement(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Cohen's kappa of two judges' verdicts (N,) on the same rows, with a bootstrap interval over rows.

    Verdicts are labels: a judge's P(first) > 1/2, say, or "follows the rule". 0 is chance, 1 agreement.
    Lesson 3. Raises what `preference_data.cohen_kappa` does.
    """
    kappa = cohen_kappa(first, second)
    found = bootstrap_interval(first, second, statistic=_kappa)
    return Estimate(kappa, found.low, found.high, found.n)


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    """`cohen_kappa` in plain numpy, for a thousand resamples; NaN where both give one label throughout."""
    by_chance = sum((first == label).mean() * (second == label).mean() for label in np.unique(first))
    return ((first == second).mean() - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


@dataclass(frozen=True)
class PositionBias:
    """flips: share of rows where the verdict goes with the place; lean: mean P(first place) - 1/2."""

    flips: Estimate
    lean: Estimate


def judge_position_bias(judge: Judge, rows: Sequence[Mapping[str, str]]) -> PositionBias:
    """Ask a judge about every row (prompt, first, second) in both orders; see `PositionBias`.

    A judge without bias gives p(a, b) = 1 - p(b, a): lean 0, no flips. To average both orders, as `ai_labels`
    does, takes the lean out, not the noise: where verdicts flip, the average says hardly anything. flips with
    Wilson's interval, lean with a bootstrap's. Zheng et al. 2023. Lesson 3. Raises ValueError for fewer than
    two rows, or a judge whose answer is not (B,) in [0, 1].
    """
    prompts, firsts, seconds = ([row[key] for row in rows] for key in ("prompt", "first", "second"))
    given, swapped = ask_judge(judge, prompts, firsts, seconds), ask_judge(judge, prompts, seconds, firsts)
    lean = bootstrap_interval((given + swapped) / 2 - 0.5)
    return PositionBias(share_of((given - 0.5) * (swapped - 0.5) > 0), lean)


def share_of(outcomes: ArrayLike) -> Estimate:
    """Mean of outcomes (N,), each 0, 1 or, for a tie, 1/2, with Wilson's interval."""
    values = np.asarray(outcomes, dtype=float)
    return Estimate(float(values.mean()), *wilson_interval(values.sum(), len(values)), len(values))


def ask_judge(judge: Judge, prompts: list[str], firsts: list[str], seconds: list[str]) -> np.ndarray:
    """The judge's P(first), (B,) in [0, 1]; raises ValueError for any other answer."""
    found = _numbers(judge(prompts, firsts, seconds))
    if found.shape != (len(prompts),) or not ((found >= 0) & (found <= 1)).all():
        raise ValueError(
            f"a judge must give P(first) in [0, 1] for {len(prompts)} rows, got shape {found.shape}, "
            f"values {found.flatten()[:3]}; turn rewards into sigmoid(difference / temperature)"
        )
    return found


@dataclass(frozen=True)
class Calibration:
    """table: a row a bin (probability, frequency, low, high, n); ece and brier: both 0 at best."""

    table: pd.DataFrame
    ece: float
    brier: float


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> Calibration:
    """Does what is said with probability p happen in a share p of the cases? Both (N,), outcomes 0 or 1.

    ECE = sum_b n_b / N |frequency_b - probability_b| over equal bins of [0, 1];  Brier = mean (p - outcome)^2

    Empty bins have no row; frequencies carry Wilson's interval. True probabilities have an ECE above 0 on a
    sample: state N and bins. Brier 1950; Guo et al. 2017. Lesson 3. Raises ValueError for anything else.
    """
    said, came = _vector("probabilities", probabilities), _vector("outcomes", outcomes)
    if said.shape != came.shape or said.min() < 0 or said.max() > 1 or not np.isin(came, (0, 1)).all():
        raise ValueError(
            f"calibration needs probabilities in [0, 1] and as many outcomes 0 or 1, got {len(said)} from "
            f"{said.min():.3g} to {said.max():.3g} and {len(came)} of {np.unique(came)[:4]}"
        )
    frame = pd.DataFrame({"probability": said, "frequency": came})
    place = pd.cut(said, np.linspace(0, 1, bins + 1), labels=False, include_lowest=True)
    table = frame.groupby(place).mean().assign(n=frame.groupby(place).size()).reset_index(drop=True)
    ends = [wilson_interval(f * n, int(n)) for f, n in zip(table["frequency"], table["n"], strict=True)]
    table[["low", "high"]] = ends
    ece = np.average((table["frequency"] - table["probability"]).abs(), weights=table["n"])
    return Calibration(table, float(ece), float(((said - came) ** 2).mean()))


def estimates(rows: Mapping[str, Estimate]) -> pd.DataFrame:
    """Name -> value, low, high, n as a table, a row a name."""
    return pd.DataFrame([vars(e) for e in rows.values()], index=list(rows))


def _numbers(values: ArrayLike | torch.Tensor) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=float)


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    array = _numbers(values)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be (N,) finite numbers, N >= 2; got shape {array.shape}: {array[:3]}")
    return array
