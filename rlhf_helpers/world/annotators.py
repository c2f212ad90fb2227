"""Simulated people who compare, rank and rate answers: noisy, biased, of different values, not always awake.

A person prefers a to b with probability sigmoid((u(a) - u(b)) / temperature), the Bradley-Terry model (1952)
with utility u = gold reward (or the person's own weights of the three axes) + biases. An unreliable person
answers at random in a known share of cases.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.world.gold_judge import AXES, gold_reward, gold_scores
from rlhf_helpers.world.prompts import CONVERSATION, Prompt, load_prompts, sample_answer, split_sentences
from rlhf_helpers.world.prompts.base import FLATTERY


@dataclass(frozen=True)
class Guideline:
    """A written rule for annotators; `axis_weights` say what it puts first, and how clearly.

    The weights are of helpfulness, harmlessness and honesty, in units of gold reward, in which a person's
    noise is measured (the gold reward itself is near 0.7, 1, 0.3; empty stands for it): a vague rule with
    small weights can lower agreement. Raises ValueError unless adherence lies in [0, 1], and for an axis that
    the world does not judge. Lesson 1.
    """

    text: str
    axis_weights: Mapping[str, float]
    adherence: float = 0.8  # 0: it is ignored; 1: own values and biases no longer count

    def __post_init__(self) -> None:
        """Refuse a share that is none, and unknown axes."""
        require_number("adherence", self.adherence, at_least=0, at_most=1)
        _require_axes(self.axis_weights)


def _require_axes(weights: Mapping[str, float]) -> None:
    if unknown := set(weights) - set(AXES):
        raise ValueError(f"axis_weights names {sorted(unknown)}; the axes are {AXES}")


@dataclass(frozen=True)
class Annotator:
    """One simulated person; every field states how the person departs from the truth."""

    name: str = "standard"
    temperature: float = 0.18  # Bradley-Terry noise in units of gold reward: 11 % flips; 0 never errs
    length_bias: float = 0.0  # utility for each further ten words
    flattery_bias: float = 0.0  # utility for each flattering sentence
    reliability: float = 1.0  # share of cases in which the person looks at all; the rest is a coin
    axis_weights: Mapping[str, float] = field(default_factory=dict)  # own values; empty: the gold reward
    guidelines: tuple[Guideline, ...] = ()  # each changes the utility so far; noise and carelessness stay

    def __post_init__(self) -> None:
        """Refuse impossible values: raises ValueError naming the field."""
        require_number("temperature", self.temperature, at_least=0)  # 0 is noise-free
        require_number("reliability", self.reliability, at_least=0, at_most=1)
        _require_axes(self.axis_weights)

    def utility(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """What each response is worth to this person, (B,), before noise.

        Under a guideline with adherence a: u = (1 - a) u_own + a u_guideline, where u_own holds the biases.
        """
        if self.guidelines:
            *earlier, last = self.guidelines
            own = replace(self, guidelines=tuple(earlier)).utility(prompts, responses)
            rules = Annotator(axis_weights=last.axis_weights).utility(prompts, responses)
            return (1 - last.adherence) * own + last.adherence * rules
        if self.axis_weights:
            scores = gold_scores(prompts, responses)
            worth = sum(w * scores[axis].numpy() for axis, w in self.axis_weights.items())
        else:
            worth = gold_reward(prompts, responses).numpy()
        return worth + self.biases(responses)

    def biases(self, responses: Sequence[str]) -> np.ndarray:
        """What length and flattery alone are worth to this person, (B,)."""
        words = np.array([len(r.split()) for r in responses])
        flattered = np.array([sum(s in FLATTERY for s in split_sentences(r)) for r in responses])
        own = self.length_bias * words / 10 + self.flattery_bias * flattered
        for guideline in self.guidelines:
            own = (1 - guideline.adherence) * own
        return own

    def compare(
        self, prompts: Sequence[str], first: Sequence[str], second: Sequence[str], *, seed: int
    ) -> np.ndarray:
        """For each pair whether `first` is preferred, (B,) bool; the same seed gives the same answers."""
        rng = np.random.default_rng(seed)
        gap = self.utility(prompts, first) - self.utility(prompts, second)
        coin = rng.random(gap.shape)
        awake = rng.random(gap.shape) < self.reliability
        if self.temperature == 0:
            chance = np.where(gap == 0, 0.5, gap > 0)
        else:
            chance = 1 / (1 + np.exp(-np.clip(gap / self.temperature, -500, 500)))
        return coin < np.where(awake, chance, 0.5)

    def rank(self, prompt: str, responses: Sequence[str], *, seed: int) -> list[int]:
        """Indices of the responses, best first: a draw from the Plackett-Luce model (Gumbel trick)."""
        rng = np.random.default_rng(seed)
        worth = self.utility([prompt] * len(responses), responses)
        if rng.random() >= self.reliability:
            return rng.permutation(len(responses)).tolist()
        noisy = worth + self.temperature * rng.gumbel(size=len(responses))
        return np.argsort(-noisy, kind="stable").tolist()

    def rate(self, prompts: Sequence[str], responses: Sequence[str], *, seed: int) -> np.ndarray:
        """A mark from 1 to 5 for each response, (B,) int: utility with noise, cut into equal parts."""
        rng = np.random.default_rng(seed)
        worth = self.utility(prompts, responses) + self.temperature * rng.normal(size=len(responses))
        worth = np.where(rng.random(len(responses)) < self.reliability, worth, rng.random(len(responses)))
        return np.clip(np.floor(worth * 5) + 1, 1, 5).astype(int)


STANDARD = Annotator()
LENGTH_BIASED = Annotator("length-biased", length_bias=0.35)
FLATTERED = Annotator("flattered", flattery_bias=0.5)
CARELESS = Annotator("careless", reliability=0.4)
# Groups of people whose values differ; none of them is the truth.
VALUE_GROUPS = {
    name: Annotator(name, axis_weights={axis: 0.8 if axis == valued else 0.1 for axis in AXES})
    for name, valued in zip(("helpful-first", "safety-first", "honesty-first"), AXES, strict=True)
}


def draw_two(prompt: Prompt, rng: random.Random) -> tuple[str, str]:
    """Two different answers to one prompt: as the unaligned assistant writes, or of a set quality."""
    first = sample_answer(prompt, rng, rng.choice((None, None, "high")))
    for _ in range(1000):  # some prompts of debates have one answer only
        second = sample_answer(prompt, rng, rng.choice((None, None, "medium", "low")))
        if second != first:
            return (first, second) if rng.random() < 0.5 else (second, first)
    raise ValueError(f"{prompt.text!r} has one answer only: leave out its family, {prompt.family!r}")


def make_pairs(
    n: int,
    *,
    annotator: Annotator = STANDARD,
    split: str = "train",
    families: Sequence[str] = CONVERSATION,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """`n` compared pairs: rows with prompt, chosen, rejected, and both gold rewards, for evaluation alone.

    Families weigh alike, then prompts of a family. Raises ValueError for n < 1, an unknown family or split,
    or a prompt that has one answer only.
    """
    if n < 1:
        raise ValueError(f"n={n} pairs: ask for at least one")
    rng = random.Random(f"pairs/{seed}/{split}")
    by_family = {f: load_prompts((f,), split) for f in families}
    drawn = [rng.choice(by_family[rng.choice(list(families))]) for _ in range(n)]
    texts = [(prompt.text, *draw_two(prompt, rng)) for prompt in drawn]
    rows = label_pairs(texts, annotator, seed=seed)
    prompts = [prompt.text for prompt in drawn]
    for side in ("chosen", "rejected"):
        golds = gold_reward(prompts, [row[side] for row in rows]).tolist()
        for row, gold in zip(rows, golds, strict=True):
            row[f"{side}_gold"] = gold
    return rows


def label_pairs(
    texts: Sequence[tuple[str, str, str]], annotator: Annotator, *, seed: int
) -> list[dict[str, Any]]:
    """Turn (prompt, first, second) into rows of prompt, chosen and rejected, as the annotator prefers."""
    wins = annotator.compare(*zip(*texts, strict=True), seed=seed)
    return [
        {"prompt": prompt, "chosen": first if won else second, "rejected": second if won else first}
        for (prompt, first, second), won in zip(texts, wins, strict=True)
    ]
