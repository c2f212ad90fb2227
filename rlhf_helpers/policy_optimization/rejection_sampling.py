"""Rejection-sampling fine-tuning: best-of-n, then imitate the best, then again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
from torch import Tensor

from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization.critic_free import RLOOSettings
from rlhf_helpers.policy_optimization.on_policy import OnPolicyRun, RunOptions, per_token
from rlhf_helpers.policy_optimization.rollouts import sequence_kl


@dataclass(frozen=True)
class RejectionSamplingSettings(RLOOSettings):
    """Settings of rejection-sampling fine-tuning; samples_per_prompt is the n of best-of-n."""

    epochs: int = 2  # imitation has no ratio that could leave 1
    kl_coef: float = 0.0  # above 0 the best is the best after the price of its KL

    def __post_init__(self) -> None:
        """Refuse more micro-batches than there are responses kept, too."""
        super().__post_init__()
        pieces = self.minibatches * self.accumulation_steps
        if self.prompts_per_step % pieces:
            raise ValueError(
                f"{type(self).__name__}: minibatches x accumulation_steps must divide the "
                f"{self.prompts_per_step} responses kept a step, got {pieces}"
            )


def rejection_sampling(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    reward_fn: RewardFn,
    settings: RejectionSamplingSettings,
    **options: Unpack[RunOptions],
) -> History:
    """Sample n responses a prompt, keep the best, fine-tune `model` in place on what was kept.

    loss = -mean over the tokens of the kept responses of log pi(y_t | y_<t)

    A policy gradient with weights 1 for the best and 0 for all others: nothing is pushed down, and how much
    better the best is does not count. No KL holds it back, but only what the policy itself says is imitated.
    Of a tie the first is kept. Arguments and rows as in `critic_free`; objective/best is the mean score of
    the kept. Dong et al. 2023 (RAFT); Touvron et al. 2023, section 3.2.3. Lesson 2.
    """
    run = OnPolicyRun(model, tokenizer, prompts, reward_fn, settings, **options)
    group = settings.samples_per_prompt
    for _ in run.engine.steps():
        batch = run.collect()
        rewards = batch.rewards - settings.kl_coef * sequence_kl(batch.rollout, batch.ref_logps)
        best = rewards.view(-1, group).argmax(-1)
        best = best + group * torch.arange(len(best), device=best.device)
        kept = replace(batch, rollout=batch.rollout[best])
        metrics = run.update(kept, _imitation, per_token)
        run.log(batch, rewards, metrics | {"objective/best": batch.scores[best].mean().item()})
    return run.engine.history


def _imitation(_rows: Tensor, logps: Tensor) -> dict[str, Tensor]:
    return {"loss/nll": -logps}
