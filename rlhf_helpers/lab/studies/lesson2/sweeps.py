"""Single settings of lesson 2, swept over seeds: what each does to reward, truth, KL and entropy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.generation import sequence_logps
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.lesson2.methods import (
    Task,
    chosen_values,
    looks_of,
    make_task,
    measure,
    run_method,
    sampled,
)
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.preference_data import ai_labels
from rlhf_helpers.world import assistant
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward

Row = dict[str, Any]
SMALL_STEPS = {"steps": 20, "prompts_per_step": 8, "samples_per_prompt": 4, "kl_coef": 0.0}
RATE = 1e-3
FRIENDLY = ("help", "thank", "wonderful", "brilliant", "good", "nice")


def gold_task(seed: int) -> Task:
    """The task of `make_task` with the gold judge itself for a reward."""
    return replace(make_task(seed, pairs=16), reward=gold_reward)


def _store(
    out: str | Path | None, name: str, rows: list[Row], seeds: Sequence[int], **facts: Any
) -> pd.DataFrame:
    return write_study(out, name, pd.DataFrame(rows), seeds=list(seeds), **facts)


def clip_and_kl(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS[:3],
    clips: Sequence[float] = (0.05, 0.2, 0.8),
    prices: Sequence[float] = (0.0, 0.1, 0.5),
    steps: int = 6,
) -> pd.DataFrame:
    """PPO with 4 passes over each step's samples: seed, cliprange, kl_coef, the measures, clipfrac.

    clipfrac: share of clipped tokens, mean over the run; reward: the trained model of `make_task`.
    """
    changes, rows = {"epochs": 4, "minibatches": 2, "steps": steps}, []
    for seed in seeds:
        task = make_task(seed)
        for clip in clips:
            for price in prices:
                run = run_method("PPO", task, RATE, cliprange=clip, kl_coef=price, **changes)
                clipped = run.history.to_frame()["policy/clipfrac"].mean()
                rows.append({"seed": seed, "cliprange": clip, "kl_coef": price, "clipfrac": clipped})
                rows[-1] |= measure(run.model, task)
                print(rows[-1], flush=True)
    return _store(out, "clip_and_kl", rows, seeds, learning_rate=RATE, **changes)


def exploration(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    temperatures: Sequence[float] = (0.5, 1.0, 1.5),
    bonuses: Sequence[float] = (0.02, 0.2),
) -> pd.DataFrame:
    """RLOO on gold at other sampling temperatures, and with an entropy bonus at temperature 1.

    Columns: seed, temperature, entropy_coef, the measures, and distinct: the share of different texts among
    four answers to each held-out prompt (1 explores, 1/4 has collapsed). Measured at temperature 1. kl_coef
    is 0, so that nothing but exploration holds the policy back.
    """
    rows = []
    for seed in seeds:
        task = gold_task(seed)
        for temperature, bonus in [(t, 0.0) for t in temperatures] + [(1.0, bonus) for bonus in bonuses]:
            changes = {**SMALL_STEPS, "temperature": temperature, "entropy_coef": bonus}
            model = run_method("RLOO", task, RATE, **changes).model
            texts = sampled(model, task.tokenizer, task.heldout, seed=60_000 + seed, each=4).responses
            different = sum(len(set(texts[i : i + 4])) for i in range(0, len(texts), 4)) / len(texts)
            rows.append({"seed": seed, "temperature": temperature, "entropy_coef": bonus})
            rows[-1] |= measure(model, task) | {"distinct": different}
            print(rows[-1], flush=True)
    return _store(out, "exploration", rows, seeds, learning_rate=RATE, **SMALL_STEPS)


def friendly_and_long(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """A rule that can be gamed: a tenth for each ten words and for each friendly word; a RewardFn."""
    words = torch.tensor([len(text.split()) for text in responses])
    friendly = torch.tensor([sum(text.lower().count(word) for word in FRIENDLY) for text in responses])
    return words / 100 + friendly / 10


def all_right(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """A sparse reward: 1 for a best answer, 0 for all others; a RewardFn."""
    return (gold_reward(prompts, responses) > 0.999).float()


REWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "sparse": all_right, "shaped": gold_reward, "gameable": friendly_and_long,
}  # fmt: skip


def reward_design(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, names: Sequence[str] = tuple(REWARDS)
) -> pd.DataFrame:
    """20 steps of RLOO on three rewards for the same goal: seed, design, the measures (proxy: as paid).

    The design "none" is the base, its proxy that of "gameable".
    """
    rows = []
    for seed in seeds:
        task = replace(gold_task(seed), reward=friendly_and_long)
        rows.append({"seed": seed, "design": "none", **measure(task.base, task)})
        for name in names:
            task = replace(task, reward=REWARDS[name])
            model = run_method("RLOO", task, RATE, **SMALL_STEPS).model
            rows.append({"seed": seed, "design": name, **measure(model, task)})
            print(rows[-1], flush=True)
    return _store(out, "reward_design", rows, seeds, learning_rate=RATE, **SMALL_STEPS)


def frontier(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    betas: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
    prices: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
) -> pd.DataFrame:
    """DPO over beta, PPO over kl_coef, both for gold: seed, method, setting, and reward and kl, held out.

    DPO learns from as many samples of the base as PPO draws, ordered by gold.
    """
    plan = [("dpo", "DPO", "beta", value, 1e-3) for value in betas]
    plan += [("ppo", "PPO", "kl_coef", value, 3e-4) for value in prices]
    rows = []
    for seed in seeds:
        task = gold_task(seed)
        for method, name, setting, value, rate in plan:
            found = measure(run_method(name, task, rate, **{setting: value}).model, task)
            rows.append({"seed": seed, "method": method, "setting": value})
            rows[-1] |= {"reward": found["gold"], "kl": found["kl"]}
            print(rows[-1], flush=True)
    return _store(out, "frontier", rows, seeds, samples=2)


def ability(model: torch.nn.Module, tokenizer: Any) -> dict[str, float]:
    """What the policy can do besides, on tasks that the reward says nothing of; for `eval_fn`.

    comparison: share of 100 pairs of answers of which it names the better one, both orders averaged;
    surprise: nats a token of 96 texts of its pretraining mix (articles, programs, critiques, ...).
    """
    pairs = [p for p in make_pairs(160, split="heldout", seed=4) if p["chosen_gold"] != p["rejected_gold"]][
        :100
    ]
    asked = [{"prompt": p["prompt"], "first": p["chosen"], "second": p["rejected"]} for p in pairs]
    better = torch.tensor([p["chosen_gold"] > p["rejected_gold"] for p in pairs])
    right = (ai_labels(model, tokenizer, asked) > 0.5) == better
    texts = assistant.corpus(96, seed=9)
    with torch.no_grad():
        sides = [[row[key] for row in texts] for key in ("prompt", "completion")]
        logps, mask = sequence_logps(model, tokenizer, *sides)
    return {"comparison": right.float().mean().item(), "surprise": (-logps.sum() / mask.sum()).item()}


def ability_tax(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS[:3],
    weights: Sequence[float] = (0.0, 1.0),
    steps: int = 16,
) -> pd.DataFrame:
    """PPO with and without pretraining text in its loss (PPO-ptx): seed, ptx_coef, step, measures, `ability`.

    Looked at four times; kl_coef 0. weights: of the text's loss, 0 for plain PPO.
    """
    rows = []
    for seed in seeds:
        task = make_task(seed)

        def look(model: torch.nn.Module, task: Task = task) -> dict[str, float]:
            return measure(model, task, samples=1) | ability(model, task.tokenizer)

        for weight in weights:
            options = {"eval_fn": look}
            changes = {"steps": steps, "eval_every": steps // 4, "kl_coef": 0.0}
            if weight:
                options["ptx_rows"], changes["ptx_coef"] = assistant.corpus(400, seed=100 + seed), weight
            history = run_method("PPO", task, RATE, options=options, **changes).history
            looks = looks_of(look(task.base), history)
            rows += [{"seed": seed, "ptx_coef": weight, **row} for row in looks]
            print(rows[-1], flush=True)
    return _store(out, "ability_tax", rows, seeds, steps=steps, learning_rate=RATE, kl_coef=0.0)


SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    "medium": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3},
    "large": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4},
}
SHIPPED = "large, shipped"
SHORT = assistant.Recipe(epochs=1, rows=20_000, warmup_steps=50)


def model_sizes(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    names: Sequence[str] = (*SIZES, SHIPPED),
    recipe: assistant.Recipe = SHORT,
) -> pd.DataFrame:
    """The same RLOO run on assistants of three sizes: seed, size, parameters, trained (0 or 1), the measures.

    The three are pretrained here on the same short text (about 8 minutes); "large, shipped" is the shipped
    assistant, of the size of "large" with sixteen times the text, and alone needs no pretraining.
    """
    rows, bases, rate = [], {}, chosen_values()["RLOO"]
    for name in names:
        if name != SHIPPED:
            bases[name] = assistant.train(recipe, seed=0, **SIZES[name])
    for seed in seeds:
        own = make_task(seed)
        for name in names:
            base, tokenizer = bases.get(name, (own.base, own.tokenizer))
            task = replace(own, base=base, tokenizer=tokenizer)
            trained = run_method("RLOO", task, rate).model
            for stage, model in enumerate((base, trained)):
                row = {"seed": seed, "size": name, "parameters": base.num_parameters(), "trained": stage}
                rows.append(row | measure(model, task))
                print(rows[-1], flush=True)
    return _store(out, "model_sizes", rows, seeds, recipe=vars(recipe), shapes=SIZES, learning_rate=rate)
