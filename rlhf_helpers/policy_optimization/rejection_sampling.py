"""Rejection-sampling fine-tuning: best-of-n, then imitate the best, then again. Lesson 2."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.rollouts import sequence_kl
from rlhf_helpers.core.tensors import masked_sum
from rlhf_helpers.core.training import History
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
from rlhf_helpers.policy_optimization.reinforce import RLOOSettings


@dataclass(frozen=True)
class RejectionSamplingSettings(RLOOSettings):
    """Settings of rejection-sampling fine-tuning; samples_per_prompt is the n of best-of-n."""

    epochs: int = 2  # imitation has no ratio that could leave 1
    kl_coef: float = 0.0  # above 0 the best is the best after its KL is paid for

    def __post_init__(self) -> None:
        """Refuse more micro-batches than there are responses kept, too."""
        super().__post_init__()
        pieces = self.minibatches * self.accumulation_steps
        if self.prompts_per_step % pieces:
            raise ValueError(
                f"{type(self).__name__}: minibatches x accumulation_steps must divide the "
                f"{self.prompts_per_step} responses kept per step, got {pieces}"
            )


def rejection_sampling(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: RejectionSamplingSettings,
    **options: Unpack[RunOptions],
) -> History:
    """Sample n responses to each prompt, keep the best, fine-tune `model` in place on what was kept.

    loss = -mean over the tokens of the kept responses of log pi(y_t | y_<t)

    A policy gradient with weights 1 for the best and 0 for all others: nothing is pushed down, and by how
    much the best one wins does not matter. No KL penalty limits it, but it imitates only what the policy
    itself says. The first of equal responses is kept.
    Source: Dong et al. 2023 (RAFT); Touvron et al. 2023, section 3.2.3. Lesson 2.

    Args:
        prompts, reward_fn, options: as in `rloo`.

    Returns:
        The rows of `rloo`, and objective/best: the mean score of the kept responses.
    """
    run = start_run(model, tokenizer, prompts, reward_fn, settings, **options)
    group = settings.samples_per_prompt
    for _ in run.engine.steps():
        # Collect: n responses to each prompt, and what they earn.
        batch = sample_batch(run)
        rewards = batch.penalized_scores - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        # Keep the index of the best of each group, counted over the whole step.
        best = rewards.view(-1, group).argmax(-1)
        best = best + group * torch.arange(len(best), device=best.device)
        # Learn from those alone; the log row still describes all samples.
        metrics = imitation_update(run, replace(batch, rollout=batch.rollout[best]))
        metrics["objective/best"] = batch.scores[best].mean().item()
        log_step(run, batch, rewards, metrics)
    return run.engine.history


def imitation_update(run: PolicyRun, batch: Batch) -> dict[str, float]:
    """Learn from a batch: epochs x minibatches optimizer steps on -log pi; return the metrics."""
    settings, engine, rollout = run.settings, run.engine, batch.rollout
    metrics = UpdateMetrics(run)
    for minibatch in minibatches(run, len(rollout)):
        tokens = engine.sum(rollout.response_mask[minibatch].sum())  # of all processes
        for indices in minibatch.tensor_split(settings.accumulation_steps):
            part, mask = rollout[indices], rollout.response_mask[indices]
            logps, entropies = outputs_now(run, part)
            metrics.add_stats(logps, entropies, part)
            weights = mask / tokens  # the mean over all tokens of the minibatch
            nll = -masked_sum(weights * logps, mask)
            entropy = masked_sum(weights * entropies, mask)
            loss = nll - settings.entropy_coef * entropy
            engine.backward(loss, rows=batch.prompt_rows)
            metrics.add_losses(nll=nll, entropy=-settings.entropy_coef * entropy)
        engine.optimizer_step()
        metrics.optimizer_steps += 1
    return metrics.row()
