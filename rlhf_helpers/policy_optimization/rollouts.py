"""What the policy and the reference say about a rollout, and how good a policy's own samples are."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout, rollout_outputs
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.rollouts import collect, repeat_columns, score
from rlhf_helpers.core.tensors import masked_mean
from rlhf_helpers.core.text import Columns, require_columns


def policy_logps(
    model: torch.nn.Module, rollout: Rollout, *, temperature: float
) -> tuple[Float[Tensor, "B T"], Float[Tensor, ""]]:
    """Log-prob of each sampled token under `model` now, (B, T), with gradient, and its entropy, without.

    Of the policy that sampled and at its temperature, the log-probs equal `rollout.old_logps`; padding is 0.
    The entropy is the mean over response tokens, in nats per token.
    """
    logps, entropies = policy_outputs(model, rollout, temperature=temperature)
    return logps, masked_mean(entropies, rollout.response_mask)


def policy_outputs(
    model: torch.nn.Module, rollout: Rollout, *, temperature: float, **wanted: Any
) -> tuple[Float[Tensor, "B T"], ...]:
    """Log-probs and entropies of the sampled tokens, with value_head= their values too: each (B, T).

    V_t is read where y_t is about to be chosen: it has seen the prompt and y_<t. Entropies in nats, without
    gradient unless entropy_gradient=True. All are 0 on padding.
    """
    return tuple(rollout_outputs(model, rollout, temperature=temperature, entropies=True, **wanted))


def evaluate_policy(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    *,
    samples: int = 1,
    seed: int = 0,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    columns: Columns | None = None,
    keep_responses: bool = False,
) -> dict[str, Any]:
    """Mean reward of a policy's own samples on given prompts, with its standard error.

    mean = average over prompts of the average over a prompt's samples;  standard_error = std of those P
    per-prompt averages / sqrt(P), so samples of one prompt do not count as independent. Returns mean,
    standard_error, n (samples in all), and with keep_responses also prompts, responses and scores, one entry
    per sample, the samples of a prompt together.

    Raises:
        ValueError: fewer than two prompts, samples < 1, or what `score` refuses.
    """
    columns = dict(columns or {})
    require_columns(prompts, columns)
    if len(prompts) < 2 or samples < 1:
        raise ValueError(
            f"a standard error needs at least 2 prompts and samples >= 1, got {len(prompts)} and {samples}"
        )
    rollout = collect(
        model,
        tokenizer,
        prompts,
        samples_per_prompt=samples,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    scores = score(reward_fn, rollout, repeat_columns(columns, range(len(prompts)), samples))
    averages = scores.double().view(-1, samples).mean(-1)
    result = {
        "mean": averages.mean().item(),
        "standard_error": averages.std().item() / math.sqrt(len(prompts)),
        "n": len(scores),
    }
    if keep_responses:
        result |= {"prompts": rollout.prompts, "responses": rollout.responses, "scores": scores.tolist()}
    return result
