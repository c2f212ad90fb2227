"""PPO: a value head judges each token, and a clip lets one batch of samples serve several updates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from rlhf_helpers.core.generation import Rollout, rollout_from_text
from rlhf_helpers.core.models import RewardFn, ScalarHead, as_reward_fn, tokenizer_for
from rlhf_helpers.core.policy_losses import (
    AdaptiveKLController,
    FixedKLController,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    gae,
    kl_shaped_rewards,
)
from rlhf_helpers.core.tensors import masked_whiten, require_number
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.core.training.supervised import EncodedRows, collate, encode_rows, sft_loss
from rlhf_helpers.policy_optimization.critic_free import PolicyLoss
from rlhf_helpers.policy_optimization.on_policy import (
    Batch,
    OnPolicyRun,
    OnPolicySettings,
    RunOptions,
    per_token,
)
from rlhf_helpers.policy_optimization.rollouts import policy_outputs, score, sequence_kl


@dataclass(frozen=True)
class PPOSettings(OnPolicySettings):
    """Settings of PPO; epochs=1 and minibatches=1 make it a plain actor-critic, whose ratio is always 1."""

    epochs: int = 2  # old samples are free, but the further the policy moves, the more of them are clipped
    minibatches: int = 4  # optimiser steps an epoch
    cliprange: float = 0.2  # the ratio earns nothing for leaving 1 +- cliprange
    cliprange_value: float = 0.2  # the same for the values, in units of the reward
    vf_coef: float = 0.1  # weight of the value loss: the head shares the policy's trunk, so 1.0 drowns it
    gamma: float = 1.0  # a response is one short episode: no token's reward is worth less for coming later
    lam: float = 0.95  # GAE: 1 trusts the samples alone, 0 the values alone
    whiten_advantages: bool = True  # mean 0, std 1 over the step's tokens
    whiten_rewards: bool = False  # std 1, mean kept
    early_stop_kl: float | None = None  # nats a token from the sampler; above it the step's updates end
    kl_target: float | None = None  # nats a response from the reference; None keeps kl_coef fixed
    kl_horizon: float = 1000.0  # episodes in which kl_coef may move by a factor of about e^0.2
    ptx_coef: float = 1.0  # weight of the likelihood of ptx_rows, where they are given
    ptx_batch_size: int = 16  # of them an optimiser step

    def __post_init__(self) -> None:
        """Refuse values that would train wrongly or not at all."""
        super().__post_init__()
        require_fields(self, "ptx_batch_size", whole=True, at_least=1)
        above = {"above": 0}
        rules = {"cliprange": {"above": 0, "below": 1}, "cliprange_value": above}
        # A step's episodes may not move the coefficient below 0 (AdaptiveKLController).
        rules["kl_horizon"] = {"above": self.prompts_per_step * self.samples_per_prompt / 5}
        rules |= {name: {"at_least": 0, "at_most": 1} for name in ("gamma", "lam")}
        rules |= {name: {"at_least": 0} for name in ("vf_coef", "ptx_coef")}
        rules |= {name: above for name in ("early_stop_kl", "kl_target") if getattr(self, name) is not None}
        for name, rule in rules.items():
            require_number(f"PPOSettings.{name}", getattr(self, name), **rule)


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
    A, returns = GAE(r, V), A whitened; then epochs x minibatches steps on the mean over tokens of
    max(-A rho, -A clip(rho, 1 +- cliprange)) + vf_coef value loss - entropy_coef H [+ ptx_coef NLL(ptx_rows)]

    rho is against the policy that sampled, the KL against the reference. loss_fn: (logps, old_logps,
    advantages, cliprange=) -> (B, T); the learner's own fits here. value_head: hidden states (B, T, d) ->
    (B, T), trained in place; None: a new one that starts at 0. ptx_rows: prompt and completion, whose
    likelihood is kept up (PPO-ptx, Ouyang et al. 2022, eq. 2). options: see `RunOptions`.
    Returns a row a step: `rollout_metrics`; loss/policy, loss/value (times vf_coef), policy/approxkl,
    policy/clipfrac, policy/entropy, val/ratio as means over the updates, the first minibatch's KL and ratio
    as ..._at_start (0 and 1, or something is wrong); policy/updates, fewer after an early stop;
    val/explained_variance of the values before the updates; objective/kl_coef as used in this step.
    Of several processes each whitens, shuffles and averages over the tokens of its own share; kl_coef, early
    stop and gradients are common. Without whitening, shuffling and unequal lengths, two do what one does.
    Raises ValueError for prompts, columns, rows or rewards of the wrong shape. Schulman et al. 2017; Ziegler
    et al. 2019. Lesson 2.
    """
    learner = PPOLearner(model, tokenizer, settings, loss_fn, value_head, ptx_rows)
    run = learner.run(prompts, reward_fn, **options)
    for _ in run.engine.steps():
        learner.step(run, run.collect())
    return run.engine.history


