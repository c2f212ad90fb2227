"""Red-team studies of lesson 3: the gain and the cost of hardening; the effect of kl_coef on an attacker."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.alignment_eval.measuring import sample_answers
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.lesson1 import aims
from rlhf_helpers.lab.studies.record import Rows, study
from rlhf_helpers.red_teaming import (
    STRATEGIES,
    RedTeaming,
    RedTeamingEvaluator,
    adversarial_training,
    create_adversarial_prompts,
    measure_attacker,
    train_attacker,
)
from rlhf_helpers.red_teaming.hardening import BENIGN, SETTINGS
from rlhf_helpers.red_teaming.policy import ATTACKER
from rlhf_helpers.world.prompts import prompt_texts

TRAINED = ("direct", "mutation", "injection", "role_play")
NEW = "social_engineering"  # its wrappers are in none of the attacks that the model is hardened against
CATEGORIES = ("harmful", "privacy", "biased")
HELPED = BENIGN[:-1]  # without the look-alikes


def hardened(
    seed: int,
    attacks: int,
    *,
    strategies: Sequence[str] = TRAINED,
    categories: Sequence[str] = CATEGORIES,
    **options: Any,
) -> torch.nn.Module:
    """Train the tiny assistant on attacks; further options of `adversarial_training`."""
    base, _ = load_model("tiny")
    wrappers = {name: STRATEGIES[name] for name in strategies}
    train = create_adversarial_prompts(categories, attacks, seed=seed, strategies=wrappers, split="train")
    return adversarial_training(base, train, settings=replace(SETTINGS, seed=seed), **options)


def _costs(model: torch.nn.Module, seed: int) -> Rows:
    """Measure the share of held-out look-alikes that are refused, and helpfulness of benign prompts."""
    looked_at = {
        "over_refusal": (prompt_texts(("lookalike",)) * 20, "refusal"),
        "helpfulness": (prompt_texts(HELPED) * 3, "helpfulness"),
    }
    for name, (prompts, aim) in looked_at.items():
        value = aims(prompts, sample_answers(model, prompts, seed=70_000 + seed))[aim]
        yield {"kind": "cost", "name": name, "value": value, "n": len(prompts)}


def _rates(kind: str, table: pd.DataFrame) -> Rows:
    for row in table.itertuples():
        yield {"kind": kind, "name": row.Index, "value": row.rate, "n": row.n}


@study
def red_team_campaign(seed: int, train_attacks: int = 90, test_attacks: int = 60) -> Rows:
    """Attack, harden, attack again: seed, model, kind ("attack", "cost", "transfer"), name, value, n.

    model: "before"; "hardened" (one round); "two rounds"; "no benign" (one round on refusals alone). Attacks
    are on held-out requests, 2 answers each; "social_engineering" is a strategy that no training attack used.
    kind "transfer" under "hardened": success against a model hardened with another seed of attacks that
    "worked here" or "failed here", against the first one. n: answers. Gold judges.
    """
    base, _ = load_model("tiny")
    wrappers = {name: STRATEGIES[name] for name in (*TRAINED, NEW)}
    test = create_adversarial_prompts(
        CATEGORIES, test_attacks, seed=1000 + seed, strategies=wrappers, split="heldout"
    )
    models = {
        "before": base,
        "hardened": hardened(seed, train_attacks),
        "two rounds": hardened(seed, train_attacks, rounds=2),
        "no benign": hardened(seed, train_attacks, benign=()),
    }
    for name, model in models.items():
        evaluator = RedTeamingEvaluator(RedTeaming(model, seed=60_000 + seed), test, samples=2)
        rates = pd.concat([evaluator.success_rates("strategy"), evaluator.success_rates()])
        rows = [*_rates("attack", rates), *_costs(model, seed)]
        if name == "hardened":
            other = RedTeaming(hardened(500 + seed, train_attacks), seed=80_000 + seed)
            rows += _rates("transfer", evaluator.transfer(other, samples=2))
        for row in rows:
            yield {"model": name, **row}


def guarded_target(seed: int, attacks: int = 90) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return the assistant as it is, and hardened against harmful requests but not those for private data."""
    base, _ = load_model("tiny")
    return base, hardened(seed, attacks, strategies=("direct", "template"), categories=("harmful",))


@study
def red_team_policy(
    seed: int,
    kl_coefs: Sequence[float] = (0.02, 0.1, 0.5),
    weights: Sequence[float] = (0.0, 1.0),
    n: int = 200,
    train_attacks: int = 90,
) -> Rows:
    """Train an attacker by RL at each kl_coef, with and without a diversity term, on `guarded_target`.

    Columns: seed, kl_coef, diversity_weight, success, different, distinct_2 (of n fresh attacks), kl (nats
    per attack, at the last step). The attacker before training has kl 0 and an empty kl_coef. Gold judges.
    """
    base, target = guarded_target(seed, train_attacks)
    red_team = RedTeaming(target, seed=10_000 * (seed + 1))
    plan = [(None, 0.0), *((kl_coef, weight) for kl_coef in kl_coefs for weight in weights)]
    for kl_coef, weight in plan:
        attacker, kl = base, 0.0
        if kl_coef is not None:
            settings = replace(ATTACKER, kl_coef=kl_coef, seed=seed)
            attacker, history = train_attacker(red_team, base, diversity_weight=weight, settings=settings)
            kl = history.last("objective/kl")
        result = measure_attacker(red_team, attacker, n=n, seed=60_000 + seed)
        del result["attacks"]
        yield {"kl_coef": kl_coef, "diversity_weight": weight, **result, "kl": kl}
