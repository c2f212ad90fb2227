"""Over-optimisation: what happens to gold when a bad reward model is optimised hard, and what helps.

The set-up of Gao, Schulman and Hilton 2022 in small: reward models trained on few labels of which a quarter
are wrong (Coste et al. 2023), best-of-n and RLOO without a KL penalty, gold measured all along.
"""

import functools
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.lab.studies.lesson1 import (
    COUNTS,
    FLIPS,
    base_samples,
    compared,
    noisy,
    scored_once,
    trained,
    trained_ensemble,
)
from rlhf_helpers.lab.studies.lesson2.methods import Task, eval_history, make_task, measure, sampled, scaled
from rlhf_helpers.lab.studies.runner import Row, Rows, study
from rlhf_helpers.policy_optimization import (
    RLOOSettings,
    best_of_n_curve,
    best_of_n_exact_kl,
    iterative_rlhf,
    rloo,
)
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward

FEW, MANY = 250, 750
SEARCH = {"prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 9e-4, "eval_every": 6}
SEARCH |= {"progress": False}
ROUNDS = 3  # of iterative RLHF; each buys FEW labels, MANY in all
# cure -> which reward is optimised, and kl_coef
CURES = {
    "none": ("few", 0.0),
    "KL price 0.1": ("few", 0.1),
    "KL price 0.3": ("few", 0.3),
    "worst of 4": ("worst of 4", 0.0),
    "more pairs": ("many", 0.0),
    "iterative": ("few", 0.0),
}


def poor_reward(name: str, task: Task) -> RewardFn:
    """Train a reward model of which a quarter of the labels are wrong.

    Its rewards have mean 0 and standard deviation 1 on the base's samples.

    Args:
        name: "few" (250 pairs), "many" (750), "validation" (250 others), or "worst of 4" (the least of four
            models that differ in their head and in the order of the same 250 pairs).
        task: The base and the seed.
    """
    count = MANY if name == "many" else FEW
    seed = task.seed + 1000 if name == "validation" else task.seed
    labelled = make_pairs(count, annotator=noisy(FLIPS), seed=seed)
    if name == "worst of 4":
        samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=1)
        return scaled(trained_ensemble(labelled, samples, seed=task.seed, aggregate="worst"), task)
    return scaled(trained(labelled, seed=task.seed), task)


@study(flips=FLIPS, pairs=[FEW, MANY])
def best_of_n_overoptimisation(seed: int, prompts: int = 40, samples: int = 512) -> Rows:
    """Measure best-of-n by a poor reward model: seed, cure, n, kl_bound, proxy, gold, kl (exact).

    cure: "none" (250 pairs) or "more pairs" (750).
    """
    task = make_task(seed, gold_reward)  # its own reward is not used
    asked = task.heldout[:: len(task.heldout) // prompts][:prompts]
    rollout, gold = base_samples(tuple(asked), samples)
    for cure in ("none", "more pairs"):
        proxy = scored_once(poor_reward(CURES[cure][0], task), rollout).view(gold.shape)
        curve = best_of_n_curve(proxy, gold, COUNTS).assign(kl=best_of_n_exact_kl(proxy, COUNTS).numpy())
        for row in curve.to_dict("records"):
            yield {"cure": cure, **row}


@study(flips=FLIPS, pairs=[FEW, MANY], **SEARCH)
def rl_overoptimisation(
    seed: int,
    cures: Sequence[str] = tuple(CURES),
    steps: int = 54,
) -> Rows:
    """Run RLOO on a poor reward model with each cure, measured every six steps.

    Columns: seed, cure, step, the measures of `methods.measure` (proxy: the reward that is optimised), and
    validation: the reward of a second model from 250 other pairs, for early stopping.
    """
    task = make_task(seed, gold_reward)  # its own reward is not used
    validation = poor_reward("validation", task)
    for cure in cures:
        for row in _search(cure, task, validation, steps):
            yield {"cure": cure, **row}


def _search(cure: str, task: Task, validation: RewardFn, steps: int) -> list[Row]:
    """Run one cure and list its measures, the first before any step."""
    name, kl_coef = CURES[cure]
    rounds = ROUNDS if cure == "iterative" else 1
    settings = RLOOSettings(steps=steps // rounds, kl_coef=kl_coef, seed=task.seed, **SEARCH)
    # The last one is optimised; iterative RLHF adds one per round.
    rewards = [poor_reward(name, task)]

    def measure_all(model: torch.nn.Module) -> dict[str, float]:
        return measure(model, task, samples=1, proxy=rewards[-1], validation=validation)

    model = deepcopy(task.base)
    first, options = measure_all(model), {"ref_model": task.base, "eval_fn": measure_all}
    if cure == "iterative":
        refit = functools.partial(refit_on, task=task, searched=rewards)
        options |= {"rounds": rounds, "prompts_per_round": FEW // 2}
        history = iterative_rlhf(model, task.tokenizer, task.prompts, refit, settings, **options)
    else:
        history = rloo(model, task.tokenizer, task.prompts, rewards[-1], settings, **options)
    return eval_history(first, history)


def refit_on(rollouts: list[Rollout], *, task: Task, searched: list[RewardFn]) -> Callable[..., Any]:
    """Train a reward model on labels of the policy's samples: two pairs per prompt, a quarter wrong.

    Each round labels the newest samples and trains anew on all labels so far; `searched` collects the
    rewards.
    """
    rows = []
    for number, rollout in enumerate(rollouts):
        first, second = rollout.responses[::2], rollout.responses[1::2]
        texts = zip(rollout.prompts[::2], first, second, strict=True)
        different = [text for text in texts if text[1] != text[2]]
        rows += compared(different, noisy(FLIPS), seed=100 * task.seed + number)
    rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
    searched.append(scaled(trained(rows, seed=task.seed), task))
    return searched[-1]
