"""Over-optimisation: what happens to the truth when a bad reward model is searched hard, and what helps.

The set-up of Gao, Schulman and Hilton 2022 in small: reward models trained on few labels of which a quarter
are wrong (Coste et al. 2023), best-of-n and RLOO without a KL penalty, gold measured all along.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.lab.studies.lesson1 import SEEDS, distinct_texts, noisy, trained
from rlhf_helpers.lab.studies.lesson2.methods import Task, looks_of, make_task, measure, sampled
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.policy_optimization import (
    RLOOSettings,
    best_of_n_curve,
    best_of_n_exact_kl,
    iterative_rlhf,
    rloo,
)
from rlhf_helpers.reward_model import RewardSettings, create_reward_model, normalise_reward
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward

FLIPS = 0.25
FEW, MANY = 250, 750
ROUNDS = 3  # of iterative RLHF; each buys FEW labels, MANY in all
NS = [2**k for k in range(9)]
SEARCH = {"steps": 54, "prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 9e-4}
EVERY = 6  # steps between looks at the held-out prompts
# cure -> which reward is searched, and the price of KL
CURES = {
    "none": ("few", 0.0),
    "KL price 0.1": ("few", 0.1),
    "KL price 0.3": ("few", 0.3),
    "worst of 4": ("worst of 4", 0.0),
    "more pairs": ("many", 0.0),
    "iterative": ("iterative", 0.0),
}


def poor_reward(name: str, seed: int) -> Any:
    """A reward model of a kind that the study compares; a fourth of the labels behind it are wrong.

    "few": 250 pairs; "many": 750; "validation": 250 others; "worst of 4": the least of four models that
    differ in their head and the order of the same 250 pairs.
    """
    few = make_pairs(FEW, annotator=noisy(FLIPS), seed=seed)
    if name == "worst of 4":
        ensemble = create_reward_model("ensemble", seed=10 * seed, members=4, aggregate="worst")
        ensemble.fit(few, settings=RewardSettings(seed=10 * seed, progress=False))
        return ensemble
    pairs = {
        "few": lambda: few,
        "many": lambda: make_pairs(MANY, annotator=noisy(FLIPS), seed=seed),
        "validation": lambda: make_pairs(FEW, annotator=noisy(FLIPS), seed=1000 + seed),
    }
    return trained(pairs[name](), seed=seed)


def scaled_reward(name: str, task: Task) -> RewardFn:
    """`poor_reward` with mean 0 and standard deviation 1 on the base's samples."""
    model, samples = (
        poor_reward(name, task.seed),
        sampled(task.base, task.tokenizer, task.prompts[::2], seed=1),
    )
    if name == "worst of 4":
        model.normalise(samples.prompts, samples.responses)
    return normalise_reward(model, samples.prompts, samples.responses)


