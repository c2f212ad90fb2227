"""Masked statistics, token log-probabilities, padding, and the checks on the first lines of every loss.

A mask holds 0 or 1 (bool, integer or float); 1 marks a real entry. What lies under a 0 may be anything, NaN
too: it changes neither a value nor a gradient. Axes: B batch, T tokens, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from operator import ge, gt, le, lt

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def require_shapes(axes: str, **tensors: Tensor) -> None:
    """Refuse tensors that do not all have the rank named by `axes` and one common shape: nothing broadcasts.

    `axes` names the dimensions ("B", "B T"); "..." stands for any rank. (4, 1) against (4,) would silently
    give (4, 4) in plain PyTorch, and the mean of that looks like a loss. Raises ValueError where something is
    no tensor, has the wrong rank, or differs in shape from the first tensor.
    """
    wanted = "(" + ", ".join(axes.split()) + ")"
    first_name, first = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor of shape {wanted}, got {type(tensor).__name__}")
        if axes != "..." and tensor.ndim != len(axes.split()):
            raise ValueError(f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but {first_name} has shape {tuple(first.shape)}: "
                "they must be equal, nothing is broadcast"
            )


def require_number(
    name: str,
    value: float,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse a scalar setting that is not a finite number, lies outside its range or should be whole.

    Raises ValueError that names the setting, its rule and the value.
    """
    rules = [(">", gt, above), (">=", ge, at_least), ("<", lt, below), ("<=", le, at_most)]
    rules = [(sign, holds, limit) for sign, holds, limit in rules if limit is not None]
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (number and all(holds(value, limit) for _, holds, limit in rules)):
        rule = " and ".join(f"{sign} {limit}" for sign, _, limit in rules)
        raise ValueError(f"{name} must be a finite number {rule}".rstrip() + f", got {value!r}")
    if whole and not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


def as_bool_mask(mask: Shaped[Tensor, "*shape"], name: str = "mask") -> Bool[Tensor, "*shape"]:
    """Turn a 0/1 mask of any dtype into a boolean one.

    Raises ValueError where an entry is neither 0 nor 1 (weights, token ids and -100 labels are not masks).
    """
    if mask.dtype == torch.bool:
        return mask
    strange = (mask != 0) & (mask != 1)
    if strange.any():
        raise ValueError(f"{name} must hold only 0 and 1, got {mask[strange][0].item()}")
    return mask.bool()


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], dim: int | tuple[int, ...] | None = None
) -> Float[Tensor, "..."]:
    """Average `x` over the positions where `mask` is 1.

    mean = sum(mask x) / sum(mask)

    `dim=None` averages over everything and gives a scalar in which every token weighs the same; `dim=-1`
    gives (B,), one mean per row. The two differ when rows differ in length: say which one you mean. Raises
    ValueError where shapes differ, the mask is not 0/1, or a mean would be over no position at all.
    """
    require_shapes("...", x=x, mask=mask)
    valid = as_bool_mask(mask)
    count = valid.sum() if dim is None else valid.sum(dim)
    if (count == 0).any():
        row = int((count.flatten() == 0).nonzero()[0])
        where = "anywhere" if dim is None else f"in row {row} along dim {dim}"
        raise ValueError(f"the mask selects no position {where}: a mean over nothing is undefined")
    kept = torch.where(valid, x, 0.0)  # not x * mask: NaN * 0 is NaN
    return (kept.sum() if dim is None else kept.sum(dim)) / count


