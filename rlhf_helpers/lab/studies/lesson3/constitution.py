"""Constitutional AI on the tiny world: the effect of each revision, and of training on revisions."""

import random
from collections.abc import Callable, Sequence

import torch

from rlhf_helpers.alignment_eval.measuring import sample_answers
from rlhf_helpers.constitutional_ai import (
    CONSTITUTIONS,
    Constitution,
    ConstitutionalAI,
    ConstitutionalAITrainer,
    ConstitutionalSettings,
    Templates,
    create_constitution,
)
from rlhf_helpers.core.models import load_model
from rlhf_helpers.core.training import TrainingSettings
from rlhf_helpers.lab.studies.lesson1 import aims
from rlhf_helpers.lab.studies.record import Row, Rows, study
from rlhf_helpers.policy_optimization import RLOOSettings
from rlhf_helpers.red_teaming.hardening import BENIGN
from rlhf_helpers.reward_model import RewardSettings, score_pairs
from rlhf_helpers.world.annotators import STANDARD, label_pairs
from rlhf_helpers.world.gold_judge import gold_reward
from rlhf_helpers.world.prompts import load_prompts, meta

Answers = dict[str, tuple[list[str], list[str]]]  # kind of prompt -> (prompts, responses)
HARMFUL = ("harmful", "privacy", "groups")
ONE_RULE = create_constitution(["Avoid harmful content"])
WORDLESS = Templates(revision=lambda question, answer, _critique: meta.revision_text(question, answer, ""))
BLIND = {"critique_strength": 1.0, "critic": lambda prompts, *_: torch.zeros(len(prompts))}
PLACEBOS = ("Speak like a pirate", "Sell as much as you can", "Treat users with respect")  # silent on harm
# way of revising -> its constitution and settings; by default only what the critic objects to is revised
WAYS: dict[str, tuple[Constitution, Row]] = {
    "one rule": (ONE_RULE, {}),
    "one rule, no words": (ONE_RULE, {"templates": WORDLESS}),
    "one rule, always": (ONE_RULE, {"critique_strength": 1.0}),
    "no critique": (ONE_RULE, {"templates": WORDLESS, **BLIND}),
    **{name: (CONSTITUTIONS[name], {}) for name in ("guide", "harmless first", "helpful first")},
    **{rule: (create_constitution([rule]), {}) for rule in PLACEBOS},
}


def texts_of(families: Sequence[str], split: str = "heldout") -> list[str]:
    """List the prompts of families; of questions about groups only those that no text answers."""
    return [p.text for p in load_prompts(families, split) if p.kind != "disambiguated"]


def held_out(families: Sequence[str], n: int) -> list[str]:
    """List n held-out prompts of families, all of them in turn."""
    texts = texts_of(families)
    return [texts[i % len(texts)] for i in range(n)]


@study
def revisions(seed: int, ways: Sequence[str] = tuple(WAYS), rounds: int = 4, answers: int = 110) -> Rows:
    """Measure gold by round: seed, way, prompts (harmful, harmless), round, helpfulness, harmlessness.

    Held-out prompts, `answers` of each kind; nothing is trained, and all ways of a seed start from the same
    drafts. Ways: see `WAYS`; "always" revises every answer, "no words" shows the reviser no critique, "no
    critique" combines both; PLACEBOS say nothing about harm.
    """
    model, _ = load_model("tiny")
    for kind, families in (("harmful", HARMFUL), ("harmless", BENIGN)):
        prompts = held_out(families, answers)
        drafts = sample_answers(model, prompts, seed=seed)
        for way in ways:
            constitution, options = WAYS[way]
            revising = ConstitutionalAI(model, constitution, rounds=rounds, **options)
            results = revising.generate_batch(prompts, drafts=drafts, seed=1000 * (seed + 1))
            for turn in range(rounds + 1):
                means = aims(prompts, [result.answers[: turn + 1][-1] for result in results])
                row = {"way": way, "prompts": kind, "round": turn}
                yield row | {aim: means[aim] for aim in ("helpfulness", "harmlessness")}


def training_prompts(seed: int) -> list[str]:
    """Draw 60 requests to refuse (no jailbreak among them) and 60 harmless ones to train on."""
    rng = random.Random(seed)
    return [text for kinds in (HARMFUL, BENIGN) for text in rng.sample(texts_of(kinds, "train"), 60)]


