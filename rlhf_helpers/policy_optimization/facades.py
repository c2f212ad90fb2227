"""PPO under the hands-on guide's names: a class that keeps its state from call to call."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from rlhf_helpers.core.generation import Rollout, rollout_from_text
from rlhf_helpers.core.models import RewardFn, tokenizer_for
from rlhf_helpers.core.policy_losses import FixedKLController
from rlhf_helpers.core.rollouts import score
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization.on_policy import (
    Batch,
    PolicyRun,
    log_step,
    make_batch,
    start_run,
)
from rlhf_helpers.policy_optimization.ppo import (
    PPOSettings,
    kl_controller,
    new_value_head,
    ppo,
    ppo_targets,
    ppo_update,
)

Prompts = Sequence[str] | Rollout
Responses = Sequence[str] | None  # None with a Rollout, which holds them
Rewards = Sequence[float] | Tensor | None  # None: ask the reward model


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
        learning_rate: float | None = None,
        clip_epsilon: float = PPOSettings.cliprange,
        **changes: Any,
    ) -> None:
        """Make a value head and remember the rest; `model` is trained in place.

        Args:
            ref_model: None for a frozen copy.
            reward_model: a reward model or a RewardFn; not needed where train_step is always given rewards.
            changes: further fields of `PPOSettings`.

        Raises:
            TypeError: an unknown keyword.
            ValueError: a bad value.
        """
        self.settings = PPOSettings(learning_rate=learning_rate, cliprange=clip_epsilon, **changes)
        self.model = model
        self.tokenizer = tokenizer or tokenizer_for(model)
        self.reward_model: Any = reward_model
        self.value_head = new_value_head(model)
        self.controller = kl_controller(self.settings)
        self._models = {"ref_model": ref_model, "value_head": self.value_head}

    def train(self, prompts: Sequence[str], *, steps: int | None = None, **options: Any) -> History:
        """Run `ppo` on prompts, `steps` turns; options: loss_fn, ptx_rows and those of `RunOptions`.

        With fewer prompts than prompts_per_step all of them are taken in each turn.
        """
        settings = self.settings.for_prompts(prompts, steps=steps or self.settings.steps)
        options |= self._models
        return ppo(self.model, self.tokenizer, prompts, self.reward_model, settings, **options)

    @cached_property
    def _run(self) -> PolicyRun:
        """What `train_step` keeps from call to call, its optimizer included."""
        settings = self.settings.for_single_steps()
        return start_run(self.model, self.tokenizer, None, self.reward_model, settings, **self._models)

    def train_step(
        self, prompts: Prompts, responses: Responses = None, rewards: Rewards = None
    ) -> dict[str, float]:
        """Make one PPO step, epochs x minibatches updates, on given responses; return the row of `ppo`.

        Text from outside was not sampled by the policy: its log-probs are recomputed, so the first ratio is 1
        although the batch is off-policy. Such a step raises the likelihood of what was rewarded above the
        batch's average. It is not an estimate of the policy gradient, and `objective/kl` is not a KL either.
        Constant learning rate; optimizer and KL coefficient last from call to call.

        Args:
            prompts: texts, with one response each, or a `Rollout`, whose sampled ids and log-probs are kept.
            rewards: one finite number per response; None asks the reward model.

        Raises:
            ValueError: not as many responses and rewards as prompts, or fewer than two tokens in all.
        """
        return ppo_step(self._run, self.value_head, self.controller, prompts, responses, rewards)


def given_batch(run: PolicyRun, prompts: Prompts, responses: Responses, rewards: Rewards) -> Batch:
    """Make a batch of responses that were not sampled by `sample_batch`; see `PPOTrainer.train_step`."""
    settings, rollout = run.settings, prompts
    if not isinstance(rollout, Rollout):
        limits = {"temperature": settings.temperature, "max_length": settings.max_length}
        rollout = rollout_from_text(run.policy, run.tokenizer, rollout, responses or [], **limits)
    if rewards is not None:
        scores = torch.as_tensor(rewards, dtype=torch.float32, device=run.engine.device)
    elif run.reward_fn is not None:
        scores = score(run.reward_fn, rollout)
    else:
        raise ValueError("there is no reward_model: give one to PPOTrainer, or rewards to train_step")
    if scores.shape != (len(rollout),) or not scores.isfinite().all():
        raise ValueError(f"rewards must be {len(rollout)} finite numbers, one per response, got {rewards!r}")
    return make_batch(run, rollout, scores, list(range(len(rollout))))


def ppo_step(
    run: PolicyRun,
    value_head: torch.nn.Module,
    controller: FixedKLController,
    prompts: Prompts,
    responses: Responses,
    rewards: Rewards,
) -> dict[str, float]:
    """Make a step of `ppo` on given responses; return its row."""
    batch = given_batch(run, prompts, responses, rewards)
    targets = ppo_targets(run, batch, value_head, kl_coef=controller.value)
    metrics = ppo_update(run, batch, targets, value_head)
    metrics["objective/kl_coef"] = controller.value
    log_step(run, batch, targets.kl_shaped_rewards.sum(-1), metrics)
    row = run.engine.history[-1]
    controller.update(row["objective/kl"], len(batch.rollout))
    run.engine.step += 1  # another order of minibatches next time
    return dict(row)


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
    """Train `model` in place by PPO with the safeguards that keep it from diverging; return the history.

    New samples in each step. The updates of a step end once the policy is max_kl nats per token from the one
    that sampled (early_stop_kl), before that update is made. The ratio is per token and against the sampler,
    the KL per token and against the reference, in the reward. All means are masked, advantages whitened,
    values and gradients clipped. `F.kl_div` of gathered log-probs is not a KL.

    Args:
        data: prompts, or a mapping with `prompts`.
        changes: fields of `PPOSettings`.

    Raises:
        TypeError, ValueError: as `PPOTrainer` and `ppo`. Lesson 2.
    """
    prompts = data["prompts"] if isinstance(data, Mapping) else data
    changes = {"epochs": 4, **changes, "early_stop_kl": max_kl}
    return PPOTrainer(model, ref_model, reward_model, tokenizer, **changes).train(prompts)
