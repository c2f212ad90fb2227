"""Iterative RLHF: a reward model is right where it has seen data, so refit it on what the policy says now."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn, frozen_copy
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import require_columns
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization.critic_free import rloo
from rlhf_helpers.policy_optimization.on_policy import OnPolicySettings
from rlhf_helpers.policy_optimization.rollouts import collect


def iterative_rlhf(
    model: torch.nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    refit: Callable[[list[Rollout]], RewardFn],
    settings: OnPolicySettings,
    *,
    rounds: int = 3,
    prompts_per_round: int = 64,
    loop: Callable[..., History] = rloo,
    ref_model: torch.nn.Module | None = None,
    resume: bool = False,
    **options: Any,
) -> History:
    """Train `model` in place in rounds: sample, refit the reward on the samples, optimise against it.

    refit: all rounds' rollouts so far, the newest last -> RewardFn; it judges pairs of them by people (or by
    the gold judge) and trains a reward model. loop: any loop of this package, run for settings.steps a round,
    with `settings` but a seed and a run_dir (round-0, ...) of its own; options go to it. prompts_per_round:
    how many prompts, drawn anew, are sampled for refit, samples_per_prompt each.
    ref_model: the same for all rounds; None: a frozen copy of `model` as it is given.
    resume: rounds that are finished are replayed from their checkpoints: refit is asked again, so it must
    answer alike. Returns the loop's rows, `step` counted on, with `round` from 0.
    Christiano et al. 2017; Bai et al. 2022, section 4.5. Lesson 2. Raises ValueError unless rounds >= 1 and
    as the loop does.
    """
    require_number("rounds", rounds, at_least=1)
    require_number("prompts_per_round", prompts_per_round, at_least=1)
    require_columns(prompts, {})
    reference = frozen_copy(model) if ref_model is None else ref_model
    history, rollouts = History(), []
    for number in range(rounds):
        source = np.random.default_rng([settings.seed, number])
        rows = source.choice(len(prompts), min(prompts_per_round, len(prompts)), replace=False)
        rollouts.append(
            collect(
                model, tokenizer, [prompts[row] for row in rows],
                samples_per_prompt=settings.samples_per_prompt, max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature, seed=int(source.integers(2**31)),
            )
        )  # fmt: skip
        reward_fn = refit(list(rollouts))
        folder = None if settings.run_dir is None else Path(settings.run_dir) / f"round-{number}"
        own = replace(settings, seed=int(source.integers(2**31)), run_dir=folder)
        rows = loop(model, tokenizer, prompts, reward_fn, own, ref_model=reference, resume=resume, **options)
        for row in rows:
            history.append({**row, "step": row["step"] + number * settings.steps, "round": number})
    return history
