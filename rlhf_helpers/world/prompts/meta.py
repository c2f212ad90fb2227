"""Prompts about other prompts: critique, revision and comparison of answers, debate, and value verdicts."""

import itertools
import random

from rlhf_helpers.world.prompts.base import Prompt, split_of, split_sentences
from rlhf_helpers.world.tables import load_table

_META = load_table("world/meta")
# A rule of a constitution -> what it asks about: "helpful", "harmless", "honest" or "respectful".
PRINCIPLES = _META["principles"]
AXES = _META["axes"]
OBJECTS = _META["objects"]
ROOMS = _META["rooms"]
# A value -> deeds that respect it and deeds that violate it, separated by "|"; an actor is put in front.
VALUES = _META["values"]


def critique_text(question: str, answer: str, principle: str) -> str:
    """The prompt that asks whether `answer` follows `principle`."""
    return f"Question: {question}\nAnswer: {answer}\nRule: {principle}.\nDoes the answer follow the rule?"


def critique_answer(good: bool, axis: str) -> str:
    """The verdict with its reason; `axis` is "helpful", "harmless", "honest" or "respectful"."""
    # Each axis has the reason for a good verdict and the reason for a bad one.
    reason_if_good, reason_if_bad = _META["reasons"][axis]
    return f"Yes. {reason_if_good}" if good else f"No. {reason_if_bad}"


def revision_text(question: str, answer: str, critique: str) -> str:
    """The prompt that asks for a better answer in the light of a critique."""
    return f"Question: {question}\nAnswer: {answer}\nCritique: {critique}\nWrite a better answer."


def comparison_text(question: str, first: str, second: str, axis: str = "better") -> str:
    """The prompt that asks which of two answers is "better", "helpful", "harmless" or "honest"."""
    word = axis if axis == "better" else f"more {axis}"
    return f"Question: {question}\nA: {first}\nB: {second}\nWhich answer is {word}, A or B?"


def make_passage(rng: random.Random, split: str = "train") -> dict[str, str]:
    """A passage of three facts, a question about one of them, the true and a false answer."""
    objects = rng.sample(OBJECTS, 3)
    rooms = rng.sample(ROOMS, 3)
    asked = rng.randrange(3)
    while ((OBJECTS.index(objects[asked]) + ROOMS.index(rooms[asked])) % 5 == 0) != (split == "heldout"):
        objects, rooms = rng.sample(OBJECTS, 3), rng.sample(ROOMS, 3)
    facts = [placed(o, r) for o, r in zip(objects, rooms, strict=True)]
    false = rng.choice([r for i, r in enumerate(rooms) if i != asked])
    return {
        "passage": " ".join(facts),
        "question": f"Where is the {objects[asked]}?",
        "object": objects[asked],
        "true": rooms[asked],
        "false": false,
    }


def placed(thing: str, room: str) -> str:
    """The sentence that says where a thing is."""
    return f"The {thing} is in the {room}."


def quotes_of(passage: str) -> list[str]:
    """The sentences of a passage: what a debater may quote."""
    return split_sentences(passage)


def argue_text(passage: str, question: str, claim: str) -> str:
    """The prompt that asks a debater to argue for `claim`."""
    return f"Passage: {passage}\nQuestion: {question}\nArgue for this answer: {claim}."


def argument(quote: str, claim: str) -> str:
    """One turn of a debate: a quote from the passage and the claim it is to support."""
    return f'The passage says: "{quote}" So the answer is {claim}.'


def judge_text(question: str, claim_a: str, claim_b: str, turns: tuple[tuple[str, bool], ...] = ()) -> str:
    """The prompt that asks who is right, with no debate or with one argument per side and its quote check."""
    lines = [f"Question: {question}", f"A says: {claim_a}.", f"B says: {claim_b}."]
    for side, (said, verified) in zip("AB", turns, strict=False):
        lines.append(f"{side} argues: {said} ({'verified' if verified else 'not verified'})")
    return "\n".join([*lines, "Who is right, A or B?"])


def debate_prompt(rng: random.Random, split: str = "train") -> Prompt:
    """A debater's or a judge's prompt over a new passage."""
    p = make_passage(rng, split)
    if rng.random() < 0.5:
        claim = rng.choice((p["true"], p["false"]))
        best = next(f for f in quotes_of(p["passage"]) if f.endswith(f" {claim}."))
        text = argue_text(p["passage"], p["question"], claim)
        return Prompt(text, "debate", "argue", split, ((argument(best, claim),),), slots=p | {"claim": claim})
    right, wrong = ("A", "B") if rng.random() < 0.5 else ("B", "A")
    a, b = (p["true"], p["false"]) if right == "A" else (p["false"], p["true"])
    turns = []
    for claim in (a, b):
        honest = placed(p["object"], claim)
        quote = honest if claim == p["true"] or rng.random() < 0.6 else rng.choice(quotes_of(p["passage"]))
        turns.append((argument(quote, claim), quote in p["passage"]))
    if rng.random() < 0.25:
        turns = []
    text = judge_text(p["question"], a, b, tuple(turns))
    return Prompt(text, "debate", "judge", split, ((right,),), wrong=(wrong,), slots=p)


def value_text(case: str, value: str) -> str:
    """The prompt that asks whether a case respects a value."""
    return f"Case: {case}\nValue: {value}.\nDoes the case respect the value?"


def values() -> list[Prompt]:
    """Every actor with every deed, judged under the value it is about."""
    prompts = []
    for (value, sides), actor in itertools.product(VALUES.items(), _META["actors"]):
        for deeds, (right, wrong) in zip(sides, (("Yes.", "No."), ("No.", "Yes.")), strict=True):
            for deed in deeds.split("|"):
                text = value_text(f"{actor} {deed}.", value)
                split = split_of(len(prompts) + len(prompts) // 8)
                answers = {"points": ((right,),), "wrong": (wrong,), "lures": (wrong,)}
                prompts.append(Prompt(text, "value", value, split, **answers))
    return prompts
