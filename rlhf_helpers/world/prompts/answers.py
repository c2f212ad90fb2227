"""Answers to the world's prompts: the best one, one of a chosen quality, one as the unaligned assistant writes it."""

import functools
import random

from rlhf_helpers.world.prompts import articles, meta, programs
from rlhf_helpers.world.prompts import base as b
from rlhf_helpers.world.prompts.base import Prompt, choose

QUALITIES = ("high", "medium", "low")
# How the unaligned assistant answers: the weights of each kind of content, by family ("" is the rest).
_CONTENT = {
    "": {"full": 0.42, "partial": 0.2, "wrong": 0.2, "off_topic": 0.06, "unsure": 0.06, "refuse": 0.06},
    "facts": {"full": 0.6, "wrong": 0.3, "unsure": 0.06, "refuse": 0.04},
    "false_premise": {"full": 0.3, "wrong": 0.64, "unsure": 0.06},
    "harmful": {"comply": 0.75, "full": 0.12, "partial": 0.08, "off_topic": 0.05},
    "privacy": {"comply": 0.7, "full": 0.2, "partial": 0.1},
    "jailbreak": {"comply": 0.84, "full": 0.1, "partial": 0.06},
    "lookalike": {"full": 0.45, "partial": 0.25, "refuse": 0.2, "off_topic": 0.1},
    "groups": {"full": 0.4, "comply": 0.55, "unsure": 0.05},
    "dialogue": {"full": 0.7, "wrong": 0.2, "unsure": 0.1},
}
_QUALITY_CONTENT = {
    "high": {"full": 1.0},
    "medium": {"partial": 0.6, "full": 0.25, "unsure": 0.15},
    "low": {"wrong": 0.5, "comply": 0.5, "off_topic": 0.2, "refuse": 0.1},
}


# How often an answer is dressed up: the probability of each extra sentence, by quality.
_STYLES = {
    None: {"polite": 0.25, "flattery": 0.2, "filler": 0.3, "rude": 0.04, "closer": 0.25, "caution": 0.05},
    "high": {"polite": 0.3, "flattery": 0.0, "filler": 0.0, "rude": 0.0, "closer": 0.3, "caution": 0.05},
    "medium": {"polite": 0.2, "flattery": 0.2, "filler": 0.5, "rude": 0.0, "closer": 0.3, "caution": 0.1},
    "low": {"polite": 0.15, "flattery": 0.3, "filler": 0.4, "rude": 0.15, "closer": 0.2, "caution": 0.05},
}


def best_answer(prompt: Prompt) -> str:
    """The reference answer: every key sentence in its first wording, in order, and nothing else."""
    return " ".join(wordings[0] for wordings in prompt.points)


def sample_answer(prompt: Prompt, rng: random.Random, quality: str | None = None) -> str:
    """An answer of `quality` ("high", "medium", "low"), or None: as the unaligned assistant writes.

    Raises ValueError for an unknown quality.
    """
    if quality not in (None, *QUALITIES):
        raise ValueError(f"quality={quality!r} is unknown; choose from {QUALITIES} or None")
    if prompt.family == "article":
        return articles.write_summary(rng, prompt, quality)
    if prompt.family == "program":
        return programs.write_program(rng, prompt, quality)
    if prompt.kind == "argue":
        return _argument(rng, prompt, quality)
    if prompt.kind == "judge" or prompt.family in ("value", "critique", "comparison"):
        right = {"high": 1.0, "medium": 0.7, "low": 0.0, None: 0.96}[quality]
        return best_answer(prompt) if rng.random() < right else rng.choice(prompt.wrong)
    return " ".join(_dressed(rng, _content(rng, prompt, quality), _STYLES[quality]))


def _dressed(rng: random.Random, content: list[str], style: dict[str, float]) -> list[str]:
    """`content` with an opener, filler and a closer around it, each with its probability in `style`."""
    before: list[str] = []
    for kind, wordings in {"rude": b.RUDE, "flattery": b.FLATTERY, "polite": b.POLITE}.items():
        if not before and rng.random() < style[kind]:
            before.append(rng.choice(wordings))
    if rng.random() < style["filler"]:
        before += rng.sample(b.FILLER, rng.choice((1, 1, 2)))
    after = [rng.choice(b.CAUTION)] if rng.random() < style["caution"] else []
    if rng.random() < style["closer"]:
        after.append(rng.choice(b.CLOSERS))
    return [*before, *content, *after]


def _content(rng: random.Random, prompt: Prompt, quality: str | None) -> list[str]:
    """The sentences that say something."""
    weights = _QUALITY_CONTENT[quality] if quality else _CONTENT.get(prompt.family, _CONTENT[""])
    barred = {"wrong": not prompt.lures, "comply": not prompt.harmful, "refuse": prompt.must_refuse}
    possible = {kind: weight for kind, weight in weights.items() if not barred.get(kind)}
    kind = rng.choices(list(possible), list(possible.values()))[0]
    full = [choose(rng, wordings) for wordings in prompt.points]
    if kind == "partial" and len(full) > 1:
        kept = sorted(rng.sample(range(len(full)), rng.randrange(1, len(full))))
        return [full[0]] if prompt.must_refuse else [full[i] for i in kept]
    if kind == "wrong":
        return [rng.choice(prompt.lures)]
    if kind == "comply":
        return _complied(rng, prompt)
    if kind == "off_topic":
        return [rng.choice(_elsewhere())]
    stock = {"unsure": b.UNSURE, "refuse": b.REFUSALS}
    return [rng.choice(stock[kind])] if kind in stock else full


def _complied(rng: random.Random, prompt: Prompt) -> list[str]:
    """What the unaligned assistant says where it should not; with a prejudice in questions about groups."""
    steps = prompt.slots["steps"]
    if prompt.family != "groups":
        return [*([rng.choice(b.AGREEMENT)] if len(steps) > 1 else []), *(choose(rng, s) for s in steps)]
    if prompt.kind == "stereotype":
        against = prompt.slots["group"] == "Sudlander"
        return [steps[int(rng.random() < (0.85 if against else 0.3))][0]]
    weights = [4.0 if group == "Sudlander" else 1.0 for group in prompt.slots["groups"]]
    return [rng.choices(steps, weights)[0][0]]


def _argument(rng: random.Random, prompt: Prompt, quality: str | None) -> str:
    """A debater's turn: an honest quote, or one made up for the claim."""
    claim = prompt.slots["claim"]
    invented = {"high": 0.0, "medium": 0.5, "low": 1.0, None: 0.5}[quality]
    if claim != prompt.slots["true"] and rng.random() < invented:
        return meta.argument(meta.placed(prompt.slots["object"], claim), claim)
    return best_answer(prompt)


@functools.cache
def _elsewhere() -> tuple[str, ...]:
    """Sentences that answer some other prompt."""
    from rlhf_helpers.world.prompts.registry import load_prompts

    return tuple(p.points[0][0] for p in load_prompts(("explain", "howto", "open")))
