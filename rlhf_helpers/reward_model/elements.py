"""From rows of comparisons, rankings or ratings to batch elements, with everything checked on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, groupby
from numbers import Real
from typing import Any

from rlhf_helpers.reward_model.model import RewardModel

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
COLUMNS = {
    "pairwise": ("prompt", "chosen", "rejected"),
    "margin": ("prompt", "chosen", "rejected", "margin"),
    "ranking": ("prompt", "responses"),
    "rating": ("prompt", "response", "rating"),
}
MAX_PAIRS = 36  # in an element: a ranking of nine (Ouyang et al. 2022); a longer run of one prompt is cut


@dataclass(frozen=True)
class Element:
    """What belongs into one batch element: the answers to one prompt, each once, and what was said of them.

    `sequences[i]` encode prompt and answer i; `pairs` holds (chosen, rejected) as places in it, `columns` the
    objective that each pair is about (0 where there is one), `numbers` the pairs' margins or the rating.
    """

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]
    columns: list[int]
    numbers: list[float] = field(default_factory=list)


def encode_elements(model: RewardModel, rows: Rows, objective: str = "pairwise") -> list[Element]:
    """Tokenise rows once: one element for each ranking, rating, or run of pairs with the same prompt.

    Raises ValueError as `as_rows`, or where a multi-objective model finds no judgement to learn from.
    """
    rows, objectives = as_rows(rows, objective), getattr(model, "objectives", None)
    if objectives and objective != "pairwise":
        raise ValueError(f"a multi-objective model learns from 'pairwise' rows, not from {objective!r}")
    if objective == "rating":
        sequences = [[model.encode(row["prompt"], row["response"])] for row in rows]
        return [Element(one, [], [], [row["rating"]]) for one, row in zip(sequences, rows, strict=True)]
    if objective == "ranking":
        rankings = [[model.encode(row["prompt"], answer) for answer in row["responses"]] for row in rows]
        pairs = [list(combinations(range(len(ranking)), 2)) for ranking in rankings]
        return [Element(r, p, [0] * len(p)) for r, p in zip(rankings, pairs, strict=True)]
    elements = []
    for prompt, run in groupby(enumerate(rows), key=lambda item: item[1]["prompt"]):
        run = list(run)
        for start in range(0, len(run), MAX_PAIRS):
            places, judged = {}, []
            for index, row in run[start : start + MAX_PAIRS]:
                pair = tuple(places.setdefault(row[key], len(places)) for key in ("chosen", "rejected"))
                margin = row["margin"] if objective == "margin" else 0.0
                for column, sign in _verdicts(row, index, objectives):
                    judged.append((pair[::sign], column, margin))
            sequences = [model.encode(prompt, answer) for answer in places]
            elements.append(Element(sequences, *map(list, zip(*judged, strict=True))))
    return elements


def _verdicts(row: Mapping[str, Any], index: int, objectives: Sequence[str] | None) -> list[tuple[int, int]]:
    """(column of the head, 1 or -1 for chosen or rejected better) of each judgement in a row."""
    if objectives is None:
        return [(0, 1)]
    labels = row.get("objective_labels")
    known = isinstance(labels, Mapping) and set(labels) <= set(objectives)
    found = [(k, labels[name]) for k, name in enumerate(objectives) if labels.get(name)] if known else []
    if not found:
        raise ValueError(
            f"row {index}: objective_labels must give some of {objectives} a number but 0, got {labels!r}"
        )
    return [(column, 1 if label > 0 else -1) for column, label in found]


def as_rows(rows: Rows, objective: str = "pairwise") -> list[Mapping[str, Any]]:
    """Rows as a list of dicts, from such a list, a `datasets.Dataset` or a dict of columns (its slice).

    Raises ValueError for an unknown objective, no row, columns of different length, an answer twice, or an
    entry that is missing or of the wrong kind (see `RewardModelTrainer.train`); names the row.
    """
    if objective not in COLUMNS:
        raise ValueError(f"there is no objective {objective!r}; choose from {tuple(COLUMNS)}")
    columns = COLUMNS[objective]
    if isinstance(rows, Mapping):
        if missing := [name for name in columns if name not in rows]:
            raise ValueError(f"the columns lack {missing}; found {sorted(rows)}")
        lengths = {name: len(rows[name]) for name in rows}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns differ in length: {lengths}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    found = list(rows)
    if not found:
        raise ValueError(f"there are no rows: give dicts with {', '.join(columns)}")
    for index, row in enumerate(found):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {index} must be a dict with {columns}, got {type(row).__name__}")
        for name in columns:
            wanted, holds = _KINDS.get(name, _TEXT)
            if not holds(row.get(name)):
                raise ValueError(
                    f"row {index}: {name} must be {wanted}, got {row.get(name)!r} (keys {sorted(row)})"
                )
        if "chosen" in columns and row["chosen"] == row["rejected"]:
            raise ValueError(f"row {index}: chosen and rejected are the same text, so nothing was preferred")
        if objective == "ranking" and row.get("ranks") and len(set(row["ranks"])) < len(row["ranks"]):
            raise ValueError(f"row {index}: ranks {row['ranks']} tie; use rankings_to_pairs and 'pairwise'")
    return found


def _is_ranking(value: object) -> bool:
    texts = isinstance(value, Sequence) and all(isinstance(text, str) for text in value)
    return texts and not isinstance(value, str) and len(set(value)) == len(value) >= 2


_TEXT = ("a text", lambda value: isinstance(value, str))
_NUMBER = ("a finite number", lambda value: isinstance(value, Real) and math.isfinite(value))
_RANKING = ("a list of at least two different texts", _is_ranking)
_KINDS = {"margin": _NUMBER, "rating": _NUMBER, "responses": _RANKING}
