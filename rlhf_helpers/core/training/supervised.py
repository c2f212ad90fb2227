"""Supervised fine-tuning, the first of the three stages: imitate given answers, token by token."""

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rlhf_helpers.core.text import encode_pair, encode_prompt, encode_response
from rlhf_helpers.core.training.engine import Engine
from rlhf_helpers.core.training.history import History
from rlhf_helpers.core.training.settings import TrainingSettings

RESPONSE_KEYS = ("completion", "response", "chosen")
WINDOW = 16  # optimiser steps whose rows are sorted by length together

Rows = Sequence[dict[str, Any]] | Callable[[int], Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised rows end to end in one array: row i is tokens[starts[i]:starts[i + 1]]."""

    tokens: np.ndarray
    starts: np.ndarray
    prompt_lengths: np.ndarray
    weights: np.ndarray  # of each row's response tokens

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, prompt and response together."""
        return np.diff(self.starts)

    @property
    def checksum(self) -> int:
        """CRC-32 of tokens and weights: a run must not be resumed on other data."""
        return zlib.crc32(self.weights, zlib.crc32(self.tokens))


def sft(
    model: torch.nn.Module, tokenizer: Any, rows: Rows, settings: TrainingSettings,
    *, epochs: int = 1, batch_size: int = 16, prompt_weight: float = 0.0, max_length: int | None = None,
    bucket: bool = True, resume: bool = False,
) -> History:  # fmt: skip
    """Maximise the likelihood of the responses: loss = sum_t w_t (-log p(y_t | y_<t)) / sum_t w_t.

    w_t is 1 (the row's `weight`, where it has one) on response tokens, the closing EOS included: without it
    a model never learns to stop; `prompt_weight` on prompt tokens, 0 on padding. The sums run over the whole
    batch of an optimiser step, batch_size x accumulation_steps rows over all processes, so long answers are
    not diluted by short ones.

    rows: dicts with prompt and completion, response or chosen; a list, a datasets.Dataset, anything with
    len and [i], or a function epoch -> such rows (as many each epoch) for data made on the fly.
    bucket: batches of rows of similar length, in seeded random order: less padding, the same rows an epoch.
    resume: continue from the newest checkpoint of settings.run_dir, if there is one.
    Returns a row a step: loss, token_accuracy (response tokens), learning_rate, grad_norm.
    Raises ValueError naming the row for a missing or empty field. Source: Ouyang et al. 2022, section 3.5.
    """
    _check_arguments(tokenizer, epochs, batch_size, prompt_weight)
    group = batch_size * settings.accumulation_steps
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    encoded = encode_rows(tokenizer, rows(0) if callable(rows) else rows, max_length=limit)
    per_epoch = -(-len(encoded) // group)
    facts = {"epochs": epochs, "batch_size": batch_size, "prompt_weight": prompt_weight, "bucket": bucket}
    facts |= {"rows": len(encoded), "max_length": limit, "data_checksum": encoded.checksum}
    was_training = model.training
    sizes = {"total_steps": epochs * per_epoch, "updates_per_step": settings.accumulation_steps}
    engine = Engine(model, settings, **sizes, must_match=facts)
    if resume:
        engine.resume()
    plan = None
    for step in engine.steps():
        epoch, place = divmod(step, per_epoch)
        if plan is None or place == 0:
            if callable(rows) and epoch > 0:
                encoded = encode_rows(tokenizer, rows(epoch), max_length=limit)
                if (count := len(encoded)) != facts["rows"]:
                    told = f"rows({epoch}) returned {count} rows, rows(0) {facts['rows']}"
                    raise ValueError(f"{told}: give as many each epoch")
            plan = epoch_batches(encoded.lengths, group, seed=[settings.seed, epoch], bucket=bucket)
        engine.log(_train_step(engine, encoded, plan[place], prompt_weight, tokenizer.pad_token_id))
    model.train(was_training)
    return engine.history


def _check_arguments(tokenizer: Any, epochs: int, batch_size: int, prompt_weight: float) -> None:
    if not 0 <= prompt_weight < math.inf:
        raise ValueError(f"prompt_weight must be finite and >= 0; got {prompt_weight}")
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be >= 1; got {epochs} and {batch_size}")
    if tokenizer.pad_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no pad token: load_model adds one")


def _train_step(
    engine: Engine, encoded: EncodedRows, group: np.ndarray, prompt_weight: float, pad_id: int
) -> dict[str, float]:
    """All updates of one optimiser step, each loss scaled so that their mean is that of the whole group."""
    parts = engine.settings.accumulation_steps
    rank, ranks = engine.accelerator.process_index, engine.accelerator.num_processes
    weight_sum, response_sum = token_weights(encoded, group, prompt_weight)
    share, losses, hits = parts * ranks, [], []
    for part in np.array_split(group, parts):
        mine = part[rank::ranks]
        tensors = collate(encoded, mine if len(mine) else group[:1], prompt_weight, pad_id)
        ids, mask, weights, is_response = (t.to(engine.device, non_blocking=True) for t in tensors)
        if not len(mine):  # a small last batch leaves some process idle: it computes with weight 0
            weights, is_response = weights * 0, is_response * 0
        loss, hit = sft_loss(engine.model, ids, mask, weights, is_response)
        engine.update(loss * (share / weight_sum), rows=group.tolist())
        losses.append(loss.detach() * (ranks / weight_sum))
        hits.append(hit * (ranks / response_sum))
    return {"loss": torch.stack(losses).sum().item(), "token_accuracy": torch.stack(hits).sum().item()}


def sft_loss(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, weights: torch.Tensor,
    is_response: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weighted sum of -log p over a right-padded batch, and how many response tokens were ranked first.

    input_ids, attention_mask (B, T); weights, is_response (B, T - 1), aligned with tokens 1 to T - 1.
    Both are sums: the caller divides by the total weight of the whole batch.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = input_ids[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(weights)
    with torch.no_grad():
        right = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1) >= logits.amax(-1)
    return (nll * weights).sum(), (right * is_response).sum()


def encode_rows(
    tokenizer: Any, rows: Sequence[dict[str, Any]], *, max_length: int | None = None
) -> EncodedRows:
    """Tokenise every row once; ValueError names the row whose prompt or response is missing or empty."""
    if len(rows) == 0:
        raise ValueError("there are no rows to train on")
    tokens: list[int] = []
    known: dict[str, list[int]] = {}
    starts, prompt_lengths, weights = [0], [], []
    for index in range(len(rows)):
        prompt, response, weight = _checked(rows[index], index)
        if prompt not in known:  # a world has fewer prompts than rows; their template is the slow part
            known[prompt] = encode_prompt(tokenizer, prompt)
        prompt_ids, response_ids = known[prompt], encode_response(tokenizer, response)
        if not prompt_ids or len(prompt_ids) + len(response_ids) > (max_length or math.inf):
            prompt_ids, response_ids = encode_pair(tokenizer, prompt, response, max_length=max_length)
        tokens += [*prompt_ids, *response_ids]
        starts.append(len(tokens))
        prompt_lengths.append(len(prompt_ids))
        weights.append(weight)
    ids, weights = np.array(tokens, np.int64), np.array(weights, np.float32)
    return EncodedRows(ids, np.array(starts), np.array(prompt_lengths), weights)


def _checked(row: dict[str, Any], index: int) -> tuple[str, str, float]:
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


def epoch_batches(lengths: np.ndarray, group: int, *, seed: list[int], bucket: bool) -> list[np.ndarray]:
    """Cut a seeded permutation of the rows into groups of `group`; the last may be smaller.

    With `bucket`, windows of 16 groups are sorted by length before the cut and the groups shuffled after it.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(lengths))
    if not bucket:
        return [order[i : i + group] for i in range(0, len(order), group)]
    windows = (order[i : i + WINDOW * group] for i in range(0, len(order), WINDOW * group))
    windows = [window[np.argsort(lengths[window], kind="stable")] for window in windows]
    groups = [window[i : i + group] for window in windows for i in range(0, len(window), group)]
    return [groups[i] for i in rng.permutation(len(groups))]


def token_weights(encoded: EncodedRows, group: np.ndarray, prompt_weight: float) -> tuple[float, int]:
    """Total weight and number of response tokens of a group; the first token of a row is never predicted."""
    lengths, prompts = encoded.lengths[group], np.maximum(encoded.prompt_lengths[group], 1)
    responses = lengths - prompts
    weighted = float((responses * encoded.weights[group]).sum())
    return weighted + prompt_weight * int((prompts - 1).sum()), int(responses.sum())


def collate(
    encoded: EncodedRows, group: np.ndarray, prompt_weight: float, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded input_ids and attention_mask (B, T), weights and is_response (B, T - 1)."""
    starts, lengths = encoded.starts[group, None], encoded.lengths[group, None]
    places = np.arange(lengths.max())
    real = places < lengths
    ids = np.where(real, encoded.tokens[np.where(real, starts + places, 0)], pad_id)
    is_response = (real & (places >= encoded.prompt_lengths[group, None]))[:, 1:]
    weights = np.where(is_response, encoded.weights[group, None], prompt_weight * real[:, 1:])
    arrays = ids, real.astype(np.int64), weights.astype(np.float32), is_response
    return tuple(torch.from_numpy(array) for array in arrays)


def memory_efficient_training(
    model: torch.nn.Module, data: Rows, batch_size: int = 1,
    *, tokenizer: Any = None, learning_rate: float = 1e-5, epochs: int = 1, accumulation_steps: int = 8,
    seed: int = 0, progress: bool = True,
) -> torch.nn.Module:  # fmt: skip
    """Fine-tune in little memory: bf16 autocast on a GPU, recomputed activations, small micro-batches.

    Gradients of `accumulation_steps` micro-batches of `batch_size` rows are averaged, so the result is that
    of one large batch. bf16 has the range of float32 and needs no GradScaler (fp16 does). transformers
    switches gradient checkpointing off silently in `model.eval()`: the model trains in train mode, and
    dropout is off by p = 0 (as `load_model` sets it). data: rows as in `sft`. Returns the model given.
    """
    from rlhf_helpers.core.models import tokenizer_for

    settings = TrainingSettings(
        learning_rate=learning_rate, accumulation_steps=accumulation_steps, gradient_checkpointing=True,
        seed=seed, progress=progress,
    )  # fmt: skip
    sft(model, tokenizer or tokenizer_for(model), data, settings, epochs=epochs, batch_size=batch_size)
    return model
