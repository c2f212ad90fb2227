"""How sure is a measured number? Every interval, kappa, calibration and win rate of the package.

Intervals are 95 %. Values are (N,) arrays or tensors.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Read as 0.612 [0.588, 0.636], n = 1600."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], n = {self.n}"


def to_frame(rows: Mapping[str, Estimate]) -> pd.DataFrame:
    """Tabulate name -> estimate as value, low, high and n, one row per name."""
    return pd.DataFrame([vars(row) for row in rows.values()], index=list(rows))


# ---- intervals


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Give Wilson's interval of a proportion (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)

    Args:
        successes: May be halves, where ties count half.
        n: Number of trials.

    Raises:
        ValueError: not 0 <= successes <= n, or n is not positive.
    """
    from statsmodels.stats.proportion import proportion_confint

    if not (n > 0 and 0 <= successes <= n):
        raise ValueError(f"wilson_interval needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    p = successes / n
    low, high = proportion_confint(successes, n, method="wilson")
    # 0 of n and n of n are ends, up to rounding.
    return float(min(p, low)), float(max(p, high))  # pyright: ignore[reportArgumentType]


def proportion(outcomes: ArrayLike) -> Estimate:
    """Estimate the mean of outcomes (N,), each 0, 1 or, for a tie, 1/2, with Wilson's interval."""
    values = numbers(outcomes)
    low, high = wilson_interval(values.sum(), len(values))
    return Estimate(float(values.mean()), low, high, len(values))


def mean_interval(values: ArrayLike) -> tuple[float, float, float]:
    """Give (mean, low, high), by Student's t, of independent values (N,).

    Raises:
        ValueError: there are fewer than two values, or one is not finite.
    """
    array = _vector("values", values)
    mean = array.mean()
    half = stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return float(mean), float(mean - half), float(mean + half)


def prediction_interval(values: ArrayLike) -> tuple[float, float]:
    """Predict where one further run falls: mean -+ t_(n-1) s sqrt(1 + 1/n) of n independent runs (N,).

    Wider than the interval of the mean, which says nothing about a single run. Raises what `mean_interval`
    does.
    """
    mean, low, _ = mean_interval(values)
    # mean - low is t s / sqrt(n).
    reach = (mean - low) * math.sqrt(len(numbers(values)) + 1)
    return mean - reach, mean + reach


def score_interval(values: ArrayLike) -> Estimate:
    """Estimate the mean of independent scores (N,), N >= 2, with `mean_interval`. Lesson 3.

    For scores in [0, 1] the interval stays within [0, 1]. Where all are 0, or all 1, Wilson's takes its
    place: twenty times 1 does not prove always 1.
    """
    scores = _vector("values", values)
    mean, low, high = mean_interval(scores)
    if scores.min() >= 0 and scores.max() <= 1:
        low, high = max(0.0, low), min(1.0, high)
        if scores.sum() in (0, len(scores)):
            low, high = wilson_interval(scores.sum(), len(scores))
    return Estimate(mean, low, high, len(scores))


def bootstrap_interval(
    *columns: ArrayLike, statistic: Callable[..., float] = np.mean, seed: int = 0
) -> Estimate:
    """Estimate statistic(*columns) with its percentile bootstrap interval (Efron 1979) over rows. Lesson 3.

    Rows are drawn anew a thousand times. A resample on which the statistic is undefined (NaN) is left out.
    Rows that are all alike give an interval of no width, which is too good to be true: see `win_rate`.

    Args:
        *columns: (N,) each, N >= 2: what belongs to one row (a prompt) stays together.
        statistic: Function of the columns.
        seed: Seed of the draws.

    Raises:
        ValueError: the columns have other shapes, or hold values that are not finite.
    """
    arrays = [_vector("each column", column) for column in columns]
    if len({len(array) for array in arrays}) != 1:
        raise ValueError(f"columns must be alike, one value per row; got lengths {[len(a) for a in arrays]}")
    options = {"vectorized": False, "paired": True, "method": "percentile", "rng": seed}
    with warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):  # of the NaN
        drawn = stats.bootstrap(arrays, statistic, n_resamples=1000, **options).bootstrap_distribution
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(float(statistic(*arrays)), float(low), float(high), len(arrays[0]))


