"""Spending labels well: which pairs to show to people, and labels that a language model gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlhf_helpers.core.choices import choice_logps, soft_label
from rlhf_helpers.world.prompts.meta import comparison_text


def select_pairs(margins: ArrayLike, n: int) -> np.ndarray:
    """Indices (n,) of the pairs that a reward model is least sure of: the smallest |margin| first.

    margins (N,): reward of one answer minus that of the other; under Bradley-Terry the label's entropy falls
    with |margin|, so this is uncertainty sampling (Lewis and Gale 1994). Ties keep their order. Raises
    ValueError for n outside 1..N or a margin that is not finite. Lesson 1.
    """
    margins = np.asarray(margins, dtype=float)
    if not 1 <= n <= len(margins):
        raise ValueError(f"n={n} of {len(margins)} pairs: choose from 1 to {len(margins)}")
    if not np.isfinite(margins).all():
        raise ValueError(f"margin {np.argmin(np.isfinite(margins))} is not finite: score the pairs again")
    return np.argsort(np.abs(margins), kind="stable")[:n]


def ai_labels(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]]
) -> Float[Tensor, "N"]:
    """Probability (N,) that `first` beats `second`, by the model's own answer to "Which is better, A or B?".

    In each order l = log p(A) - log p(B); p = sigmoid((l_as_given - l_swapped) / 2): whatever the model adds
    for standing first cancels, so p(first, second) = 1 - p(second, first). Soft labels, on the CPU; hard ones
    throw away how sure the model was (Bai et al. 2022, Constitutional AI, section 4.1).

    rows: prompt, first, second, at least one. Lesson 1.
    """
    given = [comparison_text(row["prompt"], row["first"], row["second"]) for row in rows]
    swapped = [comparison_text(row["prompt"], row["second"], row["first"]) for row in rows]
    logps = choice_logps(model, tokenizer, [*given, *swapped], ("A", "B"))
    return soft_label(*logps[: len(rows)].T, *logps[len(rows) :].T)
