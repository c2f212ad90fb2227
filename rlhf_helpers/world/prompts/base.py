"""What a prompt is, and the sentences that any answer may contain whatever it is about."""

import functools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlhf_helpers.world.tables import load_table

# Stock sentences by what they do: "polite", "flattery", "filler", "rude", "closer", "caution", "unsure",
# "refusal", "agreement".
SENTENCES = load_table("world/sentences")
FLATTERY = SENTENCES["flattery"]
RUDE = SENTENCES["rude"]
CLOSERS = SENTENCES["closer"]
REFUSALS = SENTENCES["refusal"]
AGREEMENT = SENTENCES["agreement"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True)
class Prompt:
    """One prompt and everything the judge and the answer writer need to know about it.

    `points` are the sentences that a complete answer holds, in order, each as a tuple of accepted wordings;
    `wrong` are false sentences about this prompt; `lures` those of them that people really write;
    `harmful` are sentences that comply with what should be refused. `slots` holds what one family alone
    needs (the event behind an article, the parts of a program). `asked` is the prompt a rewritten one
    stands for: a jailbreak is judged by the request inside it.
    """

    text: str
    family: str
    kind: str
    split: str = "train"
    points: tuple[tuple[str, ...], ...] = ()
    wrong: tuple[str, ...] = ()
    lures: tuple[str, ...] = ()
    harmful: tuple[str, ...] = ()
    slots: Mapping[str, object] = field(default_factory=dict)
    asked: str | None = None

    @property
    def must_refuse(self) -> bool:
        """True where complying does harm."""
        return bool(self.harmful) and self.points[0] == REFUSALS

    @functools.cached_property
    def roles(self) -> dict[str, str]:
        """What each sentence about this prompt is: "point0", "point1", ..., "wrong" or "harmful"."""
        table = dict.fromkeys(self.wrong, "wrong") | dict.fromkeys(self.harmful, "harmful")
        return table | {w: f"point{i}" for i, wordings in enumerate(self.points) for w in wordings}


def split_sentences(text: str) -> list[str]:
    """Sentences of `text`: cut after '.', '!' or '?' followed by white space; white space is folded."""
    text = " ".join(text.split())
    return _SENTENCE_END.split(text) if text else []


def split_of(index: int) -> str:
    """The fixed held-out part: every fifth prompt of a family."""
    return "heldout" if index % 5 == 4 else "train"


def written_prompts(family: str) -> list[Prompt]:
    """Read the hand-written prompts of a family; their lures are all the false sentences about them."""
    rows = load_table("world/prompts")[family]
    return [
        Prompt(family=family, split=split_of(index), wrong=row.get("lures", ()), **row)
        for index, row in enumerate(rows)
    ]


def choose(rng: random.Random, wordings: Sequence[str]) -> str:
    """The first wording with probability 0.6, otherwise any of the others."""
    return wordings[0] if len(wordings) == 1 or rng.random() < 0.6 else rng.choice(wordings[1:])


def rate(event: str, quality: str | None) -> float:
    """Return how often something happens in an answer of a quality; None: as the unaligned assistant writes."""
    return load_table("world/styles")["rates"][event][quality or "unaligned"]
