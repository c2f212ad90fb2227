"""PPO: a value head estimates returns, and a clipped ratio lets one batch serve several optimizer steps.

Lesson 2.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.generation import rollout_outputs
from rlhf_helpers.core.models import RewardFn, ScalarHead, state_width, usable_positions
from rlhf_helpers.core.policy_losses import (
    AdaptiveKLController,
    FixedKLController,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_shaped_rewards,
)
from rlhf_helpers.core.tensors import masked_sum, masked_whiten, require_shapes
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.resume import checksum
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.core.training.supervised import EncodedRow, encode_rows, rows_nll
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
from rlhf_helpers.policy_optimization.reinforce import PolicyLoss


@dataclass(frozen=True)
class PPOSettings(OnPolicySettings):
    """Settings of PPO; epochs=1 and minibatches=1 make it a plain actor-critic, whose ratio is always 1."""

    epochs: int = 2  # old samples are free, but the further the policy moves, the more of them are clipped
    minibatches: int = 4  # optimizer steps per epoch
    cliprange: float = 0.2  # moving the ratio further than this from 1 brings no gain
    cliprange_value: float = 0.2  # the same for the values, in units of the reward
    vf_coef: float = 0.1  # weight of the value loss: the head shares the policy's trunk: 1.0 would drown it
    gamma: float = 1.0  # a response is one short episode: no token's reward is worth less for coming later
    lam: float = 0.95  # GAE: 1 trusts the samples alone, 0 the values alone
    whiten_advantages: bool = True  # mean 0, std 1 over the step's tokens
    early_stop_kl: float | None = None  # nats per token from the sampler, above which a step ends early
    kl_target: float | None = None  # nats per response from the reference; None keeps kl_coef fixed
    kl_horizon: float = 1000.0  # episodes in which kl_coef may move by a factor of about e^0.2
    ptx_coef: float = 1.0  # weight of the likelihood of ptx_rows, where they are given
    ptx_batch_size: int = 16  # rows of them per optimizer step and process

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "ptx_batch_size", whole=True, at_least=1)
        require_fields(self, "cliprange", above=0, below=1)
        require_fields(self, "cliprange_value", above=0)
        require_fields(self, "gamma", "lam", at_least=0, at_most=1)
        require_fields(self, "vf_coef", "ptx_coef", at_least=0)
        # A step's episodes may not move the coefficient below 0 (AdaptiveKLController).
        require_fields(self, "kl_horizon", above=self.prompts_per_step * self.samples_per_prompt / 5)
        for name in ("early_stop_kl", "kl_target"):
            if getattr(self, name) is not None:
                require_fields(self, name, above=0)


@dataclass(frozen=True)
class PPOTargets:
    """What one PPO step learns from, per token, (B, T): constant during its updates.

    kl_shaped_rewards: -kl_coef k1 at each token, plus the penalized score at the last.
    values: of the value head before the updates.
    returns: the targets of the value head.
    """

    kl_shaped_rewards: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]


def ppo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: PPOSettings,
    *,
    loss_fn: PolicyLoss = clipped_policy_loss,
    value_head: torch.nn.Module | None = None,
    ptx_rows: Sequence[Mapping[str, Any]] | None = None,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place by PPO, with a value head on its last hidden states.

    r_t = -kl_coef (log pi_old - log pi_ref), plus the score less its penalties at the last token
    A, returns = GAE(r, V), A whitened; then epochs x minibatches optimizer steps on
    mean over tokens [max(-A rho, -A clip(rho, 1 +- cliprange)) + vf_coef value loss - entropy_coef H]
    + ptx_coef mean over tokens of ptx_rows [-log pi]

    rho is against the policy that sampled, the KL against the reference. Several processes share kl_coef,
    early stop and gradients, and average over the tokens of all of them; each whitens and shuffles its own
    samples. Source: Schulman et al. 2017; Ziegler et al. 2019. Lesson 2.

    Args:
        loss_fn: (logps, old_logps, advantages, cliprange=) -> (B, T); pass your own here.
        value_head: hidden states (B, T, d) -> (B, T), trained in place; None: a new one that starts at 0.
        ptx_rows: prompt and completion; PPO-ptx keeps their likelihood high (Ouyang et al. 2022, eq. 2).
        prompts, reward_fn, options: as in `rloo`.

    Returns:
        One row per step: `rollout_metrics`; loss/policy, loss/value (times vf_coef), ... per optimizer step;
        policy/approxkl, policy/clipfrac, policy/entropy, val/ratio as means over the tokens of all
        micro-batches, and the first one's KL and ratio as ..._at_start (0 and 1, or something is wrong;
        about 1e-2 off in bf16); policy/updates: optimizer steps made, fewer after an early stop;
        val/explained_variance of the values before the updates; objective/kl_coef as used in this step.

    Raises:
        ValueError: prompts, columns, rows or rewards of the wrong shape.
    """
    value_head = new_value_head(model) if value_head is None else value_head
    controller = kl_controller(settings)
    options["extra_state"] = {**(options.get("extra_state") or {}), "kl_controller": controller}
    ptx = None
    if ptx_rows is not None:
        limit = settings.max_length or usable_positions(model)
        ptx = encode_rows(tokenizer, ptx_rows, max_length=limit)
    run = start_run(
        model,
        tokenizer,
        prompts,
        reward_fn,
        settings,
        value_head=value_head,
        resume_must_match={"ptx": checksum(ptx)},
        **options,
    )
    for _ in run.engine.steps():
        # Collect: responses of the policy as it is now, and what they earn.
        batch = sample_batch(run)
        targets = ppo_targets(run, batch, value_head, kl_coef=controller.value)
        metrics = ppo_update(run, batch, targets, value_head, loss_fn=loss_fn, ptx=ptx)
        metrics["objective/kl_coef"] = controller.value
        log_step(run, batch, targets.kl_shaped_rewards.sum(-1), metrics)
        # Only now: this step's rewards used the old coefficient. The row holds the mean of all processes.
        episodes = settings.prompts_per_step * settings.samples_per_prompt
        controller.update(run.engine.history[-1]["objective/kl"], episodes)
    return run.engine.history


