"""Over-optimisation: what happens to gold when a bad reward model is optimised hard, and what helps.

The set-up of Gao, Schulman and Hilton 2022 in small: reward models trained on few labels of which a quarter
are wrong (Coste et al. 2023), best-of-n and RLOO without a KL penalty, gold measured all along.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.lab.studies.lesson1 import (
    COUNTS,
    FLIPS,
    base_samples,
    noisy,
    scored_once,
    trained,
    trained_ensemble,
)
from rlhf_helpers.lab.studies.lesson2.methods import Task, eval_history, make_task, measure, sampled, scaled
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import (
    RLOOSettings,
    best_of_n_curve,
    best_of_n_exact_kl,
    iterative_rlhf,
    rloo,
)
from rlhf_helpers.world.annotators import label_pairs, make_pairs
from rlhf_helpers.world.gold_judge import gold_reward

FEW = 250  # labelled pairs of a poor reward model
MANY = 750
SEARCH = {"prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 9e-4, "eval_every": 6}
ROUNDS = 3  # of iterative RLHF; each buys a third of the many labels
# cure -> kl_coef; the study itself says what else a cure changes
CURES = {
    "none": 0.0,
    "KL coefficient 0.1": 0.1,
    "KL coefficient 0.3": 0.3,
    "KL coefficient 1": 1.0,
    "worst of 4": 0.0,
    "more pairs": 0.0,
    "iterative": 0.0,
}


def poor_reward(task: Task, pairs: int, *, seed: int, worst_of_4: bool = False) -> RewardFn:
    """Train a reward model on `pairs` labels of which a quarter are wrong.

    Its rewards have mean 0 and standard deviation 1 on the base's samples. worst_of_4: the least of four
    models that differ in their head and in the order of the same pairs.
    """
    labelled = make_pairs(pairs, annotator=noisy(FLIPS), seed=seed)
    if worst_of_4:
        samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=1)
        return scaled(trained_ensemble(labelled, samples, seed=task.seed, aggregate="worst"), task)
    return scaled(trained(labelled, seed=task.seed), task)


@study
def best_of_n_overoptimisation(
    seed: int, prompts: int = 40, samples: int = 512, few: int = FEW, many: int = MANY
) -> Rows:
    """Measure best-of-n by a poor reward model: seed, cure, n, kl_bound, proxy, gold, kl (exact).

    cure: "none" (`few` pairs) or "more pairs" (`many`).
    """
    task = make_task(seed, gold_reward)  # its own reward is not used
    asked = task.heldout[:: len(task.heldout) // prompts][:prompts]
    rollout, gold = base_samples(tuple(asked), samples)
    for cure, pairs in {"none": few, "more pairs": many}.items():
        proxy = scored_once(poor_reward(task, pairs, seed=seed), rollout).view(gold.shape)
        curve = best_of_n_curve(proxy, gold, COUNTS).assign(kl=best_of_n_exact_kl(proxy, COUNTS).numpy())
        for row in curve.to_dict("records"):
            yield {"cure": cure, **row}


@study
def rl_overoptimisation(
    seed: int,
    cures: Sequence[str] = tuple(CURES),
    steps: int = 54,
    few: int = FEW,
    many: int = MANY,
    budget: Row = SEARCH,
    **size: Any,
) -> Rows:
    """Run RLOO on a poor reward model with each cure, measured every six steps.

    Columns: seed, cure, step, the measures of `methods.measure` (proxy: the reward that is optimised), and
    validation: the reward of a second model from `few` other pairs, for early stopping. size: options of
    `make_task`.
    """
    task = make_task(seed, gold_reward, **size)  # its own reward is not used
    validation = poor_reward(task, few, seed=seed + 1000)
    rewards = []  # the last one is optimised

    def measure_all(model: torch.nn.Module) -> dict[str, float]:
        return measure(model, task, samples=1, proxy=rewards[-1], validation=validation)

    def refit(rollouts: list[Rollout]) -> RewardFn:
        rewards.append(scaled(trained(round_labels(rollouts, seed=seed), seed=seed), task))
        return rewards[-1]

    for cure in cures:
        pairs = many if cure == "more pairs" else few
        rewards.append(poor_reward(task, pairs, seed=seed, worst_of_4=cure == "worst of 4"))
        rounds = ROUNDS if cure == "iterative" else 1
        settings = RLOOSettings(steps=steps // rounds, kl_coef=CURES[cure], seed=seed, **budget)
        model = deepcopy(task.base)
        first, options = measure_all(model), {"ref_model": task.base, "eval_fn": measure_all}
        args = model, task.tokenizer, task.prompts
        if cure == "iterative":
            options |= {"rounds": rounds, "prompts_per_round": few // 2}
            history = iterative_rlhf(*args, refit, settings, **options)
        else:
            history = rloo(*args, rewards[-1], settings, **options)
        for row in eval_history(first, history):
            yield {"cure": cure, **row}


def round_labels(rollouts: Sequence[Rollout], *, seed: int, flips: float = FLIPS) -> list[Row]:
    """Label the policy's samples of every round so far: two pairs per prompt, a quarter of them wrong."""
    rows = []
    for number, rollout in enumerate(rollouts):
        first, second = rollout.responses[::2], rollout.responses[1::2]
        texts = zip(rollout.prompts[::2], first, second, strict=True)
        different = [text for text in texts if text[1] != text[2]]
        rows += label_pairs(different, noisy(flips), seed=100 * seed + number)
    return [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
