"""Constitutional AI on the tiny world: what each revision changes, and what training on revisions leaves."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.constitutional_ai import (
    CONSTITUTIONS,
    Constitution,
    ConstitutionalAI,
    ConstitutionalAITrainer,
    ConstitutionalSettings,
    Templates,
    create_constitution,
)
from rlhf_helpers.constitutional_ai.revision import Answer
from rlhf_helpers.core.generation import generate
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.lab.studies.lesson1 import SEEDS
from rlhf_helpers.lab.studies.lesson3.attacks import refused
from rlhf_helpers.lab.studies.record import write_study
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.reward_model import RewardSettings
from rlhf_helpers.world.annotators import STANDARD
from rlhf_helpers.world.gold_judge import AXES, gold_reward, gold_scores
from rlhf_helpers.world.prompts import load_prompts, meta

Rows = list[dict[str, Any]]
Said = dict[str, tuple[list[str], list[str]]]  # kind of prompt -> (prompts, responses)
HARMFUL = ("harmful", "privacy", "groups")
HARMLESS = ("facts", "howto", "explain", "open", "feelings", "lookalike")
ONE_RULE = create_constitution(["Avoid harmful content"])
WORDLESS = Templates(revision=lambda question, answer, _critique: meta.revision_text(question, answer, ""))


def texts_of(families: Sequence[str], split: str = "heldout") -> list[str]:
    """The prompts of families of the world; of questions about groups only those that no text answers."""
    return [p.text for p in load_prompts(families, split) if p.kind != "disambiguated"]


def asked_of(families: Sequence[str], n: int) -> list[str]:
    """n held-out prompts of families, all of them in turn."""
    texts = texts_of(families)
    return [texts[i % len(texts)] for i in range(n)]


BLIND = {"critique_strength": 1.0, "critic": lambda prompts, *_: torch.zeros(len(prompts))}
# way of revising -> its constitution and settings; "asked" revises only what the critic objects to
WAYS: dict[str, tuple[Constitution, dict[str, Any]]] = {
    "one rule": (ONE_RULE, {}),
    "one rule, no words": (ONE_RULE, {"templates": WORDLESS}),
    "one rule, always": (ONE_RULE, {"critique_strength": 1.0}),
    "no critique": (ONE_RULE, {"templates": WORDLESS, **BLIND}),
} | {name: (CONSTITUTIONS[name], {}) for name in ("guide", "harmless first", "helpful first")}


def revisions(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, ways: Sequence[str] = tuple(WAYS),
    rounds: int = 4, answers: int = 110,
) -> pd.DataFrame:  # fmt: skip
    """Gold by round of revision: seed, way, prompts (harmful, harmless), round, the axes, reward, revised.

    revised: share of answers revised in this round. Held-out prompts, `answers` of each kind; nothing is
    trained, and all ways of a seed start from the same drafts. Ways: see `WAYS`; "always" revises every
    answer, "no words" shows the reviser no critique, "no critique" both.
    """
    model, tokenizer = load_model("tiny")
    rows = []
    for seed in seeds:
        for kind, families in (("harmful", HARMFUL), ("harmless", HARMLESS)):
            asked = asked_of(families, answers)
            drafts = generate(model, tokenizer, asked, max_new_tokens=64, seed=seed).responses
            for way in ways:
                constitution, options = WAYS[way]
                revising = ConstitutionalAI(model, constitution, rounds=rounds, **options)
                found = revising.generate_batch(asked, drafts=drafts, seed=1000 * (seed + 1))
                named = {"seed": seed, "way": way, "prompts": kind}
                rows += [named | row for row in by_round(found, rounds)]
                if out:
                    print(rows[-1], flush=True)
    return write_study(out, "revisions", pd.DataFrame(rows), seeds=list(seeds), answers=answers)


def by_round(found: Sequence[Answer], rounds: int) -> list[dict[str, float]]:
    """Mean gold of the answers after each round, and the share that was revised in it."""
    rows, prompts = [], [answer.prompt for answer in found]
    for turn in range(rounds + 1):
        said = [answer.answers[min(turn, len(answer.answers) - 1)] for answer in found]
        means = {axis: value.mean().item() for axis, value in gold_scores(prompts, said).items()}
        revised = sum(len(answer.critiques) >= turn > 0 for answer in found) / len(found)
        reward = gold_reward(prompts, said).mean().item()
        rows.append({"round": turn, **means, "reward": reward, "revised": revised})
    return rows


def training_prompts(seed: int) -> list[str]:
    """60 requests to refuse (no jailbreak among them) and 60 harmless ones to train on, drawn by seed."""
    rng = random.Random(seed)
    return [text for kinds in (HARMFUL, HARMLESS) for text in rng.sample(texts_of(kinds, "train"), 60)]


def training_settings(seed: int) -> ConstitutionalSettings:
    """What a run of the study is trained with: short enough for a lesson."""
    quiet: dict[str, Any] = {"seed": seed, "progress": False}
    return ConstitutionalSettings(
        drafts_per_prompt=2, sft=TrainingSettings(learning_rate=1e-3, **quiet), seed=seed,
        reward=RewardSettings(**quiet),
        policy=RLOOSettings(learning_rate=1e-3, steps=8, prompts_per_step=16, **quiet),
    )  # fmt: skip


def measure(answers: Said) -> dict[str, float]:
    """Gold of answers to held-out prompts, given as kind -> (prompts, responses); n answers a kind.

    harmlessness (harmful requests), jailbreak (harmlessness under attack), helpfulness and honesty (harmless
    prompts), over_refusal: share of answers to harmless prompts that look risky in which a refusal is read.
    """
    found = {kind: gold_scores(*both) for kind, both in answers.items()}
    return {
        "harmlessness": found["harmful"]["harmlessness"].mean().item(),
        "jailbreak": found["jailbreak"]["harmlessness"].mean().item(),
        **{axis: found["harmless"][axis].mean().item() for axis in (AXES[0], AXES[2])},
        "over_refusal": refused(*answers["lookalike"]).double().mean().item(),
    }


def constitutional_training(
    out: str | Path | None = None, *, seeds: Sequence[int] = SEEDS, rules: str = "guide", answers: int = 100
) -> pd.DataFrame:
    """From revisions to a policy: seed, policy, the columns of `measure`, labels_right.

    Policies: "base"; "revised once", "until satisfied" (the base model's answers, revised); "SFT" on
    revisions; and from there, by the same RLOO on the same pairs of its samples, "RLAIF" labelled by the base
    model under the constitution, "RLHF" by people (standard annotators), "mixed" by it on requests to refuse
    and by people on harmless ones. labels_right: share of labels that agree with gold.
    """
    rows = []
    for seed in seeds:
        (model, tokenizer), prompts = load_model("tiny"), training_prompts(seed)
        trainer = ConstitutionalAITrainer(model, CONSTITUTIONS[rules], settings=training_settings(seed))
        trainer.supervised(trainer.revise(prompts))
        found = {"base": first_answers(model, tokenizer, seed, answers)}
        found |= revised_answers(ConstitutionalAI(model, CONSTITUTIONS[rules], rounds=4), found["base"], seed)
        found["SFT"] = first_answers(trainer.sft_model, tokenizer, seed, answers)
        right: dict[str, float] = {}
        for name, labels in labelled(trainer, prompts, seed).items():
            right[name] = labels_right(labels)
            trainer.train_reward(labels)
            trainer.reinforce(prompts)
            found[name] = first_answers(trainer.model, tokenizer, seed, answers)
        for name, said in found.items():
            rows.append({"seed": seed, "policy": name, **measure(said), "labels_right": right.get(name)})
            if out:
                print(rows[-1], flush=True)
    facts = {"constitution": rules, "settings": str(training_settings(0)), "answers": answers}
    return write_study(out, "constitutional_training", pd.DataFrame(rows), seeds=list(seeds), **facts)


def revised_answers(revising: ConstitutionalAI, drafts: Said, seed: int) -> dict[str, Said]:
    """The drafts after one revision, and after as many as the critic asks for."""
    once, last = {}, {}
    for kind, (asked, said) in drafts.items():
        found = revising.generate_batch(asked, drafts=said, seed=1000 * (seed + 1))
        once[kind] = asked, [answer.answers[:2][-1] for answer in found]
        last[kind] = asked, [answer.answer for answer in found]
    return {"revised once": once, "until satisfied": last}


def asked_by_kind(n: int) -> dict[str, list[str]]:
    """n held-out prompts of each kind that `measure` reads."""
    kinds = {"harmful": HARMFUL, "harmless": HARMLESS, "jailbreak": ["jailbreak"], "lookalike": ["lookalike"]}
    return {kind: asked_of(families, n) for kind, families in kinds.items()}


def first_answers(model: torch.nn.Module, tokenizer: Any, seed: int, n: int) -> Said:
    """Kind of held-out prompt -> (prompts, responses), n each, as `measure` takes them."""
    asked = asked_by_kind(n)
    options = {"max_new_tokens": 64, "seed": 50_000 + seed}
    return {
        kind: (texts, generate(model, tokenizer, texts, **options).responses) for kind, texts in asked.items()
    }


def labelled(trainer: ConstitutionalAITrainer, prompts: Sequence[str], seed: int) -> dict[str, Rows]:
    """The same pairs labelled by the model, by people, and by both (see the study)."""
    ours = trainer.label(prompts)
    texts = [[row[key] for row in ours] for key in ("prompt", "chosen", "rejected")]
    people: Rows = []
    for row, same in zip(ours, STANDARD.compare(*texts, seed=seed), strict=True):
        turned = {} if same else {"chosen": row["rejected"], "rejected": row["chosen"]}
        people.append(row | turned | {"margin": 1.0})
    risky = set(texts_of(HARMFUL, "train"))
    mixed = [a if a["prompt"] in risky else b for a, b in zip(ours, people, strict=True)]
    return {"RLAIF": ours, "mixed": mixed, "RLHF": people}


def labels_right(rows: Rows) -> float:
    """Share of rows whose chosen answer gold prefers too, of those where gold differs by more than 0.05."""
    prompts = [row["prompt"] for row in rows]
    chosen, rejected = (gold_reward(prompts, [row[k] for row in rows]) for k in ("chosen", "rejected"))
    clear = (chosen - rejected).abs() > 0.05
    return (chosen > rejected)[clear].float().mean().item()
