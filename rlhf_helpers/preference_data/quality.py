"""How far labels can be trusted: agreement between people, what biases them, who is not paying attention.

labels are (N, R): N rows, R annotators. For comparisons 1 says that the first answer is preferred, 0 the
second; NaN, where a function takes it, that this person did not label this row.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from rlhf_helpers.core.stats import Estimate, cohen_kappa, panel, proportion
from rlhf_helpers.world.prompts import split_sentences
from rlhf_helpers.world.prompts.base import FLATTERY

MIN_ROWS = 10  # of a slope: errors clustered by row are far too small with fewer


def position_bias(labels: ArrayLike) -> Estimate:
    """Share of first answers preferred, minus 1/2, with Wilson's 95 % interval; 0 is no bias.

    A bias only if rows show their answers in random order. labels (N,) or (N, R), 0, 1 or NaN. The interval
    counts rows, not labels: people who see the same row are not independent. Raises ValueError for other
    labels or none. Lesson 1.
    """
    table = _comparisons(labels)
    first = proportion(np.nanmean(table[~np.isnan(table).all(1)], axis=1))
    return Estimate(first.value - 0.5, first.low - 0.5, first.high - 0.5, first.n)


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
    votes = np.nan_to_num(2 * panel(_comparisons(labels), gaps=True) - 1)  # 1, -1, and 0 where there is none
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
