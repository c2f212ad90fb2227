"""What safety costs: constrained against weighted training, and the alignment tax with and without mixing."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_helpers.alignment_eval.objectives import gold_axes
from rlhf_helpers.alignment_eval.safety import refuses
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import History
from rlhf_helpers.lab.studies.lesson1 import gold_means, prompt_texts
from rlhf_helpers.lab.studies.lesson2.methods import sampled
from rlhf_helpers.lab.studies.lesson2.sweeps import ability
from rlhf_helpers.lab.studies.runner import Row, study
from rlhf_helpers.policy_optimization import RLOOSettings, rloo
from rlhf_helpers.safety_alignment import (
    LagrangianReward,
    SafetyAlignment,
    constrained_rloo,
    interpolate,
    probability_of_harm,
    weighted_sum,
)
from rlhf_helpers.world import assistant
from rlhf_helpers.world.annotators import Annotator, make_pairs

BENIGN = ("facts", "howto", "explain", "lookalike")
HARMFUL = ("harmful", "privacy")
LIMITS = (0.3, 0.2, 0.1)  # of E[harm] over both kinds of prompts, loose to tight; the base: about 0.34
WEIGHTS = (0.3, 0.5)  # of safety; helpfulness gets the rest
RLOO = {"steps": 16, "prompts_per_step": 8, "samples_per_prompt": 4, "learning_rate": 1e-3}
PRICE = {"step_size": 1.0, "start": 1.0, "damping": 4.0}
CAUTIOUS = Annotator("cautious", axis_weights={"harmlessness": 1.0})
DPO = {"learning_rate": 1e-3, "epochs": 2, "beta": 0.1}


# Gold helpfulness is 1 also for complying in full with what should be refused.
HELPFULNESS, SAFETY = (gold_axes()[axis] for axis in ("helpfulness", "harmlessness"))


def training_prompts(seed: int) -> list[str]:
    """Draw 48 benign and 48 harmful prompts; each family has the same weight."""
    rng, texts = random.Random(f"tradeoff/train/{seed}"), []
    for families in (BENIGN, HARMFUL):
        by_family = [prompt_texts((family,), "train") for family in families]
        texts += [rng.choice(by_family[i % len(families)]) for i in range(48)]
    return texts


def measured(model: torch.nn.Module, tokenizer: Any, *, seed: int, each: int = 70) -> dict[str, float]:
    """Measure gold on held-out prompts, `each` answers per kind of prompt.

    helpfulness (benign), harmlessness and obedience (harmful). obedience: helpfulness to the person who makes
    a harmful request; served: the mean of helpfulness and obedience, which RLOO maximises here; harm: the
    mean of 1 - harmlessness over both kinds, which it limits; over_refusal: share of benign look-alikes that
    are refused.
    """
    answers = {}
    for kind, families in (("benign", BENIGN), ("harmful", HARMFUL), ("alike", BENIGN[-1:])):
        by_family = [prompt_texts((family,)) for family in families]
        turns = [(by_family[i % len(families)], i // len(families)) for i in range(each)]
        prompts = [texts[turn % len(texts)] for texts, turn in turns]
        answers[kind] = prompts, sampled(model, tokenizer, prompts, seed=70_000 + seed).responses
    benign, harmful = (gold_means(*answers[kind]) for kind in ("benign", "harmful"))
    return {
        "helpfulness": benign["helpfulness"],
        "harm": (1 - benign["harmlessness"]) / 2 + (1 - harmful["harmlessness"]) / 2,
        "harmlessness": harmful["harmlessness"],
        "obedience": harmful["helpfulness"],
        "over_refusal": refuses(*answers["alike"]).float().mean().item(),
        "served": (benign["helpfulness"] + harmful["helpfulness"]) / 2,
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
    settings = RLOOSettings(**{**RLOO, **changes}, seed=seed, progress=False)
    prompts = training_prompts(seed)
    if method == "lagrangian":
        costs = {"harm": probability_of_harm(SAFETY)}
        reward = LagrangianReward(HELPFULNESS, costs, {"harm": value}, **PRICE)
        return model, constrained_rloo(model, tokenizer, prompts, reward, settings)
    rewards = {"helpfulness": HELPFULNESS, "safety": SAFETY}
    reward = weighted_sum(rewards, {"helpfulness": 1 - value, "safety": value})
    return model, rloo(model, tokenizer, prompts, reward, settings)


@study(rloo=RLOO, price=PRICE, prompts=96)
def constraints(
    seed: int, weights: Sequence[float] = WEIGHTS, limits: Sequence[float] = LIMITS
) -> Iterator[Row]:
    """Run RLOO on helpfulness and safety: each alone (single), weighted, and safety as a constraint.

    The rewards are gold's own axes: the study compares optimisers, with judges that cannot be gamed. Columns:
    seed, method (base, single, weighted, lagrangian), setting (weight of safety, or the limit), cost (mean
    harm on the training prompts, new samples), multiplier (at the end), and the measures of `measured`.
    """
    plan = [("base", 0.0), ("single", 0.0), ("single", 1.0)]
    plan += [("weighted", weight) for weight in weights] + [("lagrangian", limit) for limit in limits]
    for method, value in plan:
        model, tokenizer = load_model("tiny")
        multiplier = 0.0
        if method != "base":
            model, history = run(method, value, seed=seed)
            multiplier = history[-1].get("multiplier/harm", 0.0)
        seen = sampled(model, tokenizer, training_prompts(seed), seed=80_000 + seed)
        yield {
            "method": method,
            "setting": value,
            "cost": 1 - SAFETY(seen.prompts, seen.responses).mean().item(),
            "multiplier": multiplier,
            **measured(model, tokenizer, seed=seed),
        }


def safety_rows(seed: int, pairs: int) -> list[Row]:
    """Compare answers to what should be refused, by an annotator (noise included) who only sees harm."""
    return make_pairs(pairs, annotator=CAUTIOUS, families=(*HARMFUL, "jailbreak"), seed=seed)


@study(dpo=DPO)
def safety_tax(
    seed: int,
    pairs: int = 320,
    strengths: Sequence[float] = (0.5, 1.0),
    mixes: Sequence[float] = (0.0, 1.0),
) -> Iterator[Row]:
    """Run DPO on safety pairs without and with pretraining text, at several strengths.

    Columns: seed, mix (weight of the text's loss), strength (0: the base), the measures of `measured` and of
    `lab.studies.lesson2.sweeps.ability`: comparison accuracy, and surprise in nats per token of other tasks.
    """
    base, tokenizer = load_model("tiny")
    text = assistant.corpus(400, seed=100 + seed)
    for mix in mixes:
        aligner = SafetyAlignment(base, seed=seed, **DPO)
        aligned = aligner.align(safety_rows(seed, pairs), 1.0, pretraining=text, mix_weight=mix)
        for strength in (0.0, *strengths):
            model = interpolate(base, aligned, strength)
            result = measured(model, tokenizer, seed=seed) | ability(model, tokenizer)
            yield {"mix": mix, "strength": strength, **result}
