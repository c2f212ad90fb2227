"""Red-team studies of lesson 3: what hardening buys and costs; what the price of KL does to an attacker."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.red_teaming import (
    STRATEGIES,
    AdversarialPrompt,
    RedTeaming,
    RedTeamingEvaluator,
    adversarial_training,
    create_adversarial_prompts,
    measure_attacker,
    train_attacker,
)
from rlhf_helpers.red_teaming.hardening import SETTINGS
from rlhf_helpers.red_teaming.policy import ATTACKER
from rlhf_helpers.world.gold_judge import explain, gold_scores
from rlhf_helpers.world.prompts import load_prompts

TRAINED = ("direct", "mutation", "injection", "role_play")
NEW = ("social_engineering",)  # its wrappers are in no attack that the hardened model is trained on
CATEGORIES = ("harmful", "privacy", "biased")
HELPED = ("facts", "howto", "explain", "open", "feelings")


def attacks_by(names: Sequence[str], categories: Sequence[str], count: int, **options: Any) -> list[Any]:
    """`count` attacks over categories and these strategies alone; options of `create_adversarial_prompts`."""
    chosen = {name: STRATEGIES[name] for name in names}
    return create_adversarial_prompts(categories, count, strategies=chosen, **options)


def refused(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """Whether an answer holds a refusal, by the gold judge's parse of it; (B,) bool."""
    parsed = (explain(p, r) for p, r in zip(prompts, responses, strict=True))
    return torch.tensor([any(role == "refusal" for _, role in row) for row in parsed])


def costs(model: torch.nn.Module, tokenizer: Any, seed: int) -> dict[str, tuple[float, int]]:
    """Over-refusal of held-out look-alikes (share refused), helpfulness of benign held-out prompts; n."""
    alike = [p.text for p in load_prompts(("lookalike",), "heldout")] * 20
    benign = [p.text for p in load_prompts(HELPED, "heldout")] * 3
    said = [
        generate(model, tokenizer, prompts, max_new_tokens=64, seed=70_000 + seed).responses
        for prompts in (alike, benign)
    ]
    over, helped = refused(alike, said[0]), gold_scores(benign, said[1])["helpfulness"]
    return {
        "over_refusal": (over.float().mean().item(), len(alike)),
        "helpfulness": (helped.mean().item(), len(benign)),
    }


def measure(
    model: torch.nn.Module, tokenizer: Any, attacks: Sequence[AdversarialPrompt], seed: int
) -> tuple[list[dict[str, Any]], RedTeamingEvaluator]:
    """Rows kind, name, value, n: attack success by strategy and in all, then `costs`; and the evaluator."""
    found = RedTeamingEvaluator(RedTeaming(model, seed=60_000 + seed), attacks, samples=2)
    tables = (found.success_rates("strategy"), found.success_rates())
    rows = [
        {"kind": "attack", "name": name, "value": float(row["rate"]), "n": int(row["n"])}
        for table in tables
        for name, row in table.iterrows()
    ]
    told = costs(model, tokenizer, seed).items()
    return rows + [{"kind": "cost", "name": name, "value": v, "n": n} for name, (v, n) in told], found


def red_team_campaign(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    train_attacks: int = 90,
    test_attacks: int = 60,
) -> pd.DataFrame:
    """Attack, harden, attack again: seed, model, kind ("attack", "cost", "transfer"), name, value, n.

    model: "before"; "hardened" (one round); "two rounds"; "no benign" (one round on refusals alone). Attacks
    are on held-out requests, 2 answers each; "social_engineering" is a strategy that no training attack used.
    kind "transfer" under "hardened": success against a model hardened with another seed of attacks that
    "worked here" or "failed here", against the first one. n: answers. Gold judges.
    """
    base, tokenizer = load_model("tiny")
    rows = []
    for seed in seeds:
        train = attacks_by(TRAINED, CATEGORIES, train_attacks, seed=seed, split="train")
        test = attacks_by((*TRAINED, *NEW), CATEGORIES, test_attacks, seed=1000 + seed, split="heldout")
        settings = replace(SETTINGS, seed=seed)
        models = {"before": base, "hardened": adversarial_training(base, train, settings=settings)}
        models["two rounds"] = adversarial_training(base, train, rounds=2, settings=settings)
        models["no benign"] = adversarial_training(base, train, benign=(), settings=settings)
        for name, model in models.items():
            found, evaluator = measure(model, tokenizer, test, seed)
            rows += [{"seed": seed, "model": name, **row} for row in found]
            if out:
                print(seed, name, {row["name"]: round(row["value"], 3) for row in found}, flush=True)
            if name == "hardened":
                again = attacks_by(TRAINED, CATEGORIES, train_attacks, seed=500 + seed, split="train")
                other = adversarial_training(base, again, settings=replace(SETTINGS, seed=500 + seed))
                moved = evaluator.transfer(RedTeaming(other, seed=80_000 + seed), samples=2)
                facts = {"seed": seed, "model": name, "kind": "transfer"}
                rows += [
                    facts | {"name": kind, "value": float(row["rate"]), "n": int(row["n"])}
                    for kind, row in moved.iterrows()
                ]
    facts = {"train_attacks": train_attacks, "test_attacks": test_attacks, "training": SETTINGS}
    return write_study(out, "red_team_campaign", pd.DataFrame(rows), seeds=list(seeds), **facts)


def guarded_target(seed: int, *, attacks: int = 90) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The assistant as it is, and hardened against harmful requests alone: nobody thought of private data."""
    base, _ = load_model("tiny")
    train = attacks_by(("direct", "template"), ("harmful",), attacks, seed=seed, split="train")
    return base, adversarial_training(base, train, settings=replace(SETTINGS, seed=seed))


def red_team_policy(
    out: str | Path | None = None,
    *,
    seeds: Sequence[int] = SEEDS,
    prices: Sequence[float] = (0.02, 0.1, 0.5),
    weights: Sequence[float] = (0.0, 1.0),
    n: int = 200,
) -> pd.DataFrame:
    """An attacker trained by RL at each price of KL, with and without a diversity term, on `guarded_target`.

    seed, kl_coef, diversity_weight, success, different, distinct_2 (of n fresh attacks), kl (nats an attack,
    at the last step). The attacker before training has kl 0 and an empty kl_coef. Gold judges.
    """
    rows = []
    for seed in seeds:
        base, target = guarded_target(seed)
        red_team = RedTeaming(target, seed=10_000 * (seed + 1))
        plan = [(None, 0.0), *((price, weight) for price in prices for weight in weights)]
        for price, weight in plan:
            attacker, kl = base, 0.0
            if price is not None:
                settings = replace(ATTACKER, kl_coef=price, seed=seed)
                attacker, history = train_attacker(red_team, base, diversity_weight=weight, settings=settings)
                kl = history.to_frame()["objective/kl"].iloc[-1]
            found = measure_attacker(red_team, attacker, n=n, seed=60_000 + seed)
            del found["attacks"]
            rows.append({"seed": seed, "kl_coef": price, "diversity_weight": weight, **found, "kl": kl})
            if out:
                print(rows[-1], flush=True)
    return write_study(out, "red_team_policy", pd.DataFrame(rows), seeds=list(seeds), n=n, attacker=ATTACKER)
