"""How sure a reward's order is, as a probability that holds; and the expert on length, fitted alike."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import minimize_scalar
from torch import Tensor

from rlhf_helpers.core.stats import reliability_bins
from rlhf_helpers.core.tensors import require_number, require_shapes
from rlhf_helpers.reward_model.metrics import pair_credits, word_gaps


def fit_temperature(chosen_rewards: Float[Tensor, "B"], rejected_rewards: Float[Tensor, "B"]) -> float:
    """Temperature T, in units of reward, that makes the labels likeliest, on pairs not trained on.

    T = argmax_T sum log sigmoid((r_chosen - r_rejected) / T)

    Above 1 the reward was too sure of itself, below 1 not sure enough; no answer changes its rank. Guo et al.
    2017, section 4.2, with two classes. Lesson 1. Raises ValueError unless shapes are both (B,) and a finite
    T > 0 is likeliest: not where rewards are constant, right on every pair, or no better than a coin.
    """
    require_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    slope = _likeliest_slope((chosen_rewards - rejected_rewards).detach().double().cpu().numpy(), "reward")
    if slope <= 0:
        raise ValueError(
            f"the labels speak against these rewards (1 / T = {slope:.3g}): were chosen and rejected swapped?"
        )
    return 1 / slope


def preference_probability(
    first_rewards: Float[Tensor, "B"], second_rewards: Float[Tensor, "B"], *, temperature: float = 1.0
) -> Float[Tensor, "B"]:
    """Probability (B,) that the first answer is preferred: sigmoid((r_first - r_second) / temperature).

    Bradley & Terry 1952. Lesson 1. Raises ValueError unless shapes are both (B,) and temperature > 0.
    """
    require_shapes("B", first_rewards=first_rewards, second_rewards=second_rewards)
    require_number("temperature", temperature, above=0)
    return torch.sigmoid((first_rewards - second_rewards) / temperature)


def reliability_curve(
    chosen_rewards: Float[Tensor, "B"],
    rejected_rewards: Float[Tensor, "B"],
    *,
    temperature: float = 1.0,
    bins: int = 10,
) -> pd.DataFrame:
    """How often the reward is right where it says how sure it is; on the diagonal it is calibrated.

    confidence = mean of sigmoid(|r_chosen - r_rejected| / temperature), frequency = mean of `pair_credits`

    Equal bins over [1/2, 1], since a guess between two is never less sure than a coin. One row per bin with
    its number of pairs n; a bin that holds no pair has no row. Bai et al. 2022. Lesson 1. Raises ValueError
    unless shapes are both (B,), B >= 1, rewards finite, temperature > 0 and bins >= 1.
    """
    require_number("bins", bins, at_least=1)
    chance = preference_probability(chosen_rewards, rejected_rewards, temperature=temperature)
    if not len(chance) or chance.isnan().any():
        raise ValueError(f"reliability needs at least one pair and finite rewards, got {len(chance)} pairs")
    confidence = torch.maximum(chance, 1 - chance).detach().double().cpu()
    credits = pair_credits(chosen_rewards, rejected_rewards).double().cpu()
    return reliability_bins(confidence, credits, bins=bins, lowest=0.5).rename(
        columns={"probability": "confidence"}
    )


def expected_calibration_error(
    chosen_rewards: Float[Tensor, "B"],
    rejected_rewards: Float[Tensor, "B"],
    *,
    temperature: float = 1.0,
    bins: int = 10,
) -> float:
    """Mean distance of confidence and frequency over the bins of `reliability_curve`, weighted by pairs.

    ECE = sum_b n_b / n |frequency_b - confidence_b|

    Never 0 on a sample: the true probabilities themselves show about 0.047 at 500 pairs and 0.023 at 2,000
    (10 bins). Nor does 0 mean a good reward: a constant one is unsure, and right half of the time. Guo et al.
    2017, eq. 3. Lesson 1. Raises what `reliability_curve` does.
    """
    curve = reliability_curve(chosen_rewards, rejected_rewards, temperature=temperature, bins=bins)
    return float(np.average((curve["frequency"] - curve["confidence"]).abs(), weights=curve["n"]))


def length_log_odds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Log-odds of being chosen for each ten further words: all that length alone explains of the labels.

    w = argmax_w sum log sigmoid(w (words_chosen - words_rejected) / 10)

    0: length tells nothing. Raises ValueError where no finite w is likeliest: lengths never differ, or one
    rule of length explains every label. Lesson 1.
    """
    return _likeliest_slope(word_gaps(rows).double().numpy() / 10, "length")


def length_margins(rows: Sequence[Mapping[str, Any]], *, weight: float | None = None) -> list[dict[str, Any]]:
    """Rows with a column margin that lets a reward model learn what length does not explain.

    margin = -w (words_chosen - words_rejected) / 10, with w = `weight` or, without, `length_log_odds(rows)`;
    loss   = -logsigmoid(r_chosen - r_rejected - margin): expert and reward model explain the label together

    The expert helps in training alone, so the reward need not carry length: a product of experts (Clark et
    al. 2019; He et al. 2019). It lessens a bias rather than ends it, since a logit's weight
    shrinks while another cause (quality) is left out: the world's length-biased people give 1.06 alone, 2.01
    beside gold. A larger weight takes more off; with too large a one the reward prefers short answers. An
    older margin is replaced. Lesson 1. Raises what `length_log_odds` does.
    """
    margins = -(length_log_odds(rows) if weight is None else weight) * word_gaps(rows) / 10
    return [{**row, "margin": margin} for row, margin in zip(rows, margins.tolist(), strict=True)]


def _likeliest_slope(gaps: np.ndarray, what: str) -> float:
    """Logistic regression without intercept on one feature: argmax_a sum log sigmoid(a gap), concave in a."""
    if not gaps.size or not gaps.min() < 0 < gaps.max():
        raise ValueError(
            f"the {what} of the chosen answer is never above, or never below, the rejected one's in "
            f"{gaps.size} pairs (or not finite): no finite weight is likeliest; give more pairs, or others"
        )
    scale = np.abs(gaps).mean()
    return minimize_scalar(lambda slope: np.logaddexp(0, -slope * gaps / scale).mean()).x / scale