class PPOLearner:
    """One PPO step, for the loop and for `PPOTrainer.train_step` alike: advantages, then updates."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        settings: PPOSettings,
        loss_fn: PolicyLoss = clipped_policy_loss,
        value_head: torch.nn.Module | None = None,
        ptx_rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Make the value head, the KL controller and the tokens of ptx_rows."""
        self.model, self.tokenizer, self.settings, self.loss_fn = model, tokenizer, settings, loss_fn
        self.value_head = new_value_head(model) if value_head is None else value_head
        self.controller = FixedKLController(settings.kl_coef)
        if settings.kl_target is not None:
            self.controller = AdaptiveKLController(settings.kl_coef, settings.kl_target, settings.kl_horizon)
        self.ptx: EncodedRows | None = None
        if ptx_rows is not None:
            limit = getattr(model.config, "max_position_embeddings", None)
            self.ptx = encode_rows(tokenizer, ptx_rows, max_length=limit)

    def run(
        self, prompts: Sequence[str] | None, reward_fn: RewardFn, **options: Unpack[RunOptions]
    ) -> OnPolicyRun:
        """A run that saves value head and KL controller along with the policy."""
        return OnPolicyRun(
            self.model, self.tokenizer, prompts, reward_fn, self.settings, value_head=self.value_head,
            extra_state={"kl_controller": self.controller},
            must_match={"ptx": None if self.ptx is None else self.ptx.checksum}, **options,
        )  # fmt: skip

    def step(self, run: OnPolicyRun, batch: Batch) -> None:
        """Rewards and advantages a token, then the updates, then the KL coefficient; logs the row."""
        settings, rollout, kl_coef = self.settings, batch.rollout, self.controller.value
        mask, old_logps = rollout.response_mask, rollout.old_logps
        with torch.no_grad():
            _, _, old_values = policy_outputs(
                self.model, rollout, temperature=settings.temperature, value_head=self.value_head
            )
        rewards = shaped = kl_shaped_rewards(batch.rewards, old_logps, batch.ref_logps, mask, kl_coef=kl_coef)
        if settings.whiten_rewards:
            rewards = masked_whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, old_values, mask, gamma=settings.gamma, lam=settings.lam)
        if settings.whiten_advantages:  # after the returns: the values learn the reward's own unit
            advantages = masked_whiten(advantages, mask)

        def terms(rows: Tensor, logps: Tensor, values: Tensor) -> dict[str, Tensor]:
            value_loss = clipped_value_loss(
                values, old_values[rows], returns[rows], cliprange_value=settings.cliprange_value
            )
            policy_loss = self.loss_fn(logps, old_logps[rows], advantages[rows], cliprange=settings.cliprange)
            return {"loss/policy": policy_loss, "loss/value": settings.vf_coef * value_loss}

        metrics = run.update(
            batch, terms, per_token, cliprange=settings.cliprange, early_stop_kl=settings.early_stop_kl,
            extra_loss=self._ptx_loss(run),
        )  # fmt: skip
        metrics["val/explained_variance"] = explained_variance(old_values, returns, mask).item()
        metrics["objective/kl_coef"] = kl_coef
        episodes = len(rollout) * run.engine.accelerator.num_processes
        self.controller.update(run.mean(sequence_kl(rollout, batch.ref_logps).mean().item()), episodes)
        run.log(batch, shaped.sum(-1), metrics)

    def _ptx_loss(self, run: OnPolicyRun) -> Callable[[], Tensor] | None:
        """The likelihood term, on other rows at each call; None without ptx_rows."""
        if self.ptx is None:
            return None
        source = np.random.default_rng([run.engine.step_seed, 1])

        def loss() -> Tensor:
            count = min(
                len(self.ptx), math.ceil(self.settings.ptx_batch_size / self.settings.accumulation_steps)
            )
            rows = source.choice(len(self.ptx), count, replace=False)
            tensors = collate(self.ptx, rows, 0.0, self.tokenizer.pad_token_id)
            ids, mask, weights, is_response = (tensor.to(run.engine.device) for tensor in tensors)
            total, _ = sft_loss(self.model, ids, mask, weights, is_response)
            return self.settings.ptx_coef * total / weights.sum()

        return loss


def new_value_head(model: torch.nn.Module) -> ScalarHead:
    """A value head that says 0 everywhere: no opinion at first, and no gradient into the shared trunk."""
    head = ScalarHead(model.config.hidden_size)
    torch.nn.init.zeros_(head.linear.weight)
    return head.to(next(model.parameters()).device)


