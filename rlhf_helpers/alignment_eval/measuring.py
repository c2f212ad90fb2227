"""One measurement for all evaluations: let a policy answer prompts, and score the answers."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import RewardFn, as_reward_fn, tokenizer_for
from rlhf_helpers.core.stats import numbers
from rlhf_helpers.world.gold_judge import AXES, gold_scores


def weights_fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits of a SHA-256 over names, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def gold_axes() -> dict[str, RewardFn]:
    """The world's helpfulness, harmlessness and honesty as three RewardFns: what measures, never trains."""

    def gold_axis(prompts: list[str], responses: list[str], *, axis: str, **columns: Any) -> Tensor:
        return gold_scores(prompts, responses, **columns)[axis]

    return {axis: partial(gold_axis, axis=axis) for axis in AXES}


def sample_answers(
    model: nn.Module,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    seed: int = 0,
    cache: dict[Any, list[str]] | None = None,
    **sampling: Any,
) -> list[str]:
    """Sample one answer to each prompt from a model that knows its tokenizer.

    Args:
        model: A causal LM.
        prompts: What to ask.
        max_new_tokens: Of an answer.
        seed: Of sampling.
        cache: A dictionary that keeps the answers by weights, prompts and settings from call to call. None:
            every call samples.
        **sampling: More options of `generate`: greedy, temperature.
    """
    tokenizer = tokenizer_for(model)
    sampling |= {"max_new_tokens": max_new_tokens, "seed": seed}
    if cache is None:
        return generate(model, tokenizer, prompts, **sampling).responses
    # A model that was trained further has other weights, so it is asked again.
    key = (weights_fingerprint(model), tokenizer.chat_template, repr(sampling), *prompts)
    if key not in cache:
        cache[key] = sample_answers(model, prompts, **sampling)
    return cache[key]


def measure_policy(
    model: nn.Module,
    prompts: Sequence[str],
    measures: Mapping[str, nn.Module | RewardFn],
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Let a policy answer every prompt once, and measure each answer: one row per prompt. Lesson 3.

    Args:
        model: A causal LM that knows its tokenizer.
        prompts: What to ask; they are the index of the table.
        measures: name -> reward or other measure of an answer: the columns of the table.
        columns: Further columns for the measures, one entry per prompt (base_prompt, say).
        **sampling: Of `sample_answers`.

    Raises:
        TypeError: a measure is not a reward.
    """
    prompts = list(prompts)
    # Sampling takes long, so a measure that is not a reward is refused before it.
    reward_fns = {name: as_reward_fn(measure) for name, measure in measures.items()}
    responses = sample_answers(model, prompts, **sampling)
    columns = columns or {}
    scores = {name: numbers(fn(prompts, responses, **columns)) for name, fn in reward_fns.items()}
    return pd.DataFrame(scores, index=prompts)
