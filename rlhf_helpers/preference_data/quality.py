"""How far labels can be trusted: agreement between people, what biases them, who is not paying attention.

labels are (N, R): N rows, R annotators. For comparisons 1 says that the first answer is preferred, 0 the
second; NaN, where a function takes it, that this person did not label this row.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf_helpers.world.prompts import split_sentences
from rlhf_helpers.world.prompts.base import FLATTERY

MIN_ROWS = 10  # of a slope: errors clustered by row are far too small with fewer
LEVELS = ("nominal", "ordinal", "interval", "ratio")


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


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float:
    """Agreement of two people beyond chance: kappa = (p_o - p_e) / (1 - p_e), in [-1, 1].

    p_o is the share of rows on which they agree, p_e = sum_k p1(k) p2(k) what two people with their habits
    would agree on by chance (Cohen 1960). first, second: (N,) labels. Raises ValueError for lengths that
    differ, NaN, or where both give one and the same label throughout. Lesson 1.
    """
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(*_panel(np.stack([first, second], axis=1)).T))


def fleiss_kappa(labels: ArrayLike) -> float:
    """Agreement of R people beyond chance: kappa = (P - P_e) / (1 - P_e) (Fleiss 1971).

    P is the mean share of agreeing pairs of people, P_e = sum_k p(k)^2 with p(k) the share of label k among
    all. labels (N, R), all given. Raises ValueError for NaN or labels that are all alike. Lesson 1.
    """
    from statsmodels.stats import inter_rater

    return float(inter_rater.fleiss_kappa(inter_rater.aggregate_raters(_panel(labels))[0]))


def krippendorff_alpha(labels: ArrayLike, *, level: str = "nominal") -> float:
    """Agreement with gaps and for any scale: alpha = 1 - D_o / D_e, observed over chance disagreement.

    1 is full agreement, 0 chance. labels (N, R), NaN = not labelled; level: how far apart two labels are,
    "nominal" for comparisons, "ordinal" for marks, or "interval" or "ratio" (Krippendorff 2011). Raises
    ValueError for labels that are all alike or an unknown level. Lesson 1.
    """
    import krippendorff

    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; choose from {LEVELS}")
    return float(krippendorff.alpha(_panel(labels, gaps=True).T, level_of_measurement=level))


def position_bias(labels: ArrayLike) -> Estimate:
    """Share of first answers preferred, minus 1/2, with Wilson's 95 % interval; 0 is no bias.

    A bias only if rows show their answers in random order. labels (N,) or (N, R), 0, 1 or NaN. The interval
    counts rows, not labels: people who see the same row are not independent. Raises ValueError for other
    labels or none. Lesson 1.
    """
    from statsmodels.stats.proportion import proportion_confint

    table = _comparisons(labels)
    per_row = np.nanmean(table[~np.isnan(table).all(1)], axis=1)
    low, high = proportion_confint(per_row.sum(), len(per_row), method="wilson")
    return Estimate(float(per_row.mean()) - 0.5, float(low) - 0.5, float(high) - 0.5, len(per_row))


def length_bias(
    rows: Sequence[Mapping[str, Any]], labels: ArrayLike, *, quality_gap: ArrayLike | None = None
) -> Estimate:
    """What ten more words add to the log-odds of being preferred, with a 95 % interval.

    The slope b of P(first preferred) = sigmoid(a + b (words_first - words_second) / 10 + c quality_gap),
    fitted by maximum likelihood, errors clustered by row. Good answers may be longer for good reason: with
    quality_gap (N,), how much better the first truly is, b is bias alone (a Bradley-Terry person's
    length_bias / temperature); without, all that goes with length.

    rows: prompt, first, second; labels (N,) or (N, R), 0, 1 or NaN. Raises ValueError where they do not
    match, are fewer than 10, or fix no slope (labels told apart without error, no difference). Lesson 1.
    """
    words = [(len(row["first"].split()) - len(row["second"].split())) / 10 for row in rows]
    return _slope(words, labels, quality_gap, "words")


def flattery_bias(
    rows: Sequence[Mapping[str, Any]], labels: ArrayLike, *, quality_gap: ArrayLike | None = None
) -> Estimate:
    """What one more flattering sentence (the world's) adds to the log-odds; otherwise as `length_bias`."""
    first, second = (
        [sum(s in FLATTERY for s in split_sentences(row[side])) for row in rows]
        for side in ("first", "second")
    )
    return _slope(np.subtract(first, second), labels, quality_gap, "flattering sentences")


def annotator_reliability(labels: ArrayLike) -> np.ndarray:
    """Agreement of each person with the majority of the others, corrected for chance, (R,).

    reliability_r = cohen_kappa(labels of r, majority of all but r), over the rows that r labelled and the
    others are not split on: 1 always agrees, 0 is a coin. A majority may be wrong: a lone expert scores low.
    labels (N, R), R at least 2, 0, 1 or NaN. Raises ValueError for other labels, or where a person and the
    others give one and the same label throughout. Lesson 1.
    """
    votes = np.nan_to_num(2 * _panel(_comparisons(labels), gaps=True) - 1)  # 1, -1, and 0 where there is none
    found = []
    for own in votes.T:
        others = np.sign(votes.sum(1) - own)
        known = (own != 0) & (others != 0)
        found.append(cohen_kappa(own[known], others[known]))
    return np.array(found)


def _slope(gaps: ArrayLike, labels: ArrayLike, quality_gap: ArrayLike | None, what: str) -> Estimate:
    """The first slope of a logistic regression of labels on gaps [and quality], with a constant."""
    from statsmodels.api import Logit
    from statsmodels.tools.sm_exceptions import ModelWarning, PerfectSeparationError

    table = _comparisons(labels)
    columns = [gaps, np.ones(len(table))] + ([] if quality_gap is None else [quality_gap])
    if any(np.shape(column) != (len(table),) for column in columns):
        raise ValueError(
            f"{[np.shape(c) for c in columns]}: rows, quality_gap and {len(table)} labels differ"
        )
    row, person = np.nonzero(~np.isnan(table))
    features = np.column_stack(columns)[row]
    try:
        if len(set(row)) < MIN_ROWS or np.linalg.matrix_rank(features) < len(columns):
            raise ModelWarning(f"{len(set(row))} rows, at least {MIN_ROWS} that differ are needed")
        with warnings.catch_warnings(action="error", category=ModelWarning):
            model = Logit(table[row, person], features)
            fit = model.fit(disp=0, cov_type="cluster", cov_kwds={"groups": row})
    except (ModelWarning, PerfectSeparationError) as error:
        raise ValueError(
            f"{len(row)} labels fix no slope on {what} ({error}): label more pairs that differ in them"
        ) from error
    low, high = fit.conf_int()[0]
    return Estimate(float(fit.params[0]), float(low), float(high), len(row))


def _comparisons(labels: ArrayLike) -> np.ndarray:
    table = np.asarray(labels, dtype=float)
    table = table[:, None] if table.ndim == 1 else table
    given = table[~np.isnan(table)]
    if table.ndim != 2 or not given.size or not np.isin(given, (0, 1)).all():
        raise ValueError(
            f"labels {np.shape(labels)} hold {np.unique(given)[:5]}: give (N, R) comparisons, 1, 0 or NaN"
        )
    return table


def _panel(labels: ArrayLike, *, gaps: bool = False) -> np.ndarray:
    """Labels as floats (N, R), of at least two people and two values."""
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
