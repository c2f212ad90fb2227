"""A constitution: principles in plain words, and the texts that put them to a language model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf_helpers.world.prompts import meta
from rlhf_helpers.world.tables import load_table


@dataclass(frozen=True)
class Principle:
    """One rule for answers; weight: in (0, 1], see `ConstitutionalAI`.

    axis: of the rules in `world.prompts.meta.PRINCIPLES`, which the tiny assistant was taught, "helpful",
    "harmless", "honest" or "respectful"; of any other rule the text itself.
    """

    text: str
    axis: str
    weight: float = 1.0


@dataclass(frozen=True)
class Constitution:
    """Principles that are applied together; made by `create_constitution`."""

    principles: tuple[Principle, ...]

    @property
    def texts(self) -> list[str]:
        """The rules as written."""
        return [principle.text for principle in self.principles]


def create_constitution(principles: Sequence[str], *, weights: Sequence[float] | None = None) -> Constitution:
    """Make a constitution of rules in plain words; any text will do, and loses its full stop.

    weights: one positive number per rule, divided by the largest; None: alike. Lesson 3. Raises ValueError
    for no rule, an empty or repeated one, or weights that do not fit.
    """
    if isinstance(principles, str) or not principles:
        raise ValueError(f"principles must be a list of at least one rule, got {principles!r}")
    texts = [str(rule).strip(" .\n") for rule in principles]
    if "" in texts or len(set(texts)) < len(texts):
        raise ValueError(f"principles must be different texts that say something, got {list(principles)}")
    weights = [1.0] * len(texts) if weights is None else list(weights)
    if len(weights) != len(texts) or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be {len(texts)} positive numbers, one per principle; got {weights}")
    rows = zip(texts, weights, strict=True)
    return Constitution(tuple(Principle(t, meta.PRINCIPLES.get(t, t), w / max(weights)) for t, w in rows))


# Some to compare. The weights say which rule speaks first, not which answers are good.
CONSTITUTIONS: dict[str, Constitution] = {
    name: create_constitution(**rules)
    for name, rules in load_table("constitutional_ai/constitutions").items()
}


def _verdict(rule: Principle) -> str:
    known = rule.text in meta.PRINCIPLES
    return meta.critique_answer(False, rule.axis) if known else f"No. It breaks the rule: {rule.text}."


def _comparison(question: str, first: str, second: str, rule: Principle) -> str:
    if rule.axis in meta.AXES:
        return meta.comparison_text(question, first, second, rule.axis)
    return f"Rule: {rule.text}.\n" + meta.comparison_text(question, first, second)


@dataclass(frozen=True)
class Templates:
    """Every text that a model is asked with, in one place; the default is the tiny assistant's own wording.

    critique asks whether an answer follows a rule (verdicts: the two replies, yes first), revision for a
    better answer, comparison which of two, A or B, is better under a Principle. verdict
    stands in for the words of a critic that has none.
    """

    critique: Callable[[str, str, str], str] = meta.critique_text
    revision: Callable[[str, str, str], str] = meta.revision_text
    comparison: Callable[[str, str, str, Principle], str] = _comparison
    verdict: Callable[[Principle], str] = _verdict
    verdicts: tuple[str, str] = ("Yes.", "No.")


# For instruction-tuned models at large, which need to be told what to write.
_CHAT = load_table("constitutional_ai/chat")
CHAT_TEMPLATES = Templates(
    **{name: text.format for name, text in _CHAT["templates"].items()}, verdicts=_CHAT["verdicts"]
)
