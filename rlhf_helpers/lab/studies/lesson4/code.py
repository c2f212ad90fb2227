"""Verifiable rewards for programs: what the tests teach, what the safety rule adds, and a run that games."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.code_generation import (
    UnitTestRunner,
    evaluate_programs,
    task_tests,
    unit_test_reward,
)
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.policy_optimization import GRPOSettings, RLOOSettings, grpo, rloo
from rlhf_helpers.world.prompts import load_prompts

# arm -> (kind of visible tests, safety threshold: 0 judges by the tests alone, price of a token)
ARMS = {
    "base": ("visible", 0.8, 0.0),
    "tests and safety": ("visible", 0.8, 0.0),
    "tests and safety, GRPO": ("visible", 0.8, 0.0),
    "tests alone": ("visible", 0.0, 0.0),
    "weak tests": ("weak", 0.8, 0.0),
    "weak tests, short": ("weak", 0.8, 0.005),
}
MEASURES = ("pass@1", "pass@4", "visible", "unsafe", "gaming")
SETTINGS = RLOOSettings(
    learning_rate=7e-4, steps=14, prompts_per_step=16, samples_per_prompt=4, kl_coef=0.02, progress=False
)


def tasks(split: str) -> list[str]:
    """The world's programming tasks of one split."""
    return [prompt.text for prompt in load_prompts(["program"], split)]


def train(
    arm: str, *, seed: int = 0, runner: UnitTestRunner | None = None, **changes: Any
) -> tuple[torch.nn.Module, History]:
    """The tiny model trained on the training tasks by one arm of `ARMS`; its history. changes: of SETTINGS.

    The reward is what the sandbox returns on the arm's tests, and the tree's rules; never gold.
    """
    (model, tokenizer), (kind, threshold, price) = load_model("tiny", device="cpu"), ARMS[arm]
    settings = replace(SETTINGS, **{"seed": seed, "length_penalty": price, **changes})
    prompts, loop = tasks("train"), rloo
    if arm.endswith("GRPO"):
        loop, settings = grpo, GRPOSettings(**vars(settings))
    reward = unit_test_reward(runner=runner, safety_threshold=threshold)
    history = loop(model, tokenizer, prompts, reward, settings, columns={"tests": task_tests(prompts, kind)})
    return model, history


def measured(
    model: torch.nn.Module, arm: str, *, seed: int = 0, samples: int = 4, runner: UnitTestRunner | None = None
) -> dict[str, float]:
    """`MEASURES` on the held-out tasks: hidden tests, the arm's own visible ones, tree and bandit."""
    prompts = tasks("heldout")
    tests = {"hidden": task_tests(prompts, "hidden"), "visible": task_tests(prompts, ARMS[arm][0])}
    sampling = {"samples": samples, "k": min(4, samples), "seed": 80_000 + seed, "runner": runner}
    found = evaluate_programs(model, prompts, **tests, **sampling)["value"]
    return {name: found[name] for name in MEASURES}


def code_rewards(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, arms: Sequence[str] = tuple(ARMS),
    steps: int = SETTINGS.steps,
) -> pd.DataFrame:  # fmt: skip
    """What each arm's training does to programs for held-out tasks: seed, arm, `MEASURES`, response_length.

    response_length: mean tokens of the last step's samples, missing for the base.
    """
    rows = []
    for seed in seeds:
        runner = UnitTestRunner()  # shared: an arm does not run again what another has run
        for arm in arms:
            model, length = load_model("tiny", device="cpu")[0], float("nan")
            if arm != "base":
                model, history = train(arm, seed=seed, runner=runner, steps=steps)
                length = list(history)[-1]["response_length"]
            row = {"seed": seed, "arm": arm, **measured(model, arm, seed=seed, runner=runner)}
            rows.append(row | {"response_length": length})
            if out:
                print(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True
                )
    return write_study(out, "code_rewards", pd.DataFrame(rows), seeds=list(seeds), settings=SETTINGS)
