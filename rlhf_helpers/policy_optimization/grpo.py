"""GRPO: rewards standardized within a prompt's samples, PPO's clip, no value head. Lesson 2.

Left out of the paper's algorithm: the reference is not renewed between rounds, and the reward model is not
trained further; `iterative_rlhf` does both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.policy_losses import clipped_policy_loss, group_advantages, kl_estimate
from rlhf_helpers.core.tensors import masked_sum, require_shapes
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.policy_optimization.on_policy import (
    Batch,
    PolicyRun,
    RunOptions,
    UpdateMetrics,
    log_step,
    minibatches,
    outputs_now,
    sample_batch,
    start_run,
)
from rlhf_helpers.policy_optimization.reinforce import PolicyLoss, RLOOSettings


@dataclass(frozen=True)
class GRPOSettings(RLOOSettings):
    """Settings of GRPO, in the paper's form; scale=False and length_mean=False make it "Dr. GRPO"."""

    cliprange: float = 0.2  # acts from the second epoch or minibatch on; before that the ratio is 1
    scale: bool = True  # divide by the group's std: a prompt weighs the same however its rewards spread
    length_mean: bool = True  # average over a response's tokens; False: sum, over the constant max_new_tokens

    def __post_init__(self) -> None:
        """Refuse a cliprange outside (0, 1) as well."""
        super().__post_init__()
        require_fields(self, "cliprange", above=0, below=1)


def grpo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: GRPOSettings,
    *,
    loss_fn: PolicyLoss = clipped_policy_loss,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place by GRPO.

    A_i = (R_i - mean) / (std + 1e-4);  loss = mean_i 1/|y_i| sum_t [clip loss_it + kl_coef k3_it]

    The loss starts near 0 and stays small: it does not measure progress. k3 summed over tokens is not the
    gradient of the sequence's KL (`kl_estimate`). Source: Shao et al. 2024, eq. 3; scale=False and
    length_mean=False: Liu et al. 2025. Lesson 2.

    Args:
        loss_fn: (logps, old_logps, advantages, cliprange=), each (B, T) -> (B, T).
        prompts, reward_fn, options: as in `rloo`, and so are the rows returned.

    Raises:
        ValueError: prompts, columns or rewards of the wrong shape.
    """
    run = start_run(model, tokenizer, prompts, reward_fn, settings, **options)
    for _ in run.engine.steps():
        # Collect: G responses to each prompt, and what they earn.
        batch = sample_batch(run)
        # No KL in the reward: it is a term of the loss, and the group's std must not see it.
        groups = batch.penalized_scores.view(-1, settings.samples_per_prompt)
        advantages = group_advantages(groups, scale=settings.scale).flatten()
        metrics = grpo_update(run, batch, advantages, loss_fn=loss_fn)
        log_step(run, batch, batch.penalized_scores, metrics)
    return run.engine.history


def grpo_update(
    run: PolicyRun, batch: Batch, advantages: Float[Tensor, "B"], *, loss_fn: PolicyLoss = clipped_policy_loss
) -> dict[str, float]:
    """Learn from a batch: epochs x minibatches optimizer steps on the loss of `grpo`; return the metrics."""
    settings, engine, rollout = run.settings, run.engine, batch.rollout
    metrics = UpdateMetrics(run)
    # Every token gets its response's advantage.
    per_token = advantages.unsqueeze(1).expand_as(rollout.old_logps)
    # 1 / |y_i|, or the same constant for all: then a long response weighs as much per token as a short one.
    lengths = rollout.response_lengths if settings.length_mean else settings.max_new_tokens
    weights = rollout.response_mask / torch.as_tensor(lengths).view(-1, 1)
    for minibatch in minibatches(run, len(rollout)):
        responses = engine.sum(len(minibatch))  # of all processes
        for indices in minibatch.tensor_split(settings.accumulation_steps):
            part, mask = rollout[indices], rollout.response_mask[indices]
            logps, entropies = outputs_now(run, part)
            metrics.add_stats(logps, entropies, part, cliprange=settings.cliprange)
            # Two ratios: the clip is against the policy that sampled, the KL against the reference.
            clip_loss = loss_fn(logps, part.old_logps, per_token[indices], cliprange=settings.cliprange)
            require_shapes("B T", logps=logps, loss_fn=clip_loss)
            k3 = kl_estimate(logps, batch.ref_logps[indices], estimator="k3")
            policy_loss = masked_sum(weights[indices] * clip_loss, mask) / responses
            kl = masked_sum(weights[indices] * k3, mask) / responses
            entropy = masked_sum(weights[indices] * entropies, mask) / responses
            loss = policy_loss + settings.kl_coef * kl - settings.entropy_coef * entropy
            engine.backward(loss, rows=batch.prompt_rows)
            metrics.add_losses(policy=policy_loss, kl=settings.kl_coef * kl)
            metrics.add_losses(entropy=-settings.entropy_coef * entropy)
        engine.optimizer_step()
        metrics.optimizer_steps += 1
    return metrics.row()