def best_of_n_overoptimisation(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, prompts: int = 40, samples: int = 512
) -> pd.DataFrame:
    """Best-of-n by a poor reward model: n, kl (exact), kl_bound, proxy, gold; one draw of samples for all.

    Columns seed and cure ("none": 250 pairs, "more pairs": 750) besides.
    """
    task, rows = make_task(0, pairs=16), []
    asked = task.heldout[:: max(1, len(task.heldout) // prompts)][:prompts]
    drawn = sampled(task.base, task.tokenizer, asked, seed=9, each=samples)
    gold = gold_reward(drawn.prompts, drawn.responses).view(prompts, samples)
    *texts, where = distinct_texts(drawn)
    for seed in seeds:
        for cure, name in (("none", "few"), ("more pairs", "many")):
            reward = scaled_reward(name, Task(**{**vars(task), "seed": seed}))
            proxy = reward(*texts).cpu()[where].view(prompts, samples)
            curve = best_of_n_curve(proxy, gold, NS)
            curve.insert(1, "kl", best_of_n_exact_kl(proxy, NS).numpy())
            rows.append(curve.assign(seed=seed, cure=cure))
            print(seed, cure, curve.gold.round(3).tolist(), flush=True)
    facts = {
        "seeds": list(seeds),
        "prompts": prompts,
        "samples": samples,
        "flips": FLIPS,
        "pairs": [FEW, MANY],
    }
    return write_study(out, "best_of_n_overoptimisation", pd.concat(rows, ignore_index=True), **facts)


def rl_overoptimisation(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    cures: Sequence[str] = tuple(CURES),
    **changes: Any,
) -> pd.DataFrame:
    """54 steps of RLOO on a poor reward model, looked at every 6 steps, with each cure.

    Columns: seed, cure, step, the measures of `methods.measure` (proxy: of the reward that is searched), and
    validation: the reward of a second model from 250 other pairs, for early stopping. changes: of `SEARCH`.
    """
    rows = []
    for seed in seeds:
        task = make_task(seed, pairs=16)  # its own reward is not used
        validation = scaled_reward("validation", task)
        for cure in cures:
            for row in _search(cure, task, validation, changes):
                rows.append({"seed": seed, "cure": cure, **row})
            print(seed, cure, [round(r["gold"], 3) for r in rows if r["seed"] == seed and r["cure"] == cure])
    facts = {"seeds": list(seeds), "flips": FLIPS, "pairs": [FEW, MANY], "search": SEARCH | changes}
    return write_study(out, "rl_overoptimisation", pd.DataFrame(rows), **facts)


def _search(cure: str, task: Task, validation: RewardFn, changes: dict[str, Any]) -> list[dict[str, Any]]:
    """The looks at one run, the first before any step."""
    name, price = CURES[cure]
    searched: list[RewardFn] = []  # what iterative RLHF has refitted so far
    refit = partial(refit_on, task=task, searched=searched)
    reward = scaled_reward("few" if name == "iterative" else name, task)

    def look(model: torch.nn.Module) -> dict[str, float]:
        proxy = searched[-1] if searched else reward
        return measure(model, task, samples=1, proxy=proxy, validation=validation)

    model = deepcopy(task.base)
    own = {"seed": task.seed, "kl_coef": price, "eval_every": EVERY, "progress": False}
    settings = RLOOSettings(**{**SEARCH, **own, **changes})
    first, options = look(model), {"ref_model": task.base, "eval_fn": look}
    if name == "iterative":
        options |= {"rounds": ROUNDS, "prompts_per_round": FEW // 2}
        settings = RLOOSettings(**{**vars(settings), "steps": settings.steps // ROUNDS})
        history = iterative_rlhf(model, task.tokenizer, task.prompts, refit, settings, **options)
    else:
        history = rloo(model, task.tokenizer, task.prompts, reward, settings, **options)
    return looks_of(first, history)


def refit_on(
    rollouts: list[Rollout], *, task: Task, searched: list[RewardFn], group: int = 4
) -> Callable[..., Any]:
    """A reward model from labels of what the policy has said: two pairs a prompt, a fourth of them wrong.

    Each round labels the newest samples and trains anew on all labels so far; `searched` keeps the rewards.
    """
    people, rows = noisy(FLIPS), []
    for number, rollout in enumerate(rollouts):
        both = [(i, i + 1) for start in range(0, len(rollout), group) for i in (start, start + 2)]
        both = [(i, j) for i, j in both if rollout.responses[i] != rollout.responses[j]]
        asked = [rollout.prompts[i] for i, _ in both]
        sides = [[rollout.responses[pair[k]] for pair in both] for k in (0, 1)]
        wins = people.compare(asked, *sides, seed=100 * task.seed + number)
        for prompt, a, b, won in zip(asked, *sides, wins, strict=True):
            if a.strip() and b.strip():
                chosen, rejected = (a, b) if won else (b, a)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    model = trained(rows, seed=task.seed)
    samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=1)
    searched.append(normalise_reward(model, samples.prompts, samples.responses))
    return searched[-1]
