"""Hidden states of a causal LM, as probes and learned values read them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rlhf_helpers.core.tensors import pad_right

_ROWS = 64  # of one forward pass


@torch.no_grad()
def last_token_states(trunk: nn.Module, rows: Sequence[Sequence[int]], pad_id: int) -> Float[Tensor, "L B d"]:
    """Read the hidden states (layers + 1, B, d) at the last token of each row, float32 on the CPU.

    Layer 0 is the embedding, layer i the output of block i, the last one after the final norm.
    """
    device = next(trunk.parameters()).device
    parts = []
    for start in range(0, len(rows), _ROWS):
        ids, mask = pad_right(rows[start : start + _ROWS], pad_id, device=device)
        outputs = trunk(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        states = torch.stack(outputs.hidden_states)
        parts.append(states[:, range(len(ids)), mask.sum(1) - 1].float().cpu())
    return torch.cat(parts, dim=1)
