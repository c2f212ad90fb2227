"""What a language model thinks of a few fixed answers: yes or no, A or B, one of several rooms."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.core.tensors import require_shapes

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
    asked = [prompt for prompt in prompts for _ in choices]
    answers = [choice for _ in prompts for choice in choices]
    order = sorted(range(len(asked)), key=lambda row: len(asked[row]))  # little padding in a batch
    found = torch.empty(len(asked))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        logps, _ = sequence_logps(model, tokenizer, [asked[i] for i in rows], [answers[i] for i in rows])
        found[rows] = logps.sum(-1).float().cpu()
    return found.view(len(prompts), len(choices))


def soft_label(logp_a: PerRow, logp_b: PerRow, swapped_logp_a: PerRow, swapped_logp_b: PerRow) -> PerRow:
    """P(the first answer is better), (B,), from log p(A) and log p(B) in both orders.

    sigmoid(((a - b) - (swapped_a - swapped_b)) / 2): whatever the judge adds for standing first cancels.
    Bai et al. 2022, section 4.1. Lesson 3. Raises ValueError where shapes are not all (B,).
    """
    swapped = {"swapped_logp_a": swapped_logp_a, "swapped_logp_b": swapped_logp_b}
    require_shapes("B", logp_a=logp_a, logp_b=logp_b, **swapped)
    return torch.sigmoid(((logp_a - logp_b) - (swapped_logp_a - swapped_logp_b)) / 2)