class PPOTrainer:
    """PPO under the hands-on guide's names; settings as flat keywords, clip_epsilon for cliprange.

    `train` is the real thing: it samples its own responses. `train_step` updates on a batch from outside.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ref_model: torch.nn.Module | None = None,
        reward_model: RewardFn | torch.nn.Module | None = None,
        tokenizer: Any = None,
        learning_rate: float = PPOSettings.learning_rate,
        clip_epsilon: float = PPOSettings.cliprange,
        **changes: Any,
    ) -> None:
        """Make a value head of its own and remember the rest; `model` is trained in place.

        ref_model: None for a frozen copy. reward_model: a reward model or a RewardFn; may be left out where
        train_step is always given rewards. changes: further fields of PPOSettings. Raises TypeError for an
        unknown keyword, ValueError for a bad value.
        """
        known = {field.name for field in fields(PPOSettings)}
        if unknown := sorted(set(changes) - known):
            raise TypeError(f"PPOTrainer has no setting {unknown}; PPOSettings has {sorted(known)}")
        self.settings = PPOSettings(learning_rate=learning_rate, cliprange=clip_epsilon, **changes)
        self.model, self.tokenizer = model, tokenizer_for(model) if tokenizer is None else tokenizer
        self.ref_model, self.reward_model = ref_model, reward_model
        self.value_head = new_value_head(model)
        self._own: tuple[PPOLearner, OnPolicyRun] | None = None

    def train(self, prompts: Sequence[str], *, steps: int | None = None, **options: Any) -> History:
        """Run `ppo` on prompts, `steps` turns; options: loss_fn, ptx_rows and those of `RunOptions`.

        With fewer prompts than prompts_per_step all of them are taken each turn.
        """
        fewer = min(self.settings.prompts_per_step, max(1, len(prompts)))
        settings = replace(self.settings, steps=steps or self.settings.steps, prompts_per_step=fewer)
        options = {"ref_model": self.ref_model, "value_head": self.value_head, **options}
        return ppo(self.model, self.tokenizer, prompts, self._reward(), settings, **options)

    def train_step(
        self,
        prompts: Sequence[str] | Rollout,
        responses: Sequence[str] | None = None,
        rewards: Sequence[float] | Tensor | None = None,
    ) -> dict[str, float]:
        """One PPO step, epochs x minibatches updates, on given responses; returns the row of `ppo`.

        prompts: texts, with a response each, or a `Rollout`, whose sampled ids and log-probs are kept.
        rewards: one finite number each; None asks the reward model.

        Text from outside was not sampled by the policy: its log-probs are recomputed, so the first ratio is 1
        although the batch is off-policy. Such a step raises the likelihood of what was rewarded above the
        batch's average and is no estimate of the policy gradient; `objective/kl` is then no KL either.
        Constant learning rate; optimiser and KL coefficient last from call to call. Raises ValueError unless
        there are as many responses and rewards as prompts, and at least two tokens in all.
        """
        if self._own is None:
            plain = {
                "schedule": "constant",
                "warmup_steps": 0,
                "accumulation_steps": 1,
                "checkpoint_every": 0,
            }
            learner = PPOLearner(
                self.model, self.tokenizer, replace(self.settings, **plain), value_head=self.value_head
            )
            self._own = learner, learner.run(None, self.reward_model, ref_model=self.ref_model)
        learner, run = self._own
        rollout, settings = prompts, self.settings
        if not isinstance(prompts, Rollout):
            rollout = rollout_from_text(
                self.model, self.tokenizer, prompts, responses or [], temperature=settings.temperature
            )
        if rewards is None:
            scores = score(self._reward(), rollout)
        else:
            scores = torch.as_tensor(rewards, dtype=torch.float32, device=rollout.old_logps.device)
            if scores.shape != (len(rollout),) or not scores.isfinite().all():
                raise ValueError(
                    f"rewards must be {len(rollout)} finite numbers, one a response, got {rewards!r}"
                )
        learner.step(run, run.judge(rollout, scores, list(range(len(rollout)))))
        run.engine.step += 1  # another order of minibatches next time
        return dict(run.engine.history[-1])

    def _reward(self) -> RewardFn:
        if self.reward_model is None:
            raise ValueError("there is no reward_model: give one to PPOTrainer, or rewards to train_step")
        return as_reward_fn(self.reward_model)


def robust_ppo_training(
    model: torch.nn.Module,
    ref_model: torch.nn.Module | None,
    reward_model: RewardFn | torch.nn.Module,
    data: Mapping[str, Sequence[str]] | Sequence[str],
    max_kl: float = 0.01,
    *,
    tokenizer: Any = None,
    **changes: Any,
) -> History:
    """Train by PPO with what keeps it from diverging; returns the history, the model is trained in place.

    New samples each step; a step's updates end for good once the policy is max_kl nats a token from the one
    that sampled them (early_stop_kl), before that update is made; the ratio is per token and against the
    sampler, the KL per token and against the reference, in the reward; all means are masked; whitened
    advantages, clipped values and gradients. `F.kl_div` of gathered log-probs is no KL. data: prompts, or a
    mapping with `prompts`. changes: fields of PPOSettings. Lesson 2. Raises as `PPOTrainer` and `ppo`.
    """
    prompts = data["prompts"] if isinstance(data, Mapping) else data
    changes = {"epochs": 4, **changes}
    return PPOTrainer(model, ref_model, reward_model, tokenizer, early_stop_kl=max_kl, **changes).train(
        prompts
    )
