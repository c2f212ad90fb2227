"""What a language model thinks of a few fixed answers: yes or no, A or B, one of several rooms."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.core.tensors import batches_by_length, require_shapes
from rlhf_helpers.core.training import progress

PerRow = Float[Tensor, "B"]


@torch.no_grad()
def choice_logps(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], choices: Sequence[str], *, batch_size: int = 64
) -> Float[Tensor, "B K"]:
    """Log-prob (B, K), in nats, that the model answers each prompt with each of K given choices, with EOS.

    softmax(dim=1) gives the model's probability of a choice among these K. Summed over tokens: compare
    choices of about equal length. float32 on the CPU, without gradient. Raises ValueError for fewer than two
    choices, or a prompt that leaves no room. Lesson 3.
    """
    if isinstance(choices, str) or len(choices) < 2:
        raise ValueError(f"choices must be at least two texts, got {choices!r}")
    options = [choices] * len(prompts)
    return torch.stack(option_logps(model, tokenizer, prompts, options, batch_size=batch_size))


@torch.no_grad()
def option_logps(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    *,
    per_token: bool = False,
    batch_size: int = 64,
) -> list[Float[Tensor, "K"]]:
    """Compute log p(option | prompt) of each prompt's own K options, in nats, EOS included.

    Summed over tokens; with per_token divided by their number, for options of unlike length. Lesson 3.

    Returns:
        B tensors (K,), float32 on the CPU.
    """
    tokenizer = tokenizer or tokenizer_for(model)
    asked = [(prompt, text) for prompt, texts in zip(prompts, options, strict=True) for text in texts]
    found = torch.empty(len(asked))
    batches = batches_by_length([len(prompt) + len(text) for prompt, text in asked], batch_size)
    for rows in progress.track(batches, "reading choices"):
        logps, mask = sequence_logps(model, tokenizer, *zip(*(asked[i] for i in rows), strict=True))
        found[rows] = (logps.sum(-1) / (mask.sum(-1) if per_token else 1)).float().cpu()
    return list(found.split([len(texts) for texts in options]))


def soft_label(logp_a: PerRow, logp_b: PerRow, swapped_logp_a: PerRow, swapped_logp_b: PerRow) -> PerRow:
    """P(the first answer is better), (B,), from log p(A) and log p(B) in both orders.

    sigmoid(((a - b) - (swapped_a - swapped_b)) / 2): whatever the judge adds for standing first cancels.
    Bai et al. 2022, section 4.1. Lesson 3. Raises ValueError where shapes are not all (B,).
    """
    swapped = {"swapped_logp_a": swapped_logp_a, "swapped_logp_b": swapped_logp_b}
    require_shapes("B", logp_a=logp_a, logp_b=logp_b, **swapped)
    return torch.sigmoid(((logp_a - logp_b) - (swapped_logp_a - swapped_logp_b)) / 2)
