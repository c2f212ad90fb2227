"""Supervised fine-tuning, the first of the three stages: imitate given answers, token by token."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from rlhf_helpers.core.models import usable_positions
from rlhf_helpers.core.tensors import batches_by_length, pad_right
from rlhf_helpers.core.text import encode_pair, naming
from rlhf_helpers.core.training.batches import micro_batches, offline_steps
from rlhf_helpers.core.training.engine import Engine
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.metrics import MeanMetrics
from rlhf_helpers.core.training.resume import checksum
from rlhf_helpers.core.training.settings import TrainingSettings

RESPONSE_KEYS = ("completion", "response", "chosen")

Rows = Sequence[dict[str, Any]] | Callable[[int], Sequence[dict[str, Any]]]


class EncodedRow(NamedTuple):
    """Token ids of a prompt and of the response to it, and what each token of the response weighs.

    Lists of Python numbers are easy to read and take about 36 bytes per token: 2 GB for 50 million tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    weight: float


def sft(
    model: torch.nn.Module,
    tokenizer: Any,
    rows: Rows,
    settings: TrainingSettings,
    *,
    epochs: int = 1,
    batch_size: int = 16,
    prompt_weight: float = 0.0,
    val_rows: Sequence[dict[str, Any]] | None = None,
    eval_every: int = 0,
    resume: bool = False,
) -> History:
    """Maximize the likelihood of the responses: loss = sum_t w_t (-log p(y_t | y_<t)) / sum_t w_t.

    w_t is 1 (the row's `weight`, where it has one) on response tokens, the closing EOS included: without it
    a model never learns to stop; `prompt_weight` on prompt tokens, 0 on padding. The sums run over the whole
    batch of an optimizer step, batch_size x accumulation_steps rows over all processes, so that short
    answers do not weigh more per token than long ones. Source: Ouyang et al. 2022, section 3.5.

    Args:
        rows: dicts with prompt and completion, response or chosen; a list, a datasets.Dataset, anything
            with len and [i], or a function epoch -> such rows (as many each epoch) for data made on the fly.
        val_rows: evaluated every eval_every steps, or at the end of each epoch: eval_loss, and so on.
        resume: continue from the newest checkpoint of settings.run_dir, if there is one.

    Returns:
        One row per step: loss, token_accuracy (the share of response tokens that the model ranked first,
        weighted as in the loss), learning_rate, grad_norm.

    Raises:
        ValueError: a missing or empty field; names the row.
    """
    _check_arguments(tokenizer, epochs, batch_size, prompt_weight)
    limit = settings.max_length or usable_positions(model)
    encoded_of = encoded_by_epoch(tokenizer, rows, max_length=limit)
    first = encoded_of(0)
    # Rows of one optimizer step, over all micro-batches and processes.
    size = batch_size * settings.accumulation_steps
    steps_per_epoch = math.ceil(len(first) / size)
    val_data = None if val_rows is None else encode_rows(tokenizer, val_rows, max_length=limit)
    was_training = model.training  # the engine switches to train mode
    engine = Engine(
        model,
        settings,
        total_steps=epochs * steps_per_epoch,
        resume_must_match={
            "epochs": epochs,
            "batch_size": batch_size,
            "prompt_weight": prompt_weight,
            "rows": len(first),
            "max_length": limit,
            "data_checksum": checksum(first),
        },
    )
    if not callable(rows):
        engine.example = rows[0]["prompt"], ()
    if resume:
        engine.resume()
    # Each epoch has its own seeded order, a function of (seed, epoch) alone.
    for epoch, indices in offline_steps(engine, lambda epoch: row_lengths(encoded_of(epoch)), size):
        metrics = sft_update(
            engine, encoded_of(epoch), indices, prompt_weight=prompt_weight, pad_id=tokenizer.pad_token_id
        )
        if val_data is not None and engine.is_due(eval_every or steps_per_epoch):
            metrics |= evaluate_sft(engine, val_data, batch_size=batch_size, pad_id=tokenizer.pad_token_id)
        engine.log(metrics)
    model.train(was_training)
    return engine.history


def encoded_by_epoch(
    tokenizer: Any, rows: Rows, *, max_length: int | None
) -> Callable[[int], list[EncodedRow]]:
    """Return epoch -> its tokenized rows; those that are the same in all epochs are tokenized once."""
    first = encode_rows(tokenizer, rows(0) if callable(rows) else rows, max_length=max_length)

    @lru_cache(maxsize=1)  # the loop asks twice, for the lengths and for the rows
    def encoded_of(epoch: int) -> list[EncodedRow]:
        if epoch == 0 or not callable(rows):
            return first
        encoded = encode_rows(tokenizer, rows(epoch), max_length=max_length)
        if len(encoded) != len(first):  # the number of steps is planned
            raise ValueError(
                f"rows({epoch}) returned {len(encoded)} rows, rows(0) {len(first)}: give as many each epoch"
            )
        return encoded

    return encoded_of


def _check_arguments(tokenizer: Any, epochs: int, batch_size: int, prompt_weight: float) -> None:
    if not 0 <= prompt_weight < math.inf:
        raise ValueError(f"prompt_weight must be finite and >= 0; got {prompt_weight}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be >= 1; got {epochs} and {batch_size}")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad token: load_model adds one")


