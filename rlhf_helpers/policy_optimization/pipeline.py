"""Provide one interface to all methods, under the hands-on guide's names."""

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch

from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import RewardFn, load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization.grpo import GRPOSettings, grpo
from rlhf_helpers.policy_optimization.on_policy import OnPolicySettings, RunOptions
from rlhf_helpers.policy_optimization.ppo import PPOSettings, new_value_head, ppo
from rlhf_helpers.policy_optimization.reinforce import ReinforceSettings, RLOOSettings, reinforce, rloo
from rlhf_helpers.policy_optimization.rejection_sampling import RejectionSamplingSettings, rejection_sampling
from rlhf_helpers.policy_optimization.trpo import TRPOSettings, trpo

METHODS: dict[str, tuple[Callable[..., History], type[OnPolicySettings]]] = {
    "reinforce": (reinforce, ReinforceSettings),
    "rloo": (rloo, RLOOSettings),
    "grpo": (grpo, GRPOSettings),
    "ppo": (ppo, PPOSettings),
    "trpo": (trpo, TRPOSettings),
    "rejection_sampling": (rejection_sampling, RejectionSamplingSettings),
}


class PolicyOptimizationPipeline:
    """Loads a model and trains it by a method named in METHODS; `model` is what has been learned so far."""

    def __init__(
        self,
        model_name: str = "tiny",
        reward_model: RewardFn | torch.nn.Module | None = None,
        method: str = "ppo",
        **changes: Any,
    ) -> None:
        """Load the model; its frozen copy is the reference for as long as the pipeline lives.

        reward_model: a reward model or a RewardFn. changes: fields of the method's settings.
        Raises ValueError for an unknown method or bad value, TypeError for an unknown keyword or no reward.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
        if reward_model is None:
            raise TypeError("PolicyOptimizationPipeline needs reward_model: a reward model or a RewardFn")
        self.loop, kind = METHODS[method]
        self.model, self.tokenizer = load_model(model_name)
        self.settings = kind(**changes)
        self.reward_model, self.method = reward_model, method
        self.ref_model, self.done = reference_model(self.model, lora=self.settings.lora), 0
        self._kept = {"value_head": new_value_head(self.model)} if method == "ppo" else {}

    def train_epoch(
        self, prompts: Sequence[str], num_iterations: int = 10, **options: Unpack[RunOptions]
    ) -> list[dict[str, Any]]:
        """Train for num_iterations turns of the loop on new samples; returns their rows of metrics.

        With fewer prompts than prompts_per_step all of them are taken each turn. A further call goes on with
        the model (and value head) as they are, with other samples and a fresh optimizer. Raises as the loop.
        """
        seed = self.settings.seed + self.done
        settings = self.settings.for_prompts(prompts, steps=num_iterations, seed=seed)
        options = {"ref_model": self.ref_model, **self._kept, **options}  # pyright: ignore[reportAssignmentType]
        history = self.loop(self.model, self.tokenizer, prompts, self.reward_model, settings, **options)
        self.done += num_iterations
        return history[:]
