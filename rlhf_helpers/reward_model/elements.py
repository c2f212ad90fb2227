"""From rows of comparisons, rankings or ratings to groups of answers, with everything checked on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations, groupby
from numbers import Real
from typing import Any

from rlhf_helpers.core.text import is_text, naming, require_distinct, rows_of, warn_of_lost_ends
from rlhf_helpers.reward_model.model import RewardModel

Rows = Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]
COLUMNS = {
    "pairwise": ("prompt", "chosen", "rejected"),
    "margin": ("prompt", "chosen", "rejected", "margin"),
    "ranking": ("prompt", "responses"),
    "rating": ("prompt", "response", "rating"),
}
MAX_PAIRS = 36  # in a group: a ranking of nine (Ouyang et al. 2022); a longer run of one prompt is cut


@dataclass(frozen=True)
class PreferenceGroup:
    """What belongs together in a batch: the answers to one prompt, each once, and the judgments on them.

    `sequences[i]` encode prompt and answer i; `pairs` holds (chosen, rejected) as indices into it, `columns`
    the objective that each pair is about (0 where there is one), `numbers` the pairs' margins or the rating.
    """

    sequences: list[list[int]]
    pairs: list[tuple[int, int]]
    columns: list[int]
    numbers: list[float] = field(default_factory=list)


def encode_groups(model: RewardModel, rows: Rows, objective: str = "pairwise") -> list[PreferenceGroup]:
    """Tokenize rows once: one group for each ranking, rating, or run of pairs with the same prompt.

    All answers of a group follow the same prompt, which is cut for the longest of them.

    Raises:
        ValueError: As `as_rows`; a multi-objective model finds no judgment to learn from; two answers of a
            row are the same tokens after the cut at max_length. Names the row.
    """
    rows, objectives = as_rows(rows, objective), getattr(model, "objectives", None)
    if objectives and objective != "pairwise":
        raise ValueError(f"a multi-objective model learns from 'pairwise' rows, not from {objective!r}")
    compared = "chosen" in COLUMNS[objective]  # else every row is a group of its own
    groups = []
    for _, same in groupby(range(len(rows)), key=lambda index: rows[index]["prompt"] if compared else index):
        run = list(same)
        for start in range(0, len(run), MAX_PAIRS):
            part = {index: rows[index] for index in run[start : start + MAX_PAIRS]}
            groups.append(_encoded(model, part, objective))
    every = chain.from_iterable(group.sequences for group in groups)
    warn_of_lost_ends(model.tokenizer, every, model.max_length)
    return groups


def _encoded(model: RewardModel, run: Mapping[int, Mapping[str, Any]], objective: str) -> PreferenceGroup:
    """Encode rows that share their prompt, each distinct answer once."""
    names = [name for name in COLUMNS[objective][1:] if name not in _KINDS]
    answers = {i: row["responses"] if not names else [row[k] for k in names] for i, row in run.items()}
    texts = list(dict.fromkeys(chain.from_iterable(answers.values())))
    first = next(iter(run))
    with naming(f"row {first}"):
        group = PreferenceGroup(model.encode_answers(run[first]["prompt"], texts), [], [])
    for index, row in run.items():
        indices = [texts.index(text) for text in answers[index]]
        with naming(f"row {index}"):
            require_distinct([group.sequences[i] for i in indices], model.max_length)
        if objective == "rating":
            group.numbers.append(row["rating"])
        for column, sign in _verdicts(row, index, getattr(model, "objectives", None)):
            for pair in combinations(indices, 2):
                group.pairs.append(pair[::sign])  # pyright: ignore[reportArgumentType]
                group.columns.append(column)
                group.numbers.append(row["margin"] if objective == "margin" else 0.0)
    return group


def _verdicts(row: Mapping[str, Any], index: int, objectives: Sequence[str] | None) -> list[tuple[int, int]]:
    """(column of the head, 1 or -1 for chosen or rejected better) of each judgment in a row."""
    if objectives is None:
        return [(0, 1)]
    labels: Any = row.get("objective_labels")
    known = isinstance(labels, Mapping) and set(labels) <= set(objectives)
    verdicts = [(k, labels[name]) for k, name in enumerate(objectives) if labels.get(name)] if known else []
    if not verdicts:
        raise ValueError(
            f"row {index}: objective_labels must give some of {objectives} a number but 0, got {labels!r}"
        )
    return [(column, 1 if label > 0 else -1) for column, label in verdicts]


def as_rows(rows: Rows, objective: str = "pairwise") -> list[Mapping[str, Any]]:
    """Rows as a list of dicts, from such a list, a `datasets.Dataset` or a dict of columns (its slice).

    Raises ValueError for an unknown objective, no row, columns of different length, an answer twice, or an
    entry that is missing or of the wrong kind (see `RewardModelTrainer.train`); names the row.
    """
    if objective not in COLUMNS:
        raise ValueError(f"there is no objective {objective!r}; choose from {tuple(COLUMNS)}")
    columns = COLUMNS[objective]
    if isinstance(rows, Mapping) and (missing := [name for name in columns if name not in rows]):
        raise ValueError(f"the columns lack {missing}; found {sorted(rows)}")
    checked = rows_of(rows)
    for index, row in enumerate(checked):
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
    return checked


def _is_ranking(value: Any) -> bool:
    texts = isinstance(value, Sequence) and all(map(is_text, value))
    return texts and not isinstance(value, str) and len(set(value)) == len(value) >= 2


_TEXT = ("a text", is_text)
_NUMBER = ("a finite number", lambda value: isinstance(value, Real) and math.isfinite(value))
_RANKING = ("a list of at least two different texts", _is_ranking)
_KINDS = {"margin": _NUMBER, "rating": _NUMBER, "responses": _RANKING}