def masked_sum(x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Sum `x` over the positions where `mask` is 1.

    A loop divides it by what it takes the mean over: the tokens or responses of a whole minibatch, of which
    `x` may be a part.

    Raises:
        ValueError: shapes differ, or the mask is not 0/1.
    """
    require_shapes("...", x=x, mask=mask)
    return torch.where(as_bool_mask(mask), x, 0.0).sum()  # not x * mask: NaN * 0 is NaN


def masked_whiten(
    x: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], *, shift_mean: bool = True
) -> Float[Tensor, "*shape"]:
    """Scale `x` to unit variance over the masked positions, and to mean 0 if `shift_mean`.

    y = (x - mean) / sqrt(var + 1e-8), var with n - 1; without `shift_mean`, the mean is added again. Padding
    gives 0.

    Advantages are whitened with the shift, rewards without: their mean says how good the answers are (Huang
    et al. 2024, "The N+ implementation details of RLHF with PPO"). Raises ValueError where shapes differ, the
    mask is not 0/1 or selects fewer than two positions.
    """
    require_shapes("...", x=x, mask=mask)
    valid = as_bool_mask(mask)
    count = int(valid.sum())
    if count < 2:
        raise ValueError(f"whitening needs at least two positions, the mask selects {count}")
    mean = masked_mean(x, valid)
    centred = torch.where(valid, x - mean, 0.0)
    variance = centred.square().sum() / (count - 1)
    whitened = centred * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else torch.where(valid, whitened + mean, 0.0)


def token_logps(
    logits: Float[Tensor, "*T V"], labels: Int[Tensor, "*T"], *, temperature: float = 1.0
) -> Float[Tensor, "*T"]:
    """Read the log-probability of each label, in nats.

    logp_t = log softmax(logits_t / temperature)[label_t]

    Usually (B, T); any shape will do. Already aligned: `logits[:, t]` must be the logits that predict
    `labels[:, t]`, so of a model's output on `ids` pass `logits[:, :-1]` with `ids[:, 1:]`, shifted once.
    Sampling, reference and update must share one temperature, or the ratio is not 1 on the first minibatch.
    Half precision is summed in float32. A padded position needs some valid id as its label; mask the result.
    Raises ValueError where shapes do not fit, a label lies outside [0, V) (-100 too), or temperature <= 0.
    """
    logps = _log_softmax(logits, temperature, labels=labels)
    outside = (labels < 0) | (labels >= logits.shape[-1])
    if outside.any():
        raise ValueError(
            f"labels must be token ids in [0, {logits.shape[-1]}), got {labels[outside][0].item()}: "
            "give padding a valid id and mask the result"
        )
    return logps.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def token_entropies(
    logits: Float[Tensor, "*T V"], mask: Shaped[Tensor, "*T"], *, temperature: float = 1.0
) -> Float[Tensor, "*T"]:
    """Entropy of each next-token distribution, in nats; 0 where the mask is 0.

    H = -sum_v p_v log p_v with p = softmax(logits / temperature); a token of logit -inf adds 0. Keeps its
    gradient, so it serves as a bonus as well as a diagnostic.

    Raises:
        ValueError: shapes do not fit, the mask is not 0/1, or temperature <= 0.
    """
    logps = _log_softmax(logits, temperature, mask=mask)
    probs = logps.exp()
    entropy = -(probs * logps.masked_fill(probs == 0, 0.0)).sum(-1)  # 0 log 0 = 0, where autograd says NaN
    return torch.where(as_bool_mask(mask), entropy, 0.0)


def _log_softmax(
    logits: Float[Tensor, "*T V"], temperature: float, **rows: Shaped[Tensor, "*T"]
) -> Float[Tensor, "*T V"]:
    """Check shapes and temperature; log softmax(logits / temperature), in at least float32."""
    require_number("temperature", temperature, above=0)
    for name, tensor in rows.items():
        if tensor.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but logits has shape {tuple(logits.shape)}: "
                "they must agree in B and T; was only one of them shifted?"
            )
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def batches_by_length(lengths: Iterable[int], batch_size: int) -> list[list[int]]:
    """Cut rows into batches of similar length, the shortest first, so that little padding is computed.

    Returns:
        The indices of each batch. `found[batch] = ...` puts results back in the order of the rows.
    """
    lengths = list(lengths)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int, *, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Pad lists of token ids on the right; returns (ids, mask), both int64, mask 1 on real tokens.

    For whole sequences that are scored: prompt and response start at position 0. Raises ValueError where
    there is no row, or no token in any row.
    """
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        raise ValueError(f"nothing to pad: {len(rows)} rows and no token in any of them")
    ids = [[*row, *[pad_id] * (width - len(row))] for row in rows]
    # The mask comes from the lengths, never from ids == pad_id: a row may contain that id as a real token.
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    padded, real = (torch.tensor(rows, dtype=torch.long, device=device) for rows in (ids, mask))
    return padded, real


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int, *, device: torch.device | str | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Pad as `pad_right` does, but on the left, for prompts that are continued: every row ends at the end."""
    ids, mask = pad_right([[*row][::-1] for row in rows], pad_id, device=device)
    return ids.flip(-1), mask.flip(-1)
