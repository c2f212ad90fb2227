"""REINFORCE, RLOO and GRPO: one loop without a value head; they differ in what a reward is compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.policy_losses import (
    clipped_policy_loss,
    group_advantages,
    kl_estimate,
    rloo_advantages,
)
from rlhf_helpers.core.tensors import require_number, require_shapes
from rlhf_helpers.core.training import History
from rlhf_helpers.core.training.settings import require_fields
from rlhf_helpers.policy_optimization.on_policy import (
    OnPolicyRun,
    OnPolicySettings,
    RunOptions,
    Weigh,
    per_response,
)
from rlhf_helpers.policy_optimization.rollouts import sequence_kl

PolicyLoss = Callable[..., Tensor]
Advantages = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ReinforceSettings(OnPolicySettings):
    """Settings of REINFORCE."""

    baseline: bool = True  # compare with the mean of all other samples of the step, whatever their prompt


@dataclass(frozen=True)
class RLOOSettings(OnPolicySettings):
    """Settings of RLOO; 4 samples a prompt, as in the paper, at least 2: the others are the baseline."""

    def __post_init__(self) -> None:
        """Refuse groups of one as well."""
        super().__post_init__()
        require_fields(self, "samples_per_prompt", whole=True, at_least=2)


@dataclass(frozen=True)
class GRPOSettings(RLOOSettings):
    """Settings of GRPO, in the paper's form; scale=False and length_mean=False make it "Dr. GRPO"."""

    cliprange: float = 0.2  # acts from the second epoch or minibatch on; before that the ratio is 1
    scale: bool = True  # divide by the group's std: a prompt weighs the same however its rewards spread
    length_mean: bool = True  # average over a response's tokens; False: sum, over the constant max_new_tokens

    def __post_init__(self) -> None:
        """Refuse a cliprange outside (0, 1) as well."""
        super().__post_init__()
        require_number("GRPOSettings.cliprange", self.cliprange, above=0, below=1)


def reinforce_loss(
    logps: Float[Tensor, "B T"], old_logps: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]
) -> Float[Tensor, "B T"]:
    """Policy gradient per token, to be minimised: -A_t log pi(y_t | y_<t).

    Its gradient is that of the expected reward; its value says nothing about progress. `old_logps` is not
    used: each batch is sampled by the policy that it updates. Williams 1992. Lesson 2. Raises ValueError
    where shapes differ.
    """
    require_shapes("B T", logps=logps, old_logps=old_logps, advantages=advantages)
    return -advantages * logps


def critic_free(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: OnPolicySettings,
    *,
    advantage_fn: Advantages,
    loss_fn: PolicyLoss = reinforce_loss,
    weigh: Weigh = per_response,
    kl_in_loss: bool = False,
    cliprange: float | None = None,
    **options: Unpack[RunOptions],
) -> History:
    """Train `model` in place to earn more reward without leaving the reference far behind.

    R_i = score_i - kl_coef sum_t (log pi - log pi_ref) - missing_eos_penalty [no EOS] - length_penalty |y_i|
    A = advantage_fn(R (P, G)), one number a response;  loss = sum_it w_it loss_fn(logp_it, old_logp_it, A_i)

    prompts: texts; a step draws prompts_per_step of them in seeded order, each once an epoch.
    reward_fn: a RewardFn or a reward model; options: see `RunOptions`. loss_fn: (logps, old_logps,
    advantages), each (B, T) -> (B, T); the learner's own fits here. weigh: how tokens are averaged.
    kl_in_loss: kl_coef k3 is added to each token's loss instead of k1 to the reward. cliprange: for
    policy/clipfrac alone.
    Returns a row a step, measured before its update: the names of `rollout_metrics`, loss, policy/entropy
    (nats a token), policy/approxkl and val/ratio (0 and 1 at the start, or something is wrong).
    Raises ValueError for prompts, columns or rewards of the wrong shape. Lesson 2.
    """
    run = OnPolicyRun(model, tokenizer, prompts, reward_fn, settings, **options)
    for _ in run.engine.steps():
        batch = run.collect()
        old_logps, rewards = batch.rollout.old_logps, batch.rewards
        if not kl_in_loss:
            rewards = rewards - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        advantages = advantage_fn(rewards.view(-1, settings.samples_per_prompt))
        advantages = advantages.reshape(-1, 1).expand_as(old_logps)  # a token shares in its response's

        def terms(rows: Tensor, logps: Tensor, batch: Any = batch, advantages: Tensor = advantages) -> dict:
            old_logps, ref_logps = batch.rollout.old_logps[rows], batch.ref_logps[rows]
            losses = {"loss/policy": loss_fn(logps, old_logps, advantages[rows])}
            if kl_in_loss:
                losses["loss/kl"] = settings.kl_coef * kl_estimate(logps, ref_logps, estimator="k3")
            return losses

        run.log(batch, rewards, run.update(batch, terms, weigh, cliprange=cliprange))
    return run.engine.history


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
    """REINFORCE: A_i = R_i, or with settings.baseline R_i minus the mean of the step's other samples.

    Both have the same gradient in expectation; the baseline takes out the noise that the reward's offset
    brings, however large. All else as in `critic_free`. Williams 1992. Lesson 2.
    """

    def advantage_fn(rewards: Tensor) -> Tensor:
        # Leave-one-out over the whole step: a baseline that knows R_i would bias the gradient.
        return rloo_advantages(rewards.view(1, -1)).view_as(rewards) if settings.baseline else rewards

    same = {"advantage_fn": advantage_fn, "loss_fn": loss_fn}
    return critic_free(model, tokenizer, prompts, reward_fn, settings, **same, **options)


def rloo(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: RLOOSettings,
    *,
    loss_fn: PolicyLoss = reinforce_loss,
    **options: Unpack[RunOptions],
) -> History:
    """RLOO: REINFORCE whose baseline is the mean reward of the other samples of the same prompt.

    A_i = R_i - mean of the other samples' R. A prompt that is easy for all samples teaches nothing. All else
    as in `critic_free`. Ahmadian et al. 2024. Lesson 2.
    """
    same = {"advantage_fn": rloo_advantages, "loss_fn": loss_fn}
    return critic_free(model, tokenizer, prompts, reward_fn, settings, **same, **options)


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
    """GRPO: rewards standardised within a prompt's samples, PPO's clip, and the KL as k3 in the loss.

    A_i = (R_i - mean) / (std + 1e-4);  loss = mean_i 1/|y_i| sum_t [clip loss_it + kl_coef k3_it]

    The loss starts near 0 and stays small: it is no measure of progress. k3 summed over tokens is not the
    gradient of the sequence's KL (`kl_estimate`). loss_fn is called with cliprange=. All else as in
    `critic_free`. Shao et al. 2024, eq. 3; Liu et al. 2025 for scale=False and length_mean=False. Lesson 2.
    """

    def weigh(mask: Tensor) -> Tensor:
        lengths = mask.sum(-1, keepdim=True) if settings.length_mean else settings.max_new_tokens
        return mask / lengths / len(mask)

    return critic_free(
        model, tokenizer, prompts, reward_fn, settings, **options,
        advantage_fn=partial(group_advantages, scale=settings.scale), weigh=weigh, kl_in_loss=True,
        loss_fn=partial(loss_fn, cliprange=settings.cliprange), cliprange=settings.cliprange,
    )  # fmt: skip
