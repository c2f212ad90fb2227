"""Collecting judgements: people compare, rank or rate the same answers, with or without a guideline."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_helpers.world.annotators import Annotator, Guideline

Rows = Sequence[Mapping[str, Any]]


def collect_comparisons(
    rows: Rows, annotators: Sequence[Annotator], *, guideline: Guideline | None = None, seed: int = 0
) -> np.ndarray:
    """Let each of R people compare N pairs: labels (N, R) int, 1 where `first` is preferred, else 0.

    rows: prompt, first, second, of the world. Each person has their own random stream, so adding a person
    does not change the labels of the others. Raises ValueError for a prompt from outside the world or no
    annotator. Lesson 1.
    """
    columns = [[row[key] for row in rows] for key in ("prompt", "first", "second")]
    people = list(annotators)
    if guideline:
        people = [replace(person, guidelines=(*person.guidelines, guideline)) for person in people]
    panel = _panel(people, seed)
    return np.stack([person.compare(*columns, seed=own) for person, own in panel], axis=1).astype(int)


def collect_rankings(rows: Rows, annotators: Sequence[Annotator], *, seed: int = 0) -> np.ndarray:
    """Let each of R people order N sets of K answers: (N, R, K) int, indices of the answers, best first.

    rows: prompt, responses (K of them in every row). Draws from the Plackett-Luce model; `argsort(-1)` gives
    each answer's rank. Raises as `collect_comparisons`, and where rows differ in K. Lesson 1.
    """
    sets = _answer_sets(rows)
    panel = _panel(annotators, seed)
    return np.stack([[a.rank(*one, seed=own + i) for i, one in enumerate(sets)] for a, own in panel], axis=1)


def collect_ratings(rows: Rows, annotators: Sequence[Annotator], *, seed: int = 0) -> np.ndarray:
    """Let each of R people rate N sets of K answers one by one: (N, R, K) int, marks from 1 to 5.

    rows: prompt, responses (K of them in every row). Raises as `collect_rankings`. Lesson 1.
    """
    sets = _answer_sets(rows)
    prompts = [prompt for prompt, answers in sets for _ in answers]
    responses = [answer for _, answers in sets for answer in answers]
    marks = [a.rate(prompts, responses, seed=own) for a, own in _panel(annotators, seed)]
    return np.stack(marks, axis=1).reshape(len(sets), -1, len(marks)).swapaxes(1, 2)


def _panel(people: Sequence[Annotator], seed: int) -> list[tuple[Annotator, int]]:
    """Give each of the people a seed of their own."""
    return list(zip(people, np.random.SeedSequence(seed).generate_state(len(people)).tolist(), strict=True))


def _answer_sets(rows: Rows) -> list[tuple[str, Sequence[str]]]:
    if len(counts := {len(row["responses"]) for row in rows}) != 1:
        raise ValueError(f"rows hold {sorted(counts)} responses; give rows, each with the same number")
    return [(row["prompt"], row["responses"]) for row in rows]