def sft_update(
    engine: Engine, encoded: Sequence[EncodedRow], indices: np.ndarray, *, prompt_weight: float, pad_id: int
) -> dict[str, float]:
    """Make one optimizer step on the rows of a batch; return its loss and token accuracy before the step."""
    # Of the whole batch, before it is cut: every token weighs the same in whichever part it ends up.
    total_weight = sum(sum(token_weights(encoded[index], prompt_weight)) for index in indices)
    metrics = MeanMetrics()
    for local, row_weight in micro_batches(engine, indices):
        # One forward; padding goes through the model but has weight 0.
        rows = [encoded[index] for index in local]
        nll, correct, weights = rows_nll(engine.model, rows, prompt_weight, pad_id)
        # row_weight is 0 on a process that has no row of this micro-batch and runs the forward only to stay
        # in sync.
        weights = row_weight * weights
        metrics.add(nll, {"token_accuracy": correct}, weights)
        loss = (weights * nll).sum() / total_weight
        engine.backward(loss, rows=indices.tolist())
    engine.optimizer_step()
    return metrics.means(engine)


@torch.no_grad()
def evaluate_sft(
    engine: Engine, encoded: Sequence[EncodedRow], *, batch_size: int, pad_id: int
) -> dict[str, float]:
    """Return eval_loss and eval_token_accuracy, weighted means over response tokens of held-out rows."""
    metrics = MeanMetrics()
    for indices in batches_by_length(row_lengths(encoded), batch_size):
        nll, correct, weights = rows_nll(engine.model, [encoded[index] for index in indices], 0.0, pad_id)
        metrics.add(nll, {"token_accuracy": correct}, weights)
    return {f"eval_{name}": value for name, value in metrics.means().items()}


def rows_nll(
    model: torch.nn.Module, rows: Sequence[EncodedRow], prompt_weight: float, pad_id: int
) -> tuple[torch.Tensor, ...]:
    """Compute -log p of tokens 1 to T - 1 of these rows, padding included.

    Returns:
        Three tensors (B, T - 1): -log p; 1 where the token was ranked first, else 0, and NaN outside the
        responses; the weights, 0 on padding.
    """
    device = next(model.parameters()).device
    ids, mask = pad_right([row.prompt_ids + row.response_ids for row in rows], pad_id, device=device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    # In float32 at least: the sum over a vocabulary loses digits in bf16.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = ids[:, 1:]  # the logits at one token predict the next
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    prompt_lengths = torch.tensor([[len(row.prompt_ids)] for row in rows], device=device)
    is_response = mask[:, 1:].bool() & (torch.arange(1, ids.shape[1], device=device) >= prompt_lengths)
    with torch.no_grad():
        correct = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) >= logits.amax(-1)
        correct = correct.float().where(is_response, torch.nan)
    weights = [torch.tensor(token_weights(row, prompt_weight), dtype=torch.float32) for row in rows]
    return nll, correct, pad_sequence(weights, batch_first=True).to(device)


def encode_rows(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], *, max_length: int | None = None
) -> list[EncodedRow]:
    """Tokenize every row once; ValueError names the row whose prompt or response is missing or empty."""
    if len(rows) == 0:
        raise ValueError("there are no rows to train on")
    encoded = []
    for index in range(len(rows)):
        prompt, response, weight = _checked(rows[index], index)
        with naming(f"row {index}"):
            encoded.append(
                EncodedRow(*encode_pair(tokenizer, prompt, response, max_length=max_length), weight)
            )
    return encoded


def row_lengths(encoded: Sequence[EncodedRow]) -> np.ndarray:
    """Tokens of each row, prompt and response together."""
    return np.array([len(row.prompt_ids) + len(row.response_ids) for row in encoded])


def _checked(row: Mapping[str, Any], index: int) -> tuple[str, str, float]:
    key = next((name for name in RESPONSE_KEYS if name in row), None)
    if "prompt" not in row or key is None:
        raise ValueError(f"row {index} needs prompt and one of {RESPONSE_KEYS}; it has {sorted(row)}")
    for name in ("prompt", key):
        if not isinstance(row[name], str):
            raise ValueError(f"row {index}: {name} must be text; got {row[name]!r}")
    if not row[key].strip():
        raise ValueError(f"row {index}: {key} is empty, so there is nothing to learn: drop the row")
    weight = row.get("weight", 1.0)
    if not (isinstance(weight, int | float) and 0 < weight < math.inf):
        raise ValueError(f"row {index}: weight must be a finite number > 0; got {weight!r}")
    return row["prompt"], row[key], weight


def token_weights(row: EncodedRow, prompt_weight: float) -> list[float]:
    """Return the weights of tokens 1 to T - 1 of a row; the first token is never predicted."""
    return ([prompt_weight] * len(row.prompt_ids) + [row.weight] * len(row.response_ids))[1:]


def memory_efficient_training(
    model: torch.nn.Module,
    data: Rows,
    batch_size: int = 1,
    *,
    tokenizer: Any = None,
    learning_rate: float | None = None,
    epochs: int = 1,
    accumulation_steps: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> torch.nn.Module:
    """Fine-tune in little memory: bf16 autocast on a GPU, recomputed activations, small micro-batches.

    Gradients of `accumulation_steps` micro-batches of `batch_size` rows are averaged, so the result is that
    of one large batch. bf16 has the range of float32 and needs no GradScaler (fp16 does). transformers
    switches gradient checkpointing off silently in `model.eval()`: the model trains in train mode, and
    dropout is off by p = 0 (as `load_model` sets it). data: rows as in `sft`. Returns the model given.
    """
    from rlhf_helpers.core.models import tokenizer_for

    settings = TrainingSettings(
        learning_rate=learning_rate,
        accumulation_steps=accumulation_steps,
        gradient_checkpointing=True,
        seed=seed,
        progress=progress,
    )
    sft(model, tokenizer or tokenizer_for(model), data, settings, epochs=epochs, batch_size=batch_size)
    return model