def fisher_interval(rho: float, variance: float, n: int) -> Estimate:
    """Give a correlation of n rows with tanh(atanh(rho) -+ 1.96 sqrt(variance)) (Fisher 1921).

    Of width 0 at rho = +-1; NaN where the variance is, for too few rows.
    """
    with np.errstate(divide="ignore"):
        middle = np.arctanh(np.clip(rho, -1, 1))
    reach = stats.norm.ppf(0.975) * math.sqrt(variance)
    low, high = np.tanh([middle - reach, middle + reach])
    return Estimate(float(rho), float(low), float(high), n)


@dataclass(frozen=True)
class WinRate:
    """How often the first wins, a tie as one half, with its interval, and the sign test on n prompts."""

    rate: float
    low: float
    high: float
    p_value: float
    n: int

    @property
    def estimate(self) -> Estimate:
        """The rate with its interval, without the test."""
        return Estimate(self.rate, self.low, self.high, self.n)


def win_rate(first_scores: ArrayLike, second_scores: ArrayLike) -> WinRate:
    """Compare two policies prompt by prompt: first_scores and second_scores (N,) on the same N prompts.

    rate = (wins + ties / 2) / N;  p_value = two-sided binomial test of wins among wins + losses against 1/2

    The interval draws prompts anew; where every prompt ends alike the bootstrap sees no spread, and Wilson's
    takes its place. The test drops ties (Dixon & Mood 1946); all ties: p_value 1. A rate says how often, not
    by how much. Lesson 3.

    Raises:
        ValueError: the two are not both (N,), N >= 2, and finite.
    """
    first = _vector("first_scores", first_scores)
    second = _vector("second_scores", second_scores)
    if first.shape != second.shape:
        raise ValueError(f"win_rate pairs scores by prompt: got {len(first)} first and {len(second)} second")
    won = (np.sign(first - second) + 1) / 2
    result = bootstrap_interval(won) if np.ptp(won) else proportion(won)
    wins = int((won == 1).sum())
    decided = int((won != 0.5).sum())
    p_value = stats.binomtest(wins, decided).pvalue if decided else 1.0
    return WinRate(result.value, result.low, result.high, float(p_value), len(won))


