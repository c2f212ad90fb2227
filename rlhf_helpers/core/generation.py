"""Sampling from a policy, and the log-probabilities of what was sampled.

`generate` turns prompts into a `Rollout`: texts, token ids and the log-prob of every sampled token at the
sampling temperature. It knows no top-k, top-p or suppressed EOS: the log-probs would then be those of another
distribution than the one sampled from, and the KL to the reference could come out negative.

One layout everywhere, P prompt and T response columns: prompts left-padded, responses right-padded, so that
the seam between them is the same column in every row.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf_helpers.core.models import require_cache, usable_positions
from rlhf_helpers.core.shared_prompts import Pair, answer_outputs
from rlhf_helpers.core.tensors import batches_by_length, pad_left, pad_right, require_number
from rlhf_helpers.core.text import decode_responses, encode_pair, encode_prompt, end_id, naming
from rlhf_helpers.core.training import progress
from rlhf_helpers.core.training.distributed import sum_over_shards

# Finished rows leave the batch once they are this share of it; each time the cache is copied.
DROP_SHARE = 0.25
ANSWERS_PER_FORWARD = 16  # scored together; all processes hold equally many, and so make as many passes


@dataclass(frozen=True, eq=False)
class Rollout:
    """B responses sampled from a policy, with all that an update needs.

    input_ids, attention_mask: (B, L), L = P + T, prompt left-padded, response right-padded; mask 1 is real.
    response_mask: (B, T), true on response tokens, EOS included: the tokens that are trained on.
    old_logps: (B, T), log-prob in nats of each sampled token at the sampling temperature; 0 on padding.
    ended: (B,), whether the response closed with EOS; false where max_new_tokens cut it off.
    greedy: decoded without chance, so no sample of the policy: the on-policy loops refuse it.
    """

    prompts: list[str]
    responses: list[str]
    input_ids: Int[Tensor, "B L"]
    attention_mask: Int[Tensor, "B L"]
    response_mask: Bool[Tensor, "B T"]
    old_logps: Float[Tensor, "B T"]
    ended: Bool[Tensor, "B"]
    greedy: bool = False

    def __len__(self) -> int:
        """Count the rows."""
        return len(self.prompts)

    def __getitem__(self, index: slice | Sequence[int] | Tensor) -> "Rollout":
        """Return the rows of a slice, list or tensor of indices, or boolean mask; the padding stays."""
        if isinstance(index, int):
            raise TypeError(f"a Rollout is indexed by a slice or a list: use [{index}:{index + 1}]")
        rows = torch.arange(len(self))[index.cpu() if isinstance(index, Tensor) else index].tolist()
        part = copy.copy(self)
        # The token pairs are read from the tensors once, and handed on to every part.
        for name, value in {**vars(self), "token_pairs": self.token_pairs}.items():
            if isinstance(value, Tensor):
                vars(part)[name] = value[rows]
            elif isinstance(value, list):
                vars(part)[name] = [value[row] for row in rows]
        return part

    @property
    def response_ids(self) -> Int[Tensor, "B T"]:
        """The response columns of input_ids."""
        return self.input_ids[:, -self.response_mask.shape[1] :]

    @cached_property
    def token_pairs(self) -> list[Pair]:
        """Token ids of prompt and response of each row, without padding."""
        width, pairs = self.response_mask.shape[1], []
        for ids, real in zip(self.input_ids.cpu(), self.attention_mask.bool().cpu(), strict=True):
            pairs.append((ids[:-width][real[:-width]].tolist(), ids[-width:][real[-width:]].tolist()))
        return pairs

    @property
    def response_lengths(self) -> Int[Tensor, "B"]:
        """Response tokens of each row, EOS included."""
        return self.response_mask.sum(-1)


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    greedy: bool = False,
    batch_size: int = 128,
) -> Rollout:
    """Sample one response to each prompt from softmax(logits / temperature); repeat a prompt for more.

    A response ends with EOS, which belongs to it and to its mask, or after max_new_tokens (`ended` is false).
    seed: the samples are a function of model, prompts, max_new_tokens and seed, whatever the batch size;
    torch's global generator is neither read nor moved. None draws from the global generator.
    greedy: take the most likely token; old_logps are then those at temperature 1, and temperature must be 1.
    The rollout says so, and the on-policy loops refuse it.
    batch_size: rows decoded together; prompts are sorted by length for it and put back in order.

    old_logps equal those of `rollout_logps` at the same temperature to 1e-5 per token in float32; in bfloat16
    the cached and the uncached pass round differently, by about 1e-2.

    Raises:
        ValueError: A setting is out of its range, there is no prompt, or `encode_prompts` refuses one.
    """
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts must be a list of at least one text, got {prompts!r}")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(f"max_new_tokens and batch_size must be >= 1, got {max_new_tokens} and {batch_size}")
    require_number("temperature", temperature, above=0)
    if greedy and temperature != 1.0:
        raise ValueError(f"greedy decoding has no temperature: leave it at 1, got {temperature}")
    prompt_rows = encode_prompts(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
    # One number per row and step, all at once: no sample depends on its neighbours or on where they end.
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    uniforms = None if greedy else torch.rand(len(prompts), max_new_tokens, generator=generator)
    stops = _stop_ids(model, tokenizer)
    batches = batches_by_length([-len(row) for row in prompt_rows], batch_size)  # the longest first
    parts = []
    with eval_mode(model), torch.no_grad():
        for batch in progress.track(batches, "generating"):
            noise = None if uniforms is None else uniforms[batch].to(stops.device)
            rows = [prompt_rows[i] for i in batch]
            limits = {"steps": max_new_tokens, "stops": stops, "pad_id": tokenizer.pad_token_id}
            parts.append(_decode(model, rows, noise, temperature=temperature, **limits))
    back = torch.tensor([i for batch in batches for i in batch]).argsort().to(stops.device)
    ids, logps, mask = (torch.cat(part)[back] for part in zip(*parts, strict=True))
    # Columns that no response reaches are cut off.
    width = int(mask.sum(-1).max())
    ids, logps, mask = ids[:, :width], logps[:, :width], mask[:, :width]
    texts = [row[real].tolist() for row, real in zip(ids.cpu(), mask.cpu(), strict=True)]
    both = _joined(prompt_rows, ids, mask.long(), tokenizer.pad_token_id)
    ended = (torch.isin(ids, stops) & mask).any(-1)  # what ends a response is its last token
    responses = decode_responses(tokenizer, texts)
    progress.latest_samples = prompts, responses
    return Rollout([*prompts], responses, *both, mask, logps, ended, greedy)


def encode_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_length: int | None = None,
) -> list[list[int]]:
    """Tokenise prompts that `model` is to answer, each distinct text once.

    A loop calls this on all its prompts before the first step, so that a prompt which cannot be sampled from
    is found there and not in the step that happens to draw it.

    Raises:
        ValueError: Names the row of a prompt that is not a text, that the chat template refuses, or that with
            max_new_tokens does not fit into max_length (default: the model's context); or the model keeps no
            key-value cache.
    """
    require_cache(model)
    context, known = max_length or usable_positions(model), {}
    for row, prompt in enumerate(prompts):
        if prompt in known:
            continue
        with naming(f"prompt {row}"):
            known[prompt] = encode_prompt(tokenizer, prompt)
        count = len(known[prompt])
        if context is not None and count + max_new_tokens > context:
            raise ValueError(
                f"prompt {row} has {count} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
                f"context or max_length of {context}: shorten the prompt ({prompt[:60]!r}) or max_new_tokens"
            )
    return [known[prompt] for prompt in prompts]


def response_logits(
    model: nn.Module,
    input_ids: Int[Tensor, "B L"],
    attention_mask: Int[Tensor, "B L"],
    *,
    response_length: int,
) -> Float[Tensor, "B T V"]:
    """Compute the logits that predict the last `response_length` columns: already shifted, (B, T, V).

    Positions come from the attention mask, so left padding changes nothing. Keeps gradients. Only the columns
    asked for are multiplied by the vocabulary, which is most of the memory.
    """
    require_cache(model)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=token_positions(attention_mask),
        use_cache=False,
        logits_to_keep=response_length + 1,
    ).logits
    return logits[:, -response_length - 1 : -1]


def rollout_logps(model: nn.Module, rollout: Rollout, *, temperature: float = 1.0) -> Float[Tensor, "B T"]:
    """Recompute the log-probs of a rollout's sampled tokens under `model`, with gradient; 0 on padding.

    With the policy that sampled, and its temperature, these are old_logps: the ratio is 1. Scores the sampled
    ids: text decoded and tokenised again may be other ids.
    """
    return rollout_outputs(model, rollout, temperature=temperature)[0]


def rollout_outputs(model: nn.Module, rollout: Rollout, **wanted: Any) -> list[Float[Tensor, "B T"]]:
    """Compute log-probs, entropies or values of a rollout's tokens, as `answer_outputs` does; (B, T) each."""
    pairs, width, parts = rollout.token_pairs, rollout.response_mask.shape[1], []
    for start in progress.track(range(0, len(pairs), ANSWERS_PER_FORWARD), "scoring"):
        outputs = answer_outputs(model, pairs[start : start + ANSWERS_PER_FORWARD], **wanted)
        parts.append([F.pad(output, (0, width - output.shape[1])) for output in outputs])
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def sequence_logps(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    temperature: float = 1.0,
    max_length: int | None = None,
) -> tuple[Float[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Compute the log-prob of every token of given responses, EOS included: (logps (B, T), mask (B, T)).

    Keeps gradients; 0 on padding, so logps.sum(-1) is log p(response | prompt). max_length cuts as in
    `encode_pair` (default: the model's context).
    """
    rollout = _lay_out(model, tokenizer, prompts, responses, max_length)
    return rollout_logps(model, rollout, temperature=temperature), rollout.response_mask


def rollout_from_text(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    temperature: float = 1.0,
    max_length: int | None = None,
) -> Rollout:
    """Treat given responses as if `model` had sampled them: a Rollout whose old_logps are recomputed.

    They were not sampled by the policy, so an update on them is off-policy although its first ratio is 1.
    """
    rollout = _lay_out(model, tokenizer, prompts, responses, max_length)
    with torch.no_grad():
        return replace(rollout, old_logps=rollout_logps(model, rollout, temperature=temperature).float())


def _decode(
    model: nn.Module,
    prompt_rows: list[list[int]],
    noise: Tensor | None,
    *,
    temperature: float,
    steps: int,
    stops: Tensor,
    pad_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample over one batch: response ids, log-probs and mask (B, steps); greedily where noise is None."""
    device, count = stops.device, len(prompt_rows)
    out_ids = torch.full((count, steps), pad_id, device=device)
    out_logps = torch.zeros(count, steps, device=device)
    out_mask = torch.zeros(count, steps, dtype=torch.bool, device=device)

    rows = torch.arange(count, device=device)  # where each row of the running batch belongs
    running = torch.ones(count, dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)  # pyright: ignore[reportArgumentType]
    # A prompt that is sampled several times is read once; its keys and values are copied to every sample.
    distinct = {row: index for index, row in enumerate(dict.fromkeys(map(tuple, prompt_rows)))}
    source = torch.tensor([distinct[tuple(row)] for row in prompt_rows], device=device)
    ids, mask = pad_left(list(distinct), pad_id, device=device)
    positions, width = token_positions(mask), mask.shape[1]
    mask = torch.cat([mask, mask.new_ones(len(mask), steps)], dim=1)
    for step in progress.track(range(steps), "tokens of a batch"):
        inputs = {"input_ids": ids, "attention_mask": mask[:, : width + step], "position_ids": positions}
        logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        if step == 0:
            cache.batch_select_indices(source)
            logits, mask, positions = logits[source], mask[source], positions[source]
        logps = torch.log_softmax(logits.float() / temperature, dim=-1)
        tokens = logps.argmax(-1)
        if noise is not None:
            # By the inverse of the cumulative sum; times the total, which rounding leaves a little off 1, so
            # that the last token is never overshot.
            below = logps.exp().cumsum(-1)
            tokens = torch.searchsorted(below, noise[:, step, None] * below[:, -1:], right=True).squeeze(-1)
        logps = logps.gather(-1, tokens[:, None]).squeeze(-1)
        out_ids[rows, step] = torch.where(running, tokens, pad_id)
        out_logps[rows, step] = torch.where(running, logps, 0.0)
        out_mask[rows, step] = running
        running = running & ~torch.isin(tokens, stops)
        left = int(running.sum())
        # With sharded weights every process calls the model as often as the one with the longest response.
        if sum_over_shards(model, left) == 0:
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        if 0 < left <= (1 - DROP_SHARE) * len(rows):
            keep = running.nonzero().flatten()
            cache.batch_select_indices(keep)
            rows, running, mask, ids, positions = (t[keep] for t in (rows, running, mask, ids, positions))
            noise = None if noise is None else noise[keep]
    return out_ids, out_logps, out_mask


def _lay_out(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], responses: Sequence[str], max_length: int | None
) -> Rollout:
    """Tokenise pairs into the layout of a Rollout, with old_logps 0."""
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(f"needs as many prompts as responses, got {len(prompts)} and {len(responses)}")
    limit, pairs = max_length or usable_positions(model), []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        with naming(f"row {row}"):
            pairs.append(encode_pair(tokenizer, prompt, response, max_length=limit))
    stops = _stop_ids(model, tokenizer)
    ids, mask = pad_right([r for _, r in pairs], tokenizer.pad_token_id, device=stops.device)
    ended = torch.isin(torch.tensor([r[-1] for _, r in pairs], device=stops.device), stops)
    both = _joined([p for p, _ in pairs], ids, mask, tokenizer.pad_token_id)
    return Rollout([*prompts], [*responses], *both, mask.bool(), torch.zeros_like(ids).float(), ended)


def _joined(
    prompt_rows: list[list[int]], ids: Tensor, mask: Tensor, pad_id: int
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Put left-padded prompts before right-padded responses: ids and mask."""
    prompt_ids, prompt_mask = pad_left(prompt_rows, pad_id, device=ids.device)
    return torch.cat([prompt_ids, ids], dim=1), torch.cat([prompt_mask, mask], dim=1)


def token_positions(attention_mask: Tensor) -> Tensor:
    """Number the real tokens of each row from 0; padding gets 0."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def _stop_ids(model: nn.Module, tokenizer: Any) -> Int[Tensor, "K"]:
    """EOS, what the chat template closes a turn with, and what the model's own generation config lists."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = listed if isinstance(listed, list) else [listed]
    ids = {i for i in (end_id(tokenizer), tokenizer.eos_token_id, *listed) if i is not None}
    return torch.tensor(sorted(ids), device=next(model.parameters()).device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to eval mode (gradient checkpointing in train mode would disable the cache), then back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
