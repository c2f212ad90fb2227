"""Intervals, win rates, judges and calibration: each against values by hand, and coverage by simulation."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from rlhf_helpers.alignment_eval import (
    bootstrap_interval,
    calibration,
    judge_agreement,
    judge_position_bias,
    mean_interval,
    score_interval,
    wilson_interval,
    win_rate,
)
from rlhf_helpers.core import stats
from rlhf_helpers.lab import reports

ROWS = [{"prompt": "p", "first": "a" * n, "second": "b"} for n in range(1, 5)]


def test_the_lab_hands_on_the_same_functions():
    assert reports.wilson_interval is wilson_interval
    assert reports.mean_interval is mean_interval


def test_an_interval_holds_its_value_to_the_last_bit():
    for n in range(1, 200):
        assert wilson_interval(n, n)[1] == 1
        assert wilson_interval(0, n)[0] == 0
        assert wilson_interval(n / 2, n)[0] < 0.5 < wilson_interval(n / 2, n)[1]


def test_prediction_interval_of_one_more_run():
    # mean 2, s = 1, t_(0.975; 2) = 4.3027: 2 -+ 4.3027 sqrt(1 + 1/3) = 2 -+ 4.9683
    assert stats.prediction_interval([1.0, 2.0, 3.0]) == pytest.approx((-2.9683, 6.9683), abs=1e-3)
    assert stats.prediction_interval([0.5, 0.5]) == (0.5, 0.5), "equal runs predict the same again"
    with pytest.raises(ValueError, match="N >= 2"):
        stats.prediction_interval([1.0])


def test_scores_stay_in_their_range():
    found = score_interval([0.8, 1.0, 0.8, 1.0])
    assert (found.value, found.low) == pytest.approx(mean_interval([0.8, 1.0, 0.8, 1.0])[:2])
    assert (found.high, found.n) == (1, 4)
    assert score_interval([1.0] * 20).low == pytest.approx(wilson_interval(20, 20)[0])
    free = score_interval(torch.tensor([-1.0, 3.0, 1.0]))
    assert (free.value, free.low, free.high) == pytest.approx(mean_interval([-1, 3, 1]))
    with pytest.raises(ValueError, match="N >= 2"):
        score_interval([0.5])


# ---- bootstrap


def test_bootstrap_of_a_mean_is_its_standard_error_wide():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = bootstrap_interval(values, seed=1)
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    half = 1.96 * values.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    assert bootstrap_interval(values, seed=1) == found


def test_bootstrap_keeps_rows_together():
    # A ratio of sums that is exactly 2 row by row is 2 in every resample.
    counts = np.array([1.0, 5.0, 20.0, 2.0])
    found = bootstrap_interval(2 * counts, counts, statistic=lambda a, b: a.sum() / b.sum())
    assert (found.value, found.low, found.high) == (2, 2, 2)


@pytest.mark.slow
def test_bootstrap_interval_covers():
    draws = np.random.default_rng(0).random((200, 40))
    found = [bootstrap_interval(row, seed=i) for i, row in enumerate(draws)]
    assert 0.88 < np.mean([f.low < 0.5 < f.high for f in found]) < 0.99


@pytest.mark.parametrize(
    "columns, message",
    [
        (([1.0],), r"shape \(1,\)"),
        (([1.0, math.nan],), "finite"),
        (([[1.0, 2.0]],), r"shape \(1, 2\)"),
        (([1.0, 2.0], [1.0, 2.0, 3.0]), r"lengths \[2, 3\]"),
        ((), r"lengths \[\]"),
    ],
)
def test_bootstrap_refuses(columns, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(*columns)


# ---- win rate


def test_win_rate_by_hand():
    # 6 wins, 1 loss, 3 ties: (6 + 1.5) / 10; of 7 decided P(<= 1 or >= 6) = 2 (1 + 7) / 2^7.
    first = [1.0] * 6 + [0.0] + [0.5] * 3
    found = win_rate(first, [0.5] * 10)
    assert found.rate == 0.75
    assert found.p_value == pytest.approx(16 / 128)
    assert found.n == 10
    assert found.low < 0.75 < found.high
    other = win_rate(torch.tensor([0.5] * 10), torch.tensor(first))
    assert other.rate == 0.25
    assert other.p_value == found.p_value
    assert other.low == pytest.approx(1 - found.high, abs=0.06)


def test_win_rate_at_its_ends_keeps_a_width():
    always = win_rate([1.0] * 20, [0.0] * 20)
    assert (always.rate, always.p_value) == (1, 2 / 2**20)
    assert always.low == pytest.approx(wilson_interval(20, 20)[0])
    ties = win_rate([1.0] * 20, [1.0] * 20)
    assert (ties.rate, ties.p_value) == (0.5, 1.0)
    assert ties.low == pytest.approx(wilson_interval(10, 20)[0])


def test_win_rate_does_not_care_by_how_much():
    assert win_rate([9, 0, 0, 2], [0, 1, 1, 1]) == win_rate([2, 0, 0, 2], [1, 1, 1, 1])


@pytest.mark.parametrize(
    "first, second", [([1.0, 2.0], [1.0]), ([1.0], [1.0]), ([math.inf, 1.0], [1.0, 2.0])]
)
def test_win_rate_refuses(first, second):
    with pytest.raises(ValueError, match=r"scores|prompt"):
        win_rate(first, second)


# ---- judges


def test_kappa_by_hand():
    # Agree on 6 of 8; both say 1 in half of the cases: (0.75 - 0.5) / 0.5.
    first, second = [1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]
    found = judge_agreement(first, second)
    assert found.value == pytest.approx(0.5)
    assert found.low < 0.5 < found.high <= 1
    assert judge_agreement(first, first).value == 1
    with pytest.raises(ValueError, match="all labels are"):
        judge_agreement([1, 1], [1, 1])


def test_kappa_is_that_of_scikit_learn():
    draws = np.random.default_rng(0).integers(0, 3, (2, 60)).astype(float)
    assert stats.cohen_kappa(*draws) == pytest.approx(cohen_kappa_score(*draws))
    assert math.isnan(stats._kappa(np.ones(3), np.ones(3)))


def test_a_judge_of_places_flips_and_leans():
    bias = judge_position_bias(lambda p, a, b: torch.full((len(p),), 0.8), ROWS)
    assert bias.flips.value == 1
    assert bias.lean.value == pytest.approx(0.3)
    assert bias.lean.low == pytest.approx(0.3)
    other = judge_position_bias(lambda p, a, b: np.full(len(p), 0.4), ROWS)
    assert other.flips.value == 1
    assert other.lean.value == pytest.approx(-0.1)


def test_a_judge_of_texts_does_neither():
    # P(first) by length: 1/2 at length 1, above it later; the other order gives the rest to 1.
    bias = judge_position_bias(
        lambda p, a, b: [len(x) / (len(x) + len(y)) for x, y in zip(a, b, strict=True)], ROWS
    )
    assert bias.flips.value == 0
    assert bias.lean.value == pytest.approx(0)


def test_flips_by_hand():
    def judge(prompts, firsts, seconds):  # sure of long answers; where both are short it takes the first
        return torch.tensor(
            [0.9 if len(a) > 2 else 0.1 if len(b) > 2 else 0.7 for a, b in zip(firsts, seconds, strict=True)]
        )

    bias = judge_position_bias(judge, ROWS)
    assert bias.flips.value == 0.5  # lengths 1 and 2 of 1, 2, 3, 4
    assert bias.lean.value == pytest.approx((0.2 + 0.2) / 4)
    assert (bias.flips.low, bias.flips.high) == pytest.approx(wilson_interval(2, 4))


@pytest.mark.parametrize("answer", [[0.5], [1.5] * 4, [[0.5]] * 4, [math.nan] * 4])
def test_a_judge_must_give_probabilities(answer):
    with pytest.raises(ValueError, match=r"4 numbers in \[0, 1\]"):
        judge_position_bias(lambda p, a, b: answer, ROWS)


# ---- calibration


def test_calibration_by_hand():
    # Two bins: (0.1, 0.3 -> 0, 1) and (0.7, 0.9, 1.0 -> 1, 1, 0).
    found = calibration([0.1, 0.3, 0.7, 0.9, 1.0], [0, 1, 1, 1, 0], bins=2)
    assert found.table["n"].tolist() == [2, 3]
    assert found.table["probability"].tolist() == pytest.approx([0.2, 2.6 / 3])
    assert found.table["frequency"].tolist() == pytest.approx([0.5, 2 / 3])
    assert found.table.loc[0, ["low", "high"]].tolist() == pytest.approx(wilson_interval(1, 2))
    assert found.ece == pytest.approx((2 * 0.3 + 3 * 0.2) / 5)
    assert found.brier == pytest.approx((0.01 + 0.49 + 0.09 + 0.01 + 1) / 5)


def test_true_probabilities_are_calibrated_and_bold_ones_are_not():
    draws = np.random.default_rng(0)
    truth = draws.random(4000)
    came = draws.random(4000) < truth
    bold = np.clip(0.5 + 2 * (truth - 0.5), 0, 1)
    assert calibration(truth, came).ece < 0.03
    assert calibration(bold, came).ece > 0.1
    assert calibration(truth, came).brier < calibration(bold, came).brier
    assert calibration([1.0, 1.0], [1, 1]).brier == 0


@pytest.mark.parametrize("said, came", [([1.2, 0.1], [1, 0]), ([0.5, 0.5], [1, 2]), ([0.5, 0.5], [1, 0, 1])])
def test_calibration_refuses(said, came):
    with pytest.raises(ValueError, match="calibration needs"):
        calibration(said, came)