def ppo_targets(run: PolicyRun, batch: Batch, value_head: torch.nn.Module, *, kl_coef: float) -> PPOTargets:
    """Turn scores into rewards, values, advantages and returns per token."""
    settings, rollout = run.settings, batch.rollout
    mask = rollout.response_mask
    with torch.no_grad():
        _, values = rollout_outputs(run.policy, rollout, value_head=value_head)
    shaped = kl_shaped_rewards(
        batch.penalized_scores, rollout.old_logps, batch.ref_logps, mask, kl_coef=kl_coef
    )
    # delta_t = r_t + gamma V_{t+1} - V_t;  A_t = sum_k (gamma lam)^k delta_{t+k};  returns = A + V
    advantages, returns = gae(shaped, values, mask, gamma=settings.gamma, lam=settings.lam)
    if settings.whiten_advantages:  # after the returns, which keep the unit of the rewards
        advantages = masked_whiten(advantages, mask)
    return PPOTargets(kl_shaped_rewards=shaped, values=values, advantages=advantages, returns=returns)


def ppo_update(
    run: PolicyRun,
    batch: Batch,
    targets: PPOTargets,
    value_head: torch.nn.Module,
    *,
    loss_fn: PolicyLoss = clipped_policy_loss,
    ptx: Sequence[EncodedRow] | None = None,
) -> dict[str, float]:
    """Learn from a batch: epochs x minibatches optimizer steps on PPO's loss; return the metrics.

    The update ends early where the KL from the sampling policy exceeds settings.early_stop_kl, measured on
    the first micro-batch of each minibatch: the optimizer steps that remain are skipped.
    """
    settings, engine, rollout = run.settings, run.engine, batch.rollout
    metrics = UpdateMetrics(run)
    explained = explained_variance(targets.values, targets.returns, rollout.response_mask).item()
    ptx_rng = np.random.default_rng([engine.step_seed, 1])
    for minibatch in minibatches(run, len(rollout)):
        tokens = engine.sum(rollout.response_mask[minibatch].sum())  # of all processes
        for number, indices in enumerate(minibatch.tensor_split(settings.accumulation_steps)):
            part, mask = rollout[indices], rollout.response_mask[indices]
            logps, entropies, values = outputs_now(run, part, value_head)
            metrics.add_stats(logps, entropies, part, cliprange=settings.cliprange)
            limit = settings.early_stop_kl
            # All processes decide together, before the backward pass: no gradient may be left over.
            if number == 0 and limit and engine.mean(metrics.latest["policy/approxkl"]) > limit:
                return metrics.row() | {"val/explained_variance": explained}
            # L_clip = -min(rho A, clip(rho, 1 - eps, 1 + eps) A),  rho = pi_now(y_t) / pi_old(y_t)
            policy_losses = loss_fn(
                logps, part.old_logps, targets.advantages[indices], cliprange=settings.cliprange
            )
            require_shapes("B T", logps=logps, loss_fn=policy_losses)
            # L_V = max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) / 2
            value_losses = clipped_value_loss(
                values,
                targets.values[indices],
                targets.returns[indices],
                cliprange_value=settings.cliprange_value,
            )
            weights = mask / tokens  # a token's share in the mean over all tokens of the minibatch
            policy_loss = masked_sum(weights * policy_losses, mask)
            value_loss = masked_sum(weights * value_losses, mask)
            entropy = masked_sum(weights * entropies, mask)
            loss = policy_loss + settings.vf_coef * value_loss - settings.entropy_coef * entropy
            metrics.add_losses(policy=policy_loss, value=settings.vf_coef * value_loss)
            metrics.add_losses(entropy=-settings.entropy_coef * entropy)
            if ptx is not None:
                imitation_loss = ptx_loss(run, ptx, ptx_rng)
                loss = loss + imitation_loss
                metrics.add_losses(ptx=imitation_loss)
            engine.backward(loss, rows=batch.prompt_rows)
        engine.optimizer_step()
        metrics.optimizer_steps += 1
    return metrics.row() | {"val/explained_variance": explained}


def kl_controller(settings: PPOSettings) -> FixedKLController:
    """Return what holds kl_coef: fixed, or moved towards settings.kl_target."""
    if settings.kl_target is None:
        return FixedKLController(settings.kl_coef)
    return AdaptiveKLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)


def ptx_loss(run: PolicyRun, ptx: Sequence[EncodedRow], ptx_rng: np.random.Generator) -> Tensor:
    """Return ptx_coef times the mean -log p per response token of some rows, other rows at each call.

    Divided by micro-batches and processes, which add up.
    """
    settings, engine = run.settings, run.engine
    count = min(len(ptx), math.ceil(settings.ptx_batch_size / settings.accumulation_steps))
    rows = [ptx[index] for index in ptx_rng.choice(len(ptx), count, replace=False)]
    nll, _, weights = rows_nll(run.policy, rows, 0.0, run.tokenizer.pad_token_id)
    parts = settings.accumulation_steps * engine.accelerator.num_processes
    return settings.ptx_coef * (weights * nll).sum() / weights.sum() / parts


def new_value_head(model: torch.nn.Module) -> ScalarHead:
    """Return a value head that outputs 0 everywhere: at first no gradient flows into the shared trunk."""
    head = ScalarHead(state_width(model))
    torch.nn.init.zeros_(head.linear.weight)
    return head.to(next(model.parameters()).device)
