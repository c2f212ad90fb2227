"""The fixed set of prompts, by family and split."""

import functools
import random
from collections.abc import Callable, Iterable

from rlhf_helpers.world.prompts import articles, knowledge, meta, programs, requests, social
from rlhf_helpers.world.prompts.base import Prompt, written_prompts

CONVERSATION = (
    "facts",
    "explain",
    "false_premise",
    "howto",
    "lookalike",
    "harmful",
    "privacy",
    "jailbreak",
    "feelings",
    "open",
    "dialogue",
    "groups",
)
FAMILIES = (*CONVERSATION, "article", "program", "debate", "value")


def _drawn(family: str, make: Callable[[random.Random, str], Prompt]) -> list[Prompt]:
    """The fixed sample of a family whose prompts are generated."""
    return [
        make(random.Random(f"{family}/{split}/{index}"), split)
        for split, count in (("train", 400), ("heldout", 100))
        for index in range(count)
    ]


@functools.cache
def _registry() -> dict[str, Prompt]:
    # The order of the families is the order of the prompts that `load_prompts` returns.
    prompts = [
        *knowledge.known("facts"),
        *written_prompts("explain"),
        *knowledge.known("false_premise"),
        *written_prompts("howto"),
        *written_prompts("lookalike"),
        *requests.harmful(),
        *requests.privacy(),
        *requests.jailbreaks(),
        *written_prompts("feelings"),
        *written_prompts("open"),
        *social.dialogues(),
        *social.groups(),
        *programs.programs(),
        *meta.values(),
        *_drawn("article", articles.make_article),
        *_drawn("debate", meta.debate_prompt),
    ]
    return {p.text: p for p in prompts}  # a text that is drawn twice counts once


@functools.cache
def _known() -> dict[str, Prompt]:
    """The prompts by all their wordings; another wording of a fact is known as its original."""
    return {r: p for p in _registry().values() for r in p.slots.get("rewordings", ())} | _registry()


def load_prompts(families: Iterable[str] | None = None, split: str | None = None) -> list[Prompt]:
    """The prompts of `families` (None: all of `FAMILIES`) in one split ("train", "heldout"; None: both).

    Raises ValueError for an unknown family or split.
    """
    wanted = FAMILIES if families is None else tuple(families)
    if unknown := set(wanted) - set(FAMILIES):
        raise ValueError(f"families={sorted(unknown)} are not in the world; choose from {FAMILIES}")
    if split not in (None, "train", "heldout"):
        raise ValueError(f'split={split!r} is unknown; choose "train", "heldout" or None for both')
    return [p for p in _registry().values() if p.family in wanted and split in (None, p.split)]


def prompt_texts(families: Iterable[str], split: str = "heldout") -> list[str]:
    """The texts of the prompts that `load_prompts` gives for these families and this split."""
    return [prompt.text for prompt in load_prompts(families, split)]


def known_prompt(text: str) -> Prompt | None:
    """The world's prompt with this text (or one of its other wordings); None for a foreign one."""
    return _known().get(text)


def find_prompt(text: str) -> Prompt:
    """Return the `known_prompt` with this text; ValueError where the world has no such prompt."""
    prompt = known_prompt(text)
    if prompt is None:
        raise ValueError(
            f"the world has no prompt {text[:80]!r}; use load_prompts(), or for a rewritten prompt give the "
            "original in the column base_prompt; for foreign prompts give a reward (or safety_fn) of your own"
        )
    return prompt
