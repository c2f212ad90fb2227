"""What is measured of a reward: is it as sure as it may be, does it like length, does it keep its order."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf_helpers.core.preference_losses import bradley_terry_loss
from rlhf_helpers.reward_model.calibration import (
    expected_calibration_error,
    fit_temperature,
    length_log_odds,
    length_margins,
    preference_probability,
    reliability_curve,
)
from rlhf_helpers.reward_model.metrics import (
    accuracy_by_length,
    length_correlation,
    robustness,
    word_gaps,
)

LN3 = math.log(3)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def zeros(count):
    return torch.zeros(count, dtype=torch.float64)


def row(chosen_words, rejected_words, prompt="p"):
    return {"prompt": prompt, "chosen": "a " * chosen_words, "rejected": "b " * rejected_words}


def calibrated_pairs(count, seed, temperature=1.0):
    """Rewards of chosen and rejected answers, labelled by sigmoid(gap / temperature)."""
    rng = np.random.default_rng(seed)
    gaps = rng.normal(0, 1.5, count)
    labels = rng.random(count) < 1 / (1 + np.exp(-gaps / temperature))
    return torch.from_numpy(np.where(labels, gaps, -gaps)), zeros(count)


# ---- temperature


def test_temperature_by_hand():
    # Right on three pairs of four, each by 2: sigmoid(2 / T) = 3/4, so T = 2 / ln 3.
    assert fit_temperature(tensor(2, 2, 2, 0), tensor(0, 0, 0, 2)) == pytest.approx(2 / LN3, abs=1e-6)


def test_probability_by_hand():
    first = preference_probability(tensor(1, 0, 5), tensor(1, 2 * LN3, 5 - LN3), temperature=2)
    assert_close(first, tensor(1 / 2, 1 / 4, math.sqrt(3) / (1 + math.sqrt(3))))


def test_temperature_is_recovered():
    chosen, rejected = calibrated_pairs(4000, seed=0, temperature=2.5)
    assert fit_temperature(chosen, rejected) == pytest.approx(2.5, abs=0.25)
    # In units of reward: rewards ten times as large need ten times the temperature.
    ten = fit_temperature(10 * chosen, 10 * rejected)
    assert ten == pytest.approx(10 * fit_temperature(chosen, rejected), rel=1e-6)


def test_temperature_refuses_a_flipped_sign():
    chosen, rejected = calibrated_pairs(500, seed=0)
    with pytest.raises(ValueError, match="swapped"):
        fit_temperature(rejected, chosen)


@pytest.mark.parametrize(
    "chosen",
    [(1.0, 1.0), (2.0, 3.0), (0.0, 0.0), (), (math.nan, 2.0)],
    ids=["constant", "all right", "all wrong", "empty", "nan"],
)
def test_temperature_refuses_what_has_no_likeliest(chosen):
    with pytest.raises(ValueError, match="no finite weight"):
        fit_temperature(tensor(*chosen), tensor(*[1.0] * len(chosen)))


def test_nothing_broadcasts():
    for measure in (fit_temperature, preference_probability, reliability_curve):
        with pytest.raises(ValueError, match="shape"):
            measure(torch.zeros(4, 1), torch.zeros(4))


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_probability_refuses_a_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        preference_probability(zeros(2), zeros(2), temperature=temperature)


# ---- reliability


def test_reliability_by_hand():
    # Confidence 3/4 four times (right thrice), 9/10 twice (right once), 1/2 once (a tie: one half).
    gaps = tensor(LN3, LN3, LN3, -LN3, math.log(9), -math.log(9), 0)
    curve = reliability_curve(gaps, zeros(7), bins=5)
    assert list(curve.columns) == ["confidence", "frequency", "n"]
    assert curve["n"].tolist() == [1, 4, 2]  # the bins (0.6, 0.7] and (0.9, 1] hold nothing: no row
    assert curve["confidence"].tolist() == pytest.approx([0.5, 0.75, 0.9])
    assert curve["frequency"].tolist() == pytest.approx([0.5, 0.75, 0.5])
    assert expected_calibration_error(gaps, zeros(7), bins=5) == pytest.approx(2 / 7 * 0.4)
    # The frequency answers to the labels; confidence does not.
    turned = reliability_curve(-gaps, zeros(7), bins=5)
    assert turned["frequency"].tolist() == pytest.approx([0.5, 0.25, 0.5])
    assert turned["confidence"].tolist() == pytest.approx([0.5, 0.75, 0.9])


def test_ece_of_true_probabilities_is_sampling_noise_alone():
    # Drawn 60 times, 10 bins: 0.047 at n = 500, 0.023 at n = 2,000, 0.0074 at n = 20,000 on average.
    assert expected_calibration_error(*calibrated_pairs(500, seed=1)) == pytest.approx(0.047, abs=0.025)
    large = calibrated_pairs(20_000, seed=1)
    assert expected_calibration_error(*large) < 0.015
    # Three times too sure, the same answers: seen, and mended by the temperature that is fitted.
    sure = [3 * rewards for rewards in large]
    assert expected_calibration_error(*sure) > 0.1
    assert expected_calibration_error(*sure, temperature=fit_temperature(*sure)) < 0.015


def test_a_constant_reward_is_unsure_and_calibrated():
    curve = reliability_curve(torch.ones(3), torch.ones(3))
    assert curve.to_numpy().tolist() == [[0.5, 0.5, 3]]
    assert expected_calibration_error(torch.ones(3), torch.ones(3)) == 0


def test_one_bin_and_a_certain_reward():
    assert reliability_curve(tensor(99, 0), tensor(0, 99), bins=1).to_numpy().tolist() == [[1, 0.5, 2]]


@pytest.mark.parametrize(
    "gaps, bins, match", [((), 10, "at least one pair"), ((math.nan,), 10, "finite"), ((1.0,), 0, "bins")]
)
def test_reliability_refuses(gaps, bins, match):
    with pytest.raises(ValueError, match=match):
        reliability_curve(tensor(*gaps), zeros(len(gaps)), bins=bins)


# ---- length


def test_length_expert_by_hand():
    # Chosen is longer by ten words three times, shorter once: sigmoid(w) = 3/4.
    rows = [row(15, 5), row(12, 2), row(10, 0), row(0, 10)]
    assert word_gaps(rows).tolist() == [10, 10, 10, -10]
    assert length_log_odds(rows) == pytest.approx(LN3, abs=1e-6)
    assert [r["margin"] for r in length_margins(rows)] == pytest.approx([-LN3, -LN3, -LN3, LN3], abs=1e-6)
    assert [r["margin"] for r in length_margins(rows, weight=2.0)] == [-2, -2, -2, 2]
    assert length_margins(rows)[0]["chosen"] == rows[0]["chosen"]
    assert "margin" not in rows[0]


def test_shorter_answers_preferred_give_a_negative_weight():
    assert length_log_odds([row(0, 10), row(0, 10), row(0, 10), row(10, 0)]) == pytest.approx(-LN3, abs=1e-6)


def test_length_expert_refuses_equal_lengths_and_one_rule_for_all():
    for rows in ([row(3, 3), row(4, 4)], [row(3, 2), row(9, 1)], []):
        with pytest.raises(ValueError, match="length of the chosen"):
            length_margins(rows)


def test_beside_its_expert_a_reward_has_no_use_for_length():
    """The loss's slope along r = a * words / 10 is 0 at a = 0: with the sign flipped it is far from that."""
    rng = np.random.default_rng(0)
    words = np.sort(rng.integers(0, 30, (200, 2)))
    longer_wins = rng.random((200, 1)) < 0.7
    rows = [row(*pair) for pair in np.where(longer_wins, words[:, ::-1], words)]
    gaps = word_gaps(rows).double() / 10

    def slope(margins):
        weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bradley_terry_loss(weight * gaps, zeros(200), margin=margins).mean().backward()
        return weight.grad.item()

    margins = torch.tensor([r["margin"] for r in length_margins(rows)], dtype=torch.float64)
    assert slope(margins) == pytest.approx(0, abs=1e-6)
    assert slope(zeros(200)) < -0.1
    assert slope(-margins) < -0.1