# ---- agreement


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Measure the agreement of two people beyond chance: kappa = (p_o - p_e) / (1 - p_e), in [-1, 1].

    p_o is the share of rows on which they agree, p_e = sum_k p1(k) p2(k) what two people with their habits
    would agree on by chance (Cohen 1960). Lesson 1.

    Args:
        first: Labels (N,) of one.
        second: Labels (N,) of the other.

    Raises:
        ValueError: lengths differ, a label is NaN, or both give one and the same label throughout.
    """
    return float(_kappa(*panel(np.stack([first, second], axis=1)).T))


def judge_agreement(first: ArrayLike, second: ArrayLike) -> Estimate:
    """Estimate `cohen_kappa` of two judges' verdicts (N,) on the same rows, by a bootstrap over rows.

    Verdicts are labels: a judge's P(first) > 1/2, say, or "follows the rule". 0 is chance, 1 agreement.
    Lesson 3. Raises what `cohen_kappa` does.
    """
    first, second = panel(np.stack([first, second], axis=1)).T
    return bootstrap_interval(first, second, statistic=_kappa)


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Compute kappa for a thousand resamples (sklearn takes 6 ms each); NaN where both give one label."""
    agreed = (first == second).mean()
    by_chance = sum((first == label).mean() * (second == label).mean() for label in np.unique(first))
    return (agreed - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def fleiss_kappa(labels: ArrayLike) -> float:
    """Measure the agreement of R people beyond chance: kappa = (P - P_e) / (1 - P_e) (Fleiss 1971).

    P is the mean share of agreeing pairs of people, P_e = sum_k p(k)^2 with p(k) the share of label k among
    all. Lesson 1.

    Args:
        labels: (N, R), all given.

    Raises:
        ValueError: a label is NaN, or all are alike.
    """
    from statsmodels.stats import inter_rater

    return float(inter_rater.fleiss_kappa(inter_rater.aggregate_raters(panel(labels))[0]))


def krippendorff_alpha(labels: ArrayLike) -> float:
    """Measure agreement where labels may be missing: alpha = 1 - D_o / D_e, nominal scale.

    D_o is the observed disagreement, D_e the one expected by chance.

    1 is full agreement, 0 chance (Krippendorff 2011). Lesson 1.

    Args:
        labels: (N, R); NaN: not labelled.

    Raises:
        ValueError: labels are all alike.
    """
    import krippendorff

    return float(krippendorff.alpha(panel(labels, gaps=True).T, level_of_measurement="nominal"))


def panel(labels: ArrayLike, *, gaps: bool = False) -> np.ndarray:
    """Return labels as floats (N, R), of at least two people and two values; gaps: NaN may be among them."""
    table = np.asarray(labels, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        raise ValueError(f"labels {table.shape}: agreement needs (N, R) labels by at least two people")
    if not gaps and np.isnan(table).any():
        raise ValueError(f"{np.isnan(table).sum()} labels are NaN: use krippendorff_alpha, which allows gaps")
    if len(values := np.unique(table[~np.isnan(table)])) < 2:
        raise ValueError(
            f"all labels are {values}: agreement beyond chance is undefined; label more rows, their answers "
            "in random order"
        )
    return table


# ---- calibration


@dataclass(frozen=True)
class Calibration:
    """table: one row per bin (probability, frequency, low, high, n); ece and brier: both 0 at best."""

    table: pd.DataFrame
    ece: float
    brier: float


def calibration(probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int = 10) -> Calibration:
    """Test whether what is said with probability p happens in a share p of the cases. Lesson 3.

    ECE = sum_b n_b / N |frequency_b - probability_b| over equal bins of [0, 1];  Brier = mean (p - outcome)^2

    Empty bins have no row; frequencies carry Wilson's interval. True probabilities have an ECE above 0 on a
    sample: state N and bins. Brier 1950; Guo et al. 2017.

    Args:
        probabilities: (N,) in [0, 1].
        outcomes: (N,), 0 or 1.
        bins: Number of bins.

    Raises:
        ValueError: the two are anything else.
    """
    said = _vector("probabilities", probabilities)
    came = _vector("outcomes", outcomes)
    if said.shape != came.shape or said.min() < 0 or said.max() > 1 or not np.isin(came, (0, 1)).all():
        raise ValueError(
            f"calibration needs probabilities in [0, 1] and as many outcomes 0 or 1, got {len(said)} from "
            f"{said.min():.3g} to {said.max():.3g} and {len(came)} of {np.unique(came)[:4]}"
        )
    table = reliability_bins(said, came, bins=bins)
    ends = [wilson_interval(row.frequency * row.n, row.n) for row in table.itertuples()]  # pyright: ignore[reportAttributeAccessIssue]
    table[["low", "high"]] = ends
    ece = np.average((table["frequency"] - table["probability"]).abs(), weights=table["n"])
    return Calibration(table, float(ece), float(((said - came) ** 2).mean()))


def reliability_bins(
    probabilities: ArrayLike, outcomes: ArrayLike, *, bins: int, lowest: float = 0.0
) -> pd.DataFrame:
    """Return the means of probability and outcome (frequency), and n, per equal bin of [lowest, 1]."""
    table = pd.DataFrame({"probability": probabilities, "frequency": outcomes})
    cuts = np.linspace(lowest, 1, bins + 1)
    groups = table.groupby(pd.cut(table["probability"], cuts, labels=False, include_lowest=True).to_numpy())  # pyright: ignore[reportAttributeAccessIssue]
    return groups.mean().assign(n=groups.size()).reset_index(drop=True)  # pyright: ignore[reportAttributeAccessIssue]


def numbers(values: Any) -> np.ndarray:
    """Return numbers, perhaps a tensor on a GPU with gradient, as a float array."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=float)


def _vector(name: str, values: ArrayLike) -> np.ndarray:
    array = numbers(values)
    if array.ndim != 1 or len(array) < 2 or not np.isfinite(array).all():
        raise ValueError(f"{name} must be (N,) finite numbers, N >= 2; got shape {array.shape}: {array[:3]}")
    return array
