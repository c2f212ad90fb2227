"""Iterative RLHF: a reward model is right where it has seen data, so refit it on what the policy says now."""

# pyright: reportArgumentType=false
# numpy does not say that the rows drawn are whole numbers, and lesson 2 prints the function as it is.

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.lora import reference_model
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.core.rollouts import collect
from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import require_columns
from rlhf_helpers.core.training import History
from rlhf_helpers.policy_optimization.on_policy import OnPolicySettings
from rlhf_helpers.policy_optimization.reinforce import rloo


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
    """Train `model` in place in rounds: sample, refit the reward on the samples, optimize against it.

    Source: Christiano et al. 2017; Bai et al. 2022, section 4.5. Lesson 2.

    Args:
        refit: all rounds' rollouts so far, the newest last -> RewardFn; it judges pairs of them by people (or
            by the gold judge) and trains a reward model.
        settings: of `loop`, for each round; the seed and run_dir (round-0, ...) are the round's own.
        rounds: how often all of this is done.
        prompts_per_round: how many prompts, drawn anew, are sampled for refit, samples_per_prompt each.
        loop: any loop of this package, run for settings.steps per round; `options` go to it.
        ref_model: the same for all rounds; None: a frozen copy of `model` as it is given.
        resume: replay the rounds that are finished from their checkpoints. refit is asked again, so it must
            answer alike.

    Returns:
        The rows of the loop, `step` counted on, with `round` from 0.

    Raises:
        ValueError: rounds < 1, and as the loop does.
    """
    require_number("rounds", rounds, at_least=1)
    require_number("prompts_per_round", prompts_per_round, at_least=1)
    require_columns(prompts, {})
    # One reference for all rounds: a new one each time would let the policy drift without limit.
    reference = reference_model(model, ref_model, lora=settings.lora)
    history = History()
    rollouts: list[Rollout] = []
    for number in range(rounds):
        # Prompts and seeds are a function of (seed, round) alone: a resumed run draws the same.
        source = np.random.default_rng([settings.seed, number])
        rows = source.choice(len(prompts), min(prompts_per_round, len(prompts)), replace=False)
        # Sample what the policy says now: there the old reward model may be wrong.
        rollout = collect(
            model,
            tokenizer,
            [prompts[row] for row in rows],
            samples_per_prompt=settings.samples_per_prompt,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            seed=int(source.integers(2**31)),
        )
        rollouts.append(rollout)
        reward_fn = refit(list(rollouts))  # a copy, so that refit may change its list

        # Optimize against the new reward from the policy as it is, under a seed and a folder of its own.
        folder = None if settings.run_dir is None else Path(settings.run_dir) / f"round-{number}"
        this_round = replace(settings, seed=int(source.integers(2**31)), run_dir=folder)
        options |= {"ref_model": reference, "resume": resume}
        for row in loop(model, tokenizer, prompts, reward_fn, this_round, **options):
            history.append({**row, "step": row["step"] + number * settings.steps, "round": number})
    return history
