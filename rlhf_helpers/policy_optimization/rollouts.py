"""What every on-policy loop does before it learns: sample, score, compare with the reference, measure."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import Rollout, generate, rollout_outputs
from rlhf_helpers.core.models import RewardFn, as_reward_fn
from rlhf_helpers.core.policy_losses import kl_estimate
from rlhf_helpers.core.tensors import masked_mean, require_shapes
from rlhf_helpers.core.text import Columns, require_columns


def collect(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Rollout:
    """Sample G = samples_per_prompt responses to each prompt; B = G len(prompts) rows, one prompt's together.

    Row i answers prompt i // G, so `rewards.view(-1, G)` puts the samples of a prompt into one row.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    return generate(
        model, tokenizer, repeated, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )


def score(reward_fn: RewardFn, rollout: Rollout, columns: Columns | None = None) -> Float[Tensor, "B"]:
    """Ask the reward for one finite number per response, (B,) float32 without gradient.

    columns: further columns of the prompts' data (references, tests), one entry per row of the rollout.
    Raises what `as_reward_fn` raises: no tensor, another shape than (B,), a number that is not finite.
    """
    scores = as_reward_fn(reward_fn)(rollout.prompts, rollout.responses, **(columns or {}))
    return scores.to(rollout.old_logps.device)


def repeat_columns(columns: Columns, rows: Sequence[int], samples_per_prompt: int) -> dict[str, list[Any]]:
    """Take the entries of these prompts, each once for every response: one per row of the rollout."""
    return {
        name: [values[row] for row in rows for _ in range(samples_per_prompt)]
        for name, values in columns.items()
    }


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


def sequence_kl(rollout: Rollout, ref_logps: Float[Tensor, "B T"]) -> Float[Tensor, "B"]:
    """k1 estimate of KL(policy || reference) a response: sum_t (old_logp_t - ref_logp_t), (B,) in nats."""
    per_token = kl_estimate(rollout.old_logps, ref_logps, estimator="k1")
    return torch.where(rollout.response_mask, per_token, 0.0).sum(-1)


def rollout_metrics(
    rollout: Rollout,
    scores: Float[Tensor, "B"],
    rewards: Float[Tensor, "B"],
    ref_logps: Float[Tensor, "B T"],
    *,
    samples_per_prompt: int,
) -> dict[str, float]:
    """What was sampled and what it earned, by TRL's names; every mean over real tokens or whole responses.

    objective/scores: mean of what the reward said, before any penalty.
    objective/rlhf_reward: mean of what the loop maximizes (`log_step`).
    objective/kl: nats per response (sum over its tokens); objective/kl_per_token: nats per token (mean over
    all tokens of the batch): a target for one is not a target for the other.
    response_length: tokens, EOS counted. frac_reward_zero_std: share of prompts all of whose samples got the
    same score, which teach nothing; absent with one sample per prompt.
    """
    require_shapes("B", scores=scores, rewards=rewards)
    mask = rollout.response_mask
    per_token = kl_estimate(rollout.old_logps, ref_logps, estimator="k1")
    groups = scores.view(-1, samples_per_prompt)
    row = {
        "objective/scores": scores.mean().item(),
        "objective/rlhf_reward": rewards.mean().item(),
        "objective/kl": sequence_kl(rollout, ref_logps).mean().item(),
        "objective/kl_per_token": masked_mean(per_token, mask).item(),
        "eos_fraction": rollout.ended.float().mean().item(),
        "response_length": mask.sum(-1).float().mean().item(),
    }
    if samples_per_prompt > 1:
        row["frac_reward_zero_std"] = (groups == groups[:, :1]).all(-1).float().mean().item()
    return row


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
