"""Single settings of lesson 2, swept over seeds: what each does to reward, gold, KL and entropy."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from rlhf_helpers.alignment_eval.evaluators import comparisons_right, corpus_logps
from rlhf_helpers.core.models import tokenizer_for
from rlhf_helpers.lab.studies.lesson2.methods import (
    BUDGET,
    chosen_values,
    eval_history,
    make_task,
    measure,
    offline_rows,
    run_method,
    sampled,
)
from rlhf_helpers.lab.studies.record import SEEDS, Row, Rows, study
from rlhf_helpers.world import assistant
from rlhf_helpers.world.annotators import make_pairs
from rlhf_helpers.world.gold_judge import gold_reward

SMALL_STEPS = {"steps": 20, "prompts_per_step": 8, "samples_per_prompt": 4, "kl_coef": 0.0}
REUSE = {**BUDGET, "steps": 6, "epochs": 4, "minibatches": 2}  # several passes over each step's samples
RATE = 1e-3
FRIENDLY = ("help", "thank", "wonderful", "brilliant", "good", "nice")


# In every study, `size` holds further options of `make_task`.


@partial(study, seeds=SEEDS[:3])
def clip_and_kl(
    seed: int,
    clips: Sequence[float] = (0.05, 0.2, 0.8),
    kl_coefs: Sequence[float] = (0.0, 0.1, 0.5),
    budget: Row = REUSE,
    **size: Any,
) -> Rows:
    """Run PPO with several passes over each step's samples, by cliprange and kl_coef.

    Columns: seed, cliprange, kl_coef, clipfrac (share of clipped tokens, mean over the run), the measures.
    The reward is the trained model of `make_task`.
    """
    task = make_task(seed, budget=budget, **size)
    for clip, kl_coef in product(clips, kl_coefs):
        setting = {"cliprange": clip, "kl_coef": kl_coef}
        run = run_method("PPO", task, RATE, **setting)
        clipfrac = run.history.to_frame()["policy/clipfrac"].mean()
        yield {**setting, "clipfrac": clipfrac, **measure(run.model, task)}


@study
def exploration(
    seed: int,
    temperatures: Sequence[float] = (0.5, 1.0, 1.5),
    bonuses: Sequence[float] = (0.02, 0.2),
    budget: Row = SMALL_STEPS,
    **size: Any,
) -> Rows:
    """Run RLOO on gold at several sampling temperatures, and with an entropy bonus at temperature 1.

    Columns: seed, temperature, entropy_coef, the measures, and distinct: the share of different texts among
    four answers to each held-out prompt (1: all differ, 1/4: all are the same). Measured at temperature 1.
    kl_coef is 0, so that only exploration keeps the policy from collapsing.
    """
    task = make_task(seed, gold_reward, budget=budget, **size)
    plan = [(temperature, 0.0) for temperature in temperatures] + [(1.0, bonus) for bonus in bonuses]
    for temperature, bonus in plan:
        setting = {"temperature": temperature, "entropy_coef": bonus}
        model = run_method("RLOO", task, RATE, **setting).model
        texts = sampled(model, task.tokenizer, task.heldout, seed=60_000 + seed, each=4).responses
        different = sum(len(set(texts[i : i + 4])) for i in range(0, len(texts), 4))
        yield {**setting, **measure(model, task), "distinct": different / len(texts)}


def friendly_and_long(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """Pay a tenth for each ten words and for each friendly word, a rule that can be gamed; a RewardFn."""
    words = torch.tensor([len(text.split()) for text in responses])
    friendly = torch.tensor([sum(text.lower().count(word) for word in FRIENDLY) for text in responses])
    return words / 100 + friendly / 10


def exact_reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """Pay 1 for a best answer and 0 for every other, a sparse reward; a RewardFn."""
    return (gold_reward(prompts, responses) > 0.999).float()


REWARDS = {"sparse": exact_reward, "shaped": gold_reward, "gameable": friendly_and_long}


@study
def reward_design(
    seed: int, names: Sequence[str] = tuple(REWARDS), budget: Row = SMALL_STEPS, **size: Any
) -> Rows:
    """Run RLOO on three rewards for the same goal: seed, design, the measures (proxy: that reward).

    The design "none" is the base, its proxy that of "gameable".
    """
    first = make_task(seed, gold_reward, budget=budget, **size)
    yield {"design": "none", **measure(first.base, first, proxy=friendly_and_long)}
    for name in names:
        task = replace(first, reward=REWARDS[name])
        model = run_method("RLOO", task, RATE).model
        yield {"design": name, **measure(model, task)}


@study
def kto_imbalance(seed: int, bad_per_good: int = 10, **size: Any) -> Rows:
    """Run KTO where one good answer comes on `bad_per_good` bad ones: seed, desirable_weight, the measures.

    All else is as in the row "KTO" of `methods`, which has about as many good answers as bad ones.
    """
    task = make_task(seed, **size)
    labeled = offline_rows(task, "kto")
    bad = [row for row in labeled if not row["label"]]
    good = [row for row in labeled if row["label"]][: len(bad) // bad_per_good]
    for weight in (1.0, bad_per_good):
        run = run_method("KTO", task, chosen_values()["KTO"], rows=bad + good, desirable_weight=weight)
        yield {"desirable_weight": weight, **measure(run.model, task)}


@study
def frontier(
    seed: int,
    betas: Sequence[float] = (0.03, 0.1, 0.3, 1.0),
    kl_coefs: Sequence[float] = (0.01, 0.03, 0.1, 0.3),
    **size: Any,
) -> Rows:
    """Run DPO by beta and PPO by kl_coef, both for gold: seed, method, setting, held-out reward and kl.

    DPO learns from as many samples of the base as PPO draws, ordered by gold.
    """
    task = make_task(seed, gold_reward, **size)
    plan = [("DPO", 1e-3, "beta", beta) for beta in betas]
    plan += [("PPO", 3e-4, "kl_coef", kl_coef) for kl_coef in kl_coefs]
    for name, rate, setting, value in plan:
        result = measure(run_method(name, task, rate, **{setting: value}).model, task)
        yield {"method": name.lower(), "setting": value, "reward": result["gold"], "kl": result["kl"]}


def ability(model: torch.nn.Module) -> dict[str, float]:
    """Measure two abilities that the reward does not mention.

    comparison: share of 100 pairs of answers of which the model names the better one, averaged over both
    orders; surprise: nats per token of 96 texts of its pretraining mix (articles, programs, critiques, ...).
    """
    pairs, tokenizer = make_pairs(160, split="heldout", seed=4), tokenizer_for(model)
    right = comparisons_right(model, tokenizer, pairs, 100)
    logps, mask = corpus_logps(model, tokenizer, assistant.corpus(96, seed=9))
    return {"comparison": right.float().mean().item(), "surprise": (-logps.sum() / mask.sum()).item()}


@partial(study, seeds=SEEDS[:3])
def ability_tax(
    seed: int, weights: Sequence[float] = (0.0, 1.0), steps: int = 16, eval_every: int = 4, **size: Any
) -> Rows:
    """Run PPO with and without pretraining text in its loss (PPO-ptx), measured every `eval_every` steps.

    Columns: seed, ptx_coef (weight of the text's loss, 0 for plain PPO), step, the measures, `ability`.
    """
    task = make_task(seed, **size)

    def measure_all(model: torch.nn.Module) -> dict[str, float]:
        return measure(model, task, samples=1) | ability(model)

    first, text = measure_all(task.base), assistant.corpus(400, seed=100 + seed)
    settings = {"steps": steps, "eval_every": eval_every, "kl_coef": 0.0}
    for weight in weights:
        options = {"eval_fn": measure_all, "ptx_rows": text if weight else None}
        run = run_method("PPO", task, RATE, options=options, ptx_coef=weight, **settings)
        for row in eval_history(first, run.history):
            yield {"ptx_coef": weight, **row}


SIZES = {
    "small": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2},
    "medium": {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 3},
    "large": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4},
}
SHIPPED = "large, shipped"
SHORT = assistant.Recipe(epochs=1, rows=20_000, warmup_steps=50)


@functools.cache  # all seeds start from the same models
def _pretrained(name: str, recipe: assistant.Recipe) -> tuple[torch.nn.Module, Any]:
    return assistant.train(recipe, seed=0, **SIZES[name])


@study
def model_sizes(
    seed: int,
    names: Sequence[str] = (*SIZES, SHIPPED),
    recipe: assistant.Recipe = SHORT,
    **size: Any,
) -> Rows:
    """Run RLOO on assistants of three sizes: seed, size, parameters, trained (0 or 1), the measures.

    The three are pretrained here on the same short text (about 8 minutes). "large, shipped" is the shipped
    assistant, which has the size of "large" and saw sixteen times the text; it needs no pretraining. The
    learning rate is the one that `method_tuning` chose for RLOO.
    """
    shipped = make_task(seed, **size)
    for name in names:
        task = shipped
        if name != SHIPPED:
            base, tokenizer = _pretrained(name, recipe)
            task = replace(shipped, base=base, tokenizer=tokenizer)
        models = (task.base, run_method("RLOO", task, RATE).model)
        for stage, model in enumerate(models):
            row = {"size": name, "parameters": model.num_parameters(), "trained": stage}
            yield row | measure(model, task)
