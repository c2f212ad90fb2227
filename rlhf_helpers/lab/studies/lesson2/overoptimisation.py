"""Over-optimisation: what happens to gold when a bad reward model is optimised hard, and what helps.

The set-up of Gao, Schulman and Hilton 2022 in small: reward models trained on few labels of which a quarter
are wrong (Coste et al. 2023), best-of-n and RLOO without a KL penalty, gold measured all along.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from rlhf_helpers.core.generation import Rollout
from rlhf_helpers.core.models import RewardFn
from rlhf_helpers.lab.studies.lesson1 import compared, distinct_texts, noisy, trained
from rlhf_helpers.lab.studies.lesson2.methods import Task, eval_history, make_task, measure, sampled
from rlhf_helpers.lab.studies.runner import Row, study
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
# cure -> which reward is optimised, and kl_coef
CURES = {
    "none": ("few", 0.0),
    "KL price 0.1": ("few", 0.1),
    "KL price 0.3": ("few", 0.3),
    "worst of 4": ("worst of 4", 0.0),
    "more pairs": ("many", 0.0),
    "iterative": ("iterative", 0.0),
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
    samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=1)
    if name == "worst of 4":
        model = create_reward_model("ensemble", seed=10 * task.seed, members=4, aggregate="worst")
        model.fit(labelled, settings=RewardSettings(seed=10 * task.seed, progress=False))
        model.normalise(samples.prompts, samples.responses)
    else:
        model = trained(labelled, seed=task.seed)
    return normalise_reward(model, samples.prompts, samples.responses)


@functools.lru_cache(maxsize=1)  # all seeds judge the same samples
def _base_samples(prompts: int, samples: int) -> tuple[Task, Rollout]:
    """Sample the base's answers to held-out prompts; the reward of the task is not used."""
    task = make_task(0, pairs=16)
    asked = task.heldout[:: max(1, len(task.heldout) // prompts)][:prompts]
    return task, sampled(task.base, task.tokenizer, asked, seed=9, each=samples)


@study(flips=FLIPS, pairs=[FEW, MANY])
def best_of_n_overoptimisation(seed: int, prompts: int = 40, samples: int = 512) -> Iterator[Row]:
    """Measure best-of-n by a poor reward model: seed, cure, n, kl_bound, proxy, gold, kl (exact).

    cure: "none" (250 pairs) or "more pairs" (750).
    """
    task, rollout = _base_samples(prompts, samples)
    gold = gold_reward(rollout.prompts, rollout.responses).view(prompts, samples)
    *texts, index = distinct_texts(rollout)
    counts = [2**k for k in range(9)]
    for cure, name in (("none", "few"), ("more pairs", "many")):
        reward = poor_reward(name, replace(task, seed=seed))
        proxy = reward(*texts).cpu()[index].view(prompts, samples)
        curve = best_of_n_curve(proxy, gold, counts).assign(kl=best_of_n_exact_kl(proxy, counts).numpy())
        for row in curve.to_dict("records"):
            yield {"cure": cure, **row}


@study(flips=FLIPS, pairs=[FEW, MANY])
def rl_overoptimisation(
    seed: int,
    cures: Sequence[str] = tuple(CURES),
    steps: int = 54,
    prompts_per_step: int = 8,
    samples_per_prompt: int = 4,
    learning_rate: float = 9e-4,
    eval_every: int = 6,
) -> Iterator[Row]:
    """Run RLOO on a poor reward model with each cure, measured every `eval_every` steps.

    Columns: seed, cure, step, the measures of `methods.measure` (proxy: the reward that is optimised), and
    validation: the reward of a second model from 250 other pairs, for early stopping.
    """
    task = make_task(seed, pairs=16)  # its own reward is not used
    validation = poor_reward("validation", task)
    settings = RLOOSettings(
        steps=steps,
        prompts_per_step=prompts_per_step,
        samples_per_prompt=samples_per_prompt,
        learning_rate=learning_rate,
        eval_every=eval_every,
        seed=seed,
        progress=False,
    )
    for cure in cures:
        for row in _search(cure, task, validation, settings):
            yield {"cure": cure, **row}


def _search(cure: str, task: Task, validation: RewardFn, settings: RLOOSettings) -> list[Row]:
    """Run one cure and list its measures, the first before any step."""
    name, kl_coef = CURES[cure]
    settings = replace(settings, kl_coef=kl_coef)
    rewards: list[RewardFn] = []  # the last one is optimised; iterative RLHF adds one per round
    rewards.append(poor_reward("few" if name == "iterative" else name, task))

    def measure_all(model: torch.nn.Module) -> dict[str, float]:
        return measure(model, task, samples=1, proxy=rewards[-1], validation=validation)

    model = deepcopy(task.base)
    first, options = measure_all(model), {"ref_model": task.base, "eval_fn": measure_all}
    if name == "iterative":
        refit = functools.partial(refit_on, task=task, searched=rewards)
        options |= {"rounds": ROUNDS, "prompts_per_round": FEW // 2}
        settings = replace(settings, steps=settings.steps // ROUNDS)
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
    model = trained(rows, seed=task.seed)
    samples = sampled(task.base, task.tokenizer, task.prompts[::2], seed=1)
    searched.append(normalise_reward(model, samples.prompts, samples.responses))
    return searched[-1]