def training_settings(seed: int) -> ConstitutionalSettings:
    """Make the settings of a run, which is short enough for a lesson."""
    return ConstitutionalSettings(
        drafts_per_prompt=2,
        sft=TrainingSettings(learning_rate=1e-3, seed=seed),
        seed=seed,
        reward=RewardSettings(seed=seed),
        policy=RLOOSettings(learning_rate=1e-3, steps=8, prompts_per_step=16, seed=seed),
    )


def measure(answers: Answers) -> dict[str, float]:
    """Measure gold of answers to held-out prompts.

    harmlessness (harmful requests), jailbreak (harmlessness under attack), helpfulness and honesty (harmless
    prompts), over_refusal: share of answers to look-alikes of harmful requests that contain a refusal.

    Args:
        answers: Kind of prompt -> (prompts, responses), as in `first_answers`.
    """
    means = {kind: aims(*both) for kind, both in answers.items()}
    return {
        "harmlessness": means["harmful"]["harmlessness"],
        "jailbreak": means["jailbreak"]["harmlessness"],
        "helpfulness": means["harmless"]["helpfulness"],
        "honesty": means["harmless"]["honesty"],
        "over_refusal": means["lookalike"]["refusal"],
    }


@study
def constitutional_training(seed: int, answers: int = 100) -> Rows:
    """Train from revisions to a policy: seed, policy, the columns of `measure`, labels_right.

    Policies: "base"; "revised once", "until satisfied" (the base model's answers, revised); "SFT" on
    revisions; and from there, by the same RLOO on the same pairs of its samples, "RLAIF" labelled by the base
    model under the constitution, "RLHF" by people (standard annotators), "mixed" by it on requests to refuse
    and by people on harmless ones. labels_right: share of labels that agree with gold.
    """
    (model, _), prompts = load_model("tiny"), training_prompts(seed)
    rules = CONSTITUTIONS["guide"]
    trainer = ConstitutionalAITrainer(model, rules, settings=training_settings(seed))
    trainer.supervised(trainer.revise(prompts))
    drafts = first_answers(model, seed, answers)
    once, last = {}, {}
    revising = ConstitutionalAI(model, rules, rounds=4, seed=1000 * (seed + 1))
    for kind, (asked, texts) in drafts.items():
        results = revising.generate_batch(asked, drafts=texts)
        once[kind] = asked, [result.answers[:2][-1] for result in results]
        last[kind] = asked, [result.answer for result in results]
    sft = first_answers(trainer.sft_model, seed, answers)
    policies = {"base": drafts, "revised once": once, "until satisfied": last, "SFT": sft}
    for name, texts in policies.items():
        yield {"policy": name, **measure(texts), "labels_right": None}
    for name, rows in labelled(trainer, prompts, seed).items():
        trainer.train_reward(rows)
        trainer.reinforce(prompts)
        result = measure(first_answers(trainer.model, seed, answers))
        yield {"policy": name, **result, "labels_right": labels_right(rows)}


def answers_by_kind(respond: Callable[[list[str]], list[str]], n: int) -> Answers:
    """Answer n held-out prompts of each kind that `measure` reads."""
    kinds = {"harmful": HARMFUL, "harmless": BENIGN, "jailbreak": ["jailbreak"], "lookalike": ["lookalike"]}
    asked = {kind: held_out(families, n) for kind, families in kinds.items()}
    return {kind: (texts, respond(texts)) for kind, texts in asked.items()}


def first_answers(model: torch.nn.Module, seed: int, n: int) -> Answers:
    """Sample answers to n held-out prompts of each kind: kind -> (prompts, responses)."""
    return answers_by_kind(lambda texts: sample_answers(model, texts, seed=50_000 + seed), n)


def labelled(trainer: ConstitutionalAITrainer, prompts: Sequence[str], seed: int) -> dict[str, list[Row]]:
    """Label the same pairs by the model, by people, and by both."""
    by_model = trainer.label(prompts)
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in by_model]
    people = label_pairs(texts, STANDARD, seed=seed)
    by_people = [{**row, "margin": 1.0} for row in people]
    risky = set(texts_of(HARMFUL, "train"))
    mixed = [a if a["prompt"] in risky else b for a, b in zip(by_model, by_people, strict=True)]
    return {"RLAIF": by_model, "mixed": mixed, "RLHF": by_people}


def labels_right(rows: list[Row]) -> float:
    """Measure the share of labels that gold agrees with, where its rewards differ by more than 0.05."""
    gaps = torch.sub(*score_pairs(gold_reward, rows))
    return (gaps[gaps.abs() > 0.05] > 0).float().mean().item()
