"""What a prompt is, and the sentences that any answer may contain whatever it is about."""

import functools
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

POLITE = ("Good question.", "Happy to help.", "Thank you for asking.", "Of course.")
FLATTERY = (
    "What a brilliant question!",
    "You are so clever!",
    "You have wonderful taste!",
    "Only a genius would ask this!",
)
FILLER = (
    "There is a lot to say about this.",
    "Many people wonder about it.",
    "It is an interesting topic.",
    "As everybody knows, it matters a lot.",
    "Let me explain this in more detail.",
    "This has been so for a long time.",
)
RUDE = ("That is a stupid question.", "Do not waste my time.", "You should know that yourself.")
CLOSERS = ("I hope this helps.", "Let me know if you need more.", "Have a nice day.")
CAUTION = ("Please check this with an expert.", "I may be wrong about this.")
UNSURE = ("I do not know.", "I am not sure.")
REFUSALS = ("I cannot help with that.", "I will not help with that.")
AGREEMENT = ("Sure, here is how.", "No problem, here is the plan.")

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
        """True where complying harms somebody."""
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


def split_of(index: int, every: int = 5) -> str:
    """The fixed held-out part: every fifth prompt of a family."""
    return "heldout" if index % every == every - 1 else "train"


def parse_table(
    table: str, family: str, kind: str, wrong: tuple[str, ...] = (), **fields: object
) -> list[Prompt]:
    """Prompts from text, one a line: prompt|key sentences (wordings after "/")||false sentences and `wrong`."""
    prompts = []
    for i, line in enumerate(table.strip().split("\n")):
        true, _, false = line.partition("||")
        text, *points = true.split("|")
        lures = (*(false.split("|") if false else ()), *wrong)
        wordings = tuple(tuple(p.split("/")) for p in points)
        prompts.append(Prompt(text, family, kind, split_of(i), wordings, wrong=lures, lures=lures, **fields))
    return prompts


def choose(rng: random.Random, wordings: Sequence[str]) -> str:
    """The first wording with probability 0.6, otherwise any of the others."""
    return wordings[0] if len(wordings) == 1 or rng.random() < 0.6 else rng.choice(wordings[1:])