def test_accuracy_by_length_by_hand():
    rows = [row(1, 20), row(2, 2), row(3, 1), row(20, 1), row(20, 1)]
    chosen, rejected = tensor(0, 1, 2, 3, 3), tensor(1, 1, 1, 1, 4)
    table = accuracy_by_length(rows, chosen, rejected)
    assert list(table.columns) == ["words", "accuracy", "low", "high", "n"]
    assert table["words"].tolist() == ["(-inf, -10.0]", "(-3.0, 3.0]", "(10.0, inf]"]
    assert table["accuracy"].tolist() == [0, 0.75, 0.5]
    assert table["n"].tolist() == [1, 2, 2]
    assert table["low"][2] == pytest.approx(0.0945, abs=1e-4)  # Wilson's for 1 of 2


def test_accuracy_by_length_refuses():
    with pytest.raises(ValueError, match="shape"):
        accuracy_by_length([row(1, 2)], tensor(1, 2), tensor(1, 2))


# ---- correlations


def test_length_correlation_by_hand():
    # Quality is at right angles to both, so it takes 1 from each denominator: rho = r_rl = 1/2.
    rewards = tensor(1, -1, 0, 0, 1, -1, 0, 0)
    lengths = tensor(1, -1, 1, -1, 0, 0, 0, 0)
    quality = tensor(1, 1, -1, -1, 1, 1, -1, -1)
    found = length_correlation(rewards, lengths, quality)
    assert found.value == pytest.approx(0.5)
    # m = 7 free values: tanh(atanh(1/2) -+ 1.959964 / 2)
    middle, reach = math.log(3) / 2, 1.959964 / 2
    assert (found.low, found.high) == pytest.approx((math.tanh(middle - reach), math.tanh(middle + reach)))
    assert length_correlation(-rewards, lengths, quality).value == pytest.approx(-0.5)


