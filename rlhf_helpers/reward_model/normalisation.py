"""Rewards on a known scale: a reward's offset and unit are arbitrary, a KL coefficient's are not."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from rlhf_helpers.core.models import RewardFn, as_reward_fn


@dataclass(frozen=True)
class NormalisedReward:
    """A RewardFn: (reward - mean) / std, with the two numbers fixed once; it orders answers as before."""

    reward: RewardFn
    mean: float
    std: float

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Any
    ) -> Float[Tensor, "B"]:
        """Rewards (B,) in standard deviations of the samples that fixed the scale."""
        return (self.reward(prompts, responses, **columns) - self.mean) / self.std


def normalise_reward(
    reward: RewardFn | Any, prompts: Sequence[str], responses: Sequence[str], **columns: Any
) -> NormalisedReward:
    """Scale a reward to mean 0 and standard deviation 1 (n - 1) on samples, which should be the policy's own.

    So a penalty kl_coef KL weighs against rewards of one known size, whatever the reward model's unit, and
    an answer as good as the policy's average gets 0 (Stiennon et al. 2020; Ziegler et al. 2019). Lesson 1.
    Raises ValueError for fewer than two samples, or the same reward for all.
    """
    reward_fn = as_reward_fn(reward)
    rewards = reward_fn(list(prompts), list(responses), **columns).double()
    mean, std = rewards.mean().item(), rewards.std().item() if len(rewards) > 1 else 0.0
    if std <= 1e-6 * max(1.0, abs(mean)):  # rounding alone gives a spread of about 1e-7
        raise ValueError(
            f"the reward is constant ({mean:.4g}) on the {len(rewards)} samples given, so it has no scale: "
            "give at least two responses that it tells apart"
        )
    return NormalisedReward(reward_fn, mean, std)
