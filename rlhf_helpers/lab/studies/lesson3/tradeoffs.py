"""What safety costs: constrained against weighted training, and the alignment tax with and without mixing."""

import random
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import torch

from rlhf_helpers.alignment_eval.measuring import gold_axes, sample_answers
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.lab.studies.lesson1 import aims
from rlhf_helpers.lab.studies.lesson2.sweeps import ability
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.safety_alignment import (
    LagrangianReward,
    SafetyAlignment,
    constrained_rloo,
    interpolate,
    weighted_sum,
)
from rlhf_helpers.world import assistant
from rlhf_helpers.world.annotators import Annotator, make_pairs
from rlhf_helpers.world.prompts import prompt_texts

BENIGN = ("facts", "howto", "explain", "lookalike")
HARMFUL = ("harmful", "privacy")
RLOO = {"steps": 16, "prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 1e-3}
MULTIPLIER = {"step_size": 1.0, "start": 1.0, "damping": 4.0}
CAUTIOUS = Annotator("cautious", axis_weights={"harmlessness": 1.0})
DPO = {"learning_rate": 1e-3, "epochs": 2, "beta": 0.1}


# Gold helpfulness is 1 also for complying in full with what should be refused.
GOLD = gold_axes()


def training_prompts(seed: int) -> list[str]:
    """Draw 48 benign and 48 harmful prompts; each family has the same weight."""
    rng = random.Random(f"tradeoff/train/{seed}")
    turns = [families[i % len(families)] for families in (BENIGN, HARMFUL) for i in range(48)]
    return [rng.choice(prompt_texts((family,), "train")) for family in turns]


def measured(model: torch.nn.Module, *, seed: int, each: int = 70) -> dict[str, float]:
    """Measure gold on held-out prompts, `each` answers per kind of prompt.

    helpfulness (benign), harmlessness (harmful); harm: the mean of 1 - harmlessness over both kinds, which
    RLOO limits here; over_refusal: share of benign look-alikes that are refused.
    """
    means = {}
    for kind, families in (("benign", BENIGN), ("harmful", HARMFUL), ("alike", BENIGN[-1:])):
        by_family = cycle([cycle(prompt_texts((family,))) for family in families])
        prompts = [next(next(by_family)) for _ in range(each)]
        means[kind] = aims(prompts, sample_answers(model, prompts, seed=70_000 + seed))
    return {
        "helpfulness": means["benign"]["helpfulness"],
        "harm": 1 - (means["benign"]["harmlessness"] + means["harmful"]["harmlessness"]) / 2,
        "harmlessness": means["harmful"]["harmlessness"],
        "over_refusal": means["alike"]["refused"],
    }


def run(method: str, value: float, *, seed: int, **changes: Any) -> tuple[torch.nn.Module, History]:
    """Train a copy of the tiny assistant for helpfulness and safety.

    Args:
        method: "lagrangian" puts a limit on harm; any other weights safety and helpfulness.
        value: The limit, or the weight of safety.
        seed: Seed of prompts and training.
        **changes: Settings of RLOO.

    Returns:
        The model and its history.
    """
    model, tokenizer = load_model("tiny")
    settings = RLOOSettings(**{**RLOO, **changes}, seed=seed)
    prompts = training_prompts(seed)
    if method == "lagrangian":
        costs = {"harm": lambda *texts, **columns: 1 - GOLD["harmlessness"](*texts, **columns)}
        reward = LagrangianReward(GOLD["helpfulness"], costs, {"harm": value}, **MULTIPLIER)
        return model, constrained_rloo(model, tokenizer, prompts, reward, settings)
    reward = weighted_sum(GOLD, {"helpfulness": 1 - value, "harmlessness": value})
    return model, rloo(model, tokenizer, prompts, reward, settings)


@study
def constraints(
    seed: int, weights: Sequence[float] = (0.3, 0.5), limits: Sequence[float] = (0.3, 0.2, 0.1)
) -> Rows:
    """Run RLOO on helpfulness and safety: each alone (single), weighted, and safety as a constraint.

    The rewards are gold's own axes: the study compares optimisers, with judges that cannot be gamed. A weight
    is that of safety, and helpfulness gets the rest; a limit is on E[harm] over both kinds of prompts, where
    the base has about 0.34. Columns: seed, method (base, single, weighted, lagrangian), setting (weight or
    limit), cost (mean harm on the training prompts, new samples), multiplier (at the end), and the measures
    of `measured`.
    """
    plan = [("base", 0.0), ("single", 0.0), ("single", 1.0)]
    plan += [("weighted", weight) for weight in weights] + [("lagrangian", limit) for limit in limits]
    for method, value in plan:
        (model, _), history = load_model("tiny"), [{}]
        if method != "base":
            model, history = run(method, value, seed=seed)
        prompts = training_prompts(seed)
        seen = sample_answers(model, prompts, seed=80_000 + seed)
        yield {
            "method": method,
            "setting": value,
            "cost": 1 - aims(prompts, seen)["harmlessness"],
            "multiplier": history[-1].get("multiplier/harm", 0.0),
            **measured(model, seed=seed),
        }


def safety_rows(seed: int, pairs: int) -> list[Row]:
    """Compare answers to what should be refused, by an annotator (noise included) who only sees harm."""
    return make_pairs(pairs, annotator=CAUTIOUS, families=(*HARMFUL, "jailbreak"), seed=seed)


@study
def safety_tax(
    seed: int,
    pairs: int = 320,
    strengths: Sequence[float] = (0.5, 1.0),
    mixes: Sequence[float] = (0.0, 1.0),
) -> Rows:
    """Run DPO on safety pairs without and with pretraining text, at several strengths.

    Columns: seed, mix (weight of the text's loss), strength (0: the base), the measures of `measured` and of
    `lab.studies.lesson2.sweeps.ability`: comparison accuracy, and surprise in nats per token of other tasks.
    """
    base, _ = load_model("tiny")
    text, rows = assistant.corpus(400, seed=100 + seed), safety_rows(seed, pairs)
    for mix in mixes:
        aligner = SafetyAlignment(base, seed=seed, **DPO)
        aligned = aligner.align(rows, 1.0, pretraining=text, mix_weight=mix)
        for strength in (0.0, *strengths):
            model = interpolate(base, aligned, strength)
            result = measured(model, seed=seed) | ability(model)
            yield {"mix": mix, "strength": strength, **result}
