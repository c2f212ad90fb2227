"""REINFORCE and RLOO: raise the log-probs of responses that earn more than their baseline. Lesson 2.

The two differ in one line, the advantages: a response is compared with nothing, with all other responses of
the step (REINFORCE), or with the other responses to the same prompt (RLOO).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.policy_losses import rloo_advantages
from rlhf_helpers.core.rollouts import sequence_kl
from rlhf_helpers.core.tensors import masked_sum, require_shapes
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.policy_optimization.on_policy import (
    Batch,
    OnPolicySettings,
    PolicyRun,
    RunOptions,
    UpdateMetrics,
    log_step,
    minibatches,
    outputs_now,
    sample_batch,
    start_run,
)

PolicyLoss = Callable[..., Tensor]


@dataclass(frozen=True)
class ReinforceSettings(OnPolicySettings):
    """Settings of REINFORCE."""

    baseline: bool = True  # compare with the mean of all other samples of the step, whatever their prompt


@dataclass(frozen=True)
class RLOOSettings(OnPolicySettings):
    """Settings of RLOO; 4 samples per prompt, as in the paper, at least 2: the others are the baseline."""

    def __post_init__(self) -> None:
        """Refuse groups of one as well."""
        super().__post_init__()
        require_fields(self, "samples_per_prompt", whole=True, at_least=2)


def reinforce_loss(
    logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Policy gradient per token, to be minimized: -A_t log pi(y_t | y_<t).

    Its gradient is that of the expected reward; its value says nothing about progress. `old_logps` is not
    used: each batch is sampled by the policy that it updates. Williams 1992. Lesson 2. Raises ValueError
    where shapes differ.
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, advantages=advantages)
    return -advantages * logps


def reinforce(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: ReinforceSettings,
    *,
    loss_fn: PolicyLoss = reinforce_loss,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place by REINFORCE.

    A_i = R_i, or with settings.baseline R_i minus the mean of the step's other samples.

    Both have the same gradient in expectation; the baseline takes out the noise that the reward's offset
    brings, however large. All else as in `rloo`. Williams 1992. Lesson 2.
    """
    run = start_run(model, tokenizer, prompts, reward_fn, settings, **options)
    for _ in run.engine.steps():
        # Collect: responses of the policy as it is now, and what they earn.
        batch = sample_batch(run)
        # The KL is part of the reward, as one number per response, and constant during the update.
        rewards = batch.penalized_scores - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        advantages = rewards
        if settings.baseline:
            # Leave-one-out over the whole step: a baseline that knows R_i would bias the gradient.
            advantages = rloo_advantages(rewards.view(1, -1)).flatten()
        metrics = reinforce_update(run, batch, advantages, loss_fn=loss_fn)
        log_step(run, batch, rewards, metrics)
    return run.engine.history


def rloo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: RLOOSettings,
    *,
    advantage_fn: Callable[[Tensor], Tensor] = rloo_advantages,
    loss_fn: PolicyLoss = reinforce_loss,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place by RLOO: REINFORCE against the other samples of the same prompt.

    R_i = score_i - kl_coef sum_t (log pi - log pi_ref) - missing_eos_penalty [no EOS] - length_penalty |y_i|
    A_i = R_i - mean of the other samples' R;   loss = mean_i sum_t -A_i log pi(y_it)

    A prompt whose samples all earn the same reward gives no gradient. With more than one epoch or minibatch
    the later steps are off-policy, and this loss does not correct for it. Source: Ahmadian et al. 2024.
    Lesson 2.

    Args:
        prompts: texts; a step draws prompts_per_step of them in seeded order, each once per epoch.
        reward_fn: a RewardFn or a reward model.
        advantage_fn: rewards (P, G), one row per prompt -> advantages (P, G); pass your own here.
        loss_fn: (logps, old_logps, advantages), each (B, T) -> (B, T); pass your own here.
        options: see `RunOptions`.

    Returns:
        One row per step, measured before its update: the names of `rollout_metrics`, loss, policy/entropy
        (nats per token), policy/approxkl and val/ratio (0 and 1 at the start, or something is wrong).

    Raises:
        ValueError: prompts, columns or rewards of the wrong shape.
    """
    run = start_run(model, tokenizer, prompts, reward_fn, settings, **options)
    for _ in run.engine.steps():
        # Collect: responses of the policy as it is now, and what they earn.
        batch = sample_batch(run)
        # The KL is part of the reward, as one number per response, and constant during the update.
        rewards = batch.penalized_scores - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        advantages = advantage_fn(rewards.view(-1, settings.samples_per_prompt)).flatten()
        metrics = reinforce_update(run, batch, advantages, loss_fn=loss_fn)
        log_step(run, batch, rewards, metrics)
    return run.engine.history


def reinforce_update(
    run: PolicyRun, batch: Batch, advantages: Float[Tensor, "B"], *, loss_fn: PolicyLoss = reinforce_loss
) -> dict[str, float]:
    """Learn from a batch: epochs x minibatches optimizer steps on -A log pi; return the metrics.

    loss = mean over responses of sum_t [loss_fn(logp_t, old_logp_t, A) - entropy_coef H_t]
    """
    settings, engine, rollout = run.settings, run.engine, batch.rollout
    metrics = UpdateMetrics(run)
    # Every token gets its response's advantage.
    per_token = advantages.unsqueeze(1).expand_as(rollout.old_logps)
    for minibatch in minibatches(run, len(rollout)):
        responses = engine.sum(len(minibatch))  # of all processes
        for indices in minibatch.tensor_split(settings.accumulation_steps):
            part, mask = rollout[indices], rollout.response_mask[indices]
            logps, entropies = outputs_now(run, part)
            metrics.add_stats(logps, entropies, part)
            # Summed over tokens: the log-prob of a response is a sum. With a mean over its tokens, a long
            # bad response would cost no more than a short one.
            losses = loss_fn(logps, part.old_logps, per_token[indices])
            require_shapes("B T", logps=logps, loss_fn=losses)
            policy_loss = masked_sum(losses, mask) / responses
            entropy = masked_sum(entropies, mask) / responses
            loss = policy_loss - settings.entropy_coef * entropy
            engine.backward(loss, rows=batch.prompt_rows)
            metrics.add_losses(policy=policy_loss, entropy=-settings.entropy_coef * entropy)
        engine.optimizer_step()
        metrics.optimizer_steps += 1
    return metrics.row()