def test_length_correlation_is_that_of_what_quality_leaves():
    """Against the residuals of two regressions on quality, which is its definition."""
    draws = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)).double()
    quality, lengths = draws[0], draws[0] + draws[1]
    honest, padded = quality + 0.1 * draws[2], quality + lengths + 0.1 * draws[2]
    found = length_correlation(padded, lengths, quality)
    design = torch.stack([torch.ones(500).double(), quality], 1)
    left = [y - design @ torch.linalg.lstsq(design, y).solution for y in (padded, lengths)]
    assert found.value == pytest.approx(torch.corrcoef(torch.stack(left))[0, 1].item(), abs=1e-9)
    assert found.low > 0.9
    # A reward of quality alone goes with length (plain correlation 0.7) and earns it nothing of its own.
    assert torch.corrcoef(torch.stack([honest, lengths]))[0, 1] > 0.6
    assert abs(length_correlation(honest, lengths, quality).value) < 0.1


def test_length_correlation_forgets_each_prompts_offset():
    draws = torch.randn(3, 60, 2, generator=torch.Generator().manual_seed(0)).double()
    rewards = draws[0] + draws[1]
    found = length_correlation(rewards, draws[1], draws[2])
    shifted = length_correlation(rewards + 1000 * torch.arange(60.0)[:, None], draws[1], draws[2])
    swapped = length_correlation(rewards.flip(1), draws[1].flip(1), draws[2].flip(1))
    assert shifted.value == pytest.approx(found.value, abs=1e-6)
    assert swapped.value == pytest.approx(found.value, abs=1e-12)
    assert found.n == 120
    # 60 pairs hold 60 free values, not 119: what `pairs` say is no surer than their differences.
    assert math.atanh(found.high) - math.atanh(found.value) == pytest.approx(1.959964 / math.sqrt(57))


def test_length_correlation_refuses():
    grid = torch.arange(12.0).view(4, 3) ** 2
    other = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="lengths is constant"):
        length_correlation(other, torch.full((4, 3), 0.1).double().cumsum(0), grid)  # alike within prompts
    with pytest.raises(ValueError, match="straight function"):
        length_correlation(other, grid, 2 * grid + 1)
    with pytest.raises(ValueError, match="free values"):
        length_correlation(other[:1], grid[:1], grid[:1])
    with pytest.raises(ValueError, match="shape"):
        length_correlation(other, grid, grid.flatten())


# ---- robustness


def letters(prompts, responses, **columns):
    return torch.tensor([float(len(response)) for response in responses])


def texts(*pairs):
    return [{"prompt": "p", "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]


def test_robustness_by_hand():
    before = texts(("aaa", "a"), ("aa", "a"), ("a", "aa"), ("aaaa", "aa"))
    after = texts(("aaa", "aaaaa"), ("a", "a"), ("a", "aaa"), ("aaaaaa", "aa"))
    found = robustness(letters, before, after)
    # Per pair (0 + 4)/2, (1 + 0)/2, (0 + 1)/2, (2 + 0)/2; order turned, tied (one half), kept, kept.
    assert found["reward_change"].value == pytest.approx((2 + 0.5 + 0.5 + 1) / 4)
    assert found["order_changes"].value == pytest.approx(1.5 / 4)
    assert found["order_changes"].n == found["reward_change"].n == 4
    back = robustness(letters, after, before)
    assert back == found
    same = robustness(letters, before, before)
    assert (same["reward_change"].high, same["order_changes"].value) == (0, 0)


def test_robustness_refuses_rows_without_their_counterpart():
    with pytest.raises(ValueError, match="2 rows but 1 changed"):
        robustness(letters, texts(("a", "b"), ("c", "d")), texts(("a", "b")))
