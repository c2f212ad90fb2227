"""From rows of comparisons, rankings or ratings to groups of answers, with everything checked on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
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
    A ranking's sequences stand in its order, the best first.

    K answers to one prompt can be compared in K (K - 1) / 2 pairs. In one group each answer is encoded once
    and the pairs share a step and one unit of weight, since a group's loss is their mean. Spread over an
    epoch, every answer would be learned K - 1 times and overfitted (Ouyang et al. 2022, section 3.5). A
    ranking is a group too, but its Plackett-Luce loss is a sum over the ranks, ln K! where all rewards are
    equal: a longer ranking weighs more.
    """

    sequences: list[list[int]]
    pairs: list[tuple[int, int]] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)


def encode_groups(model: RewardModel, rows: Rows, objective: str = "pairwise") -> list[PreferenceGroup]:
    """Tokenize rows once: one group for each ranking, rating, or run of pairs with the same prompt.

    All answers of a group follow the same prompt, which is cut for the longest of them.

    Raises:
        ValueError: As `as_rows`; a multi-objective model finds no judgment to learn from; two answers of a
            row are the same tokens after the cut at max_length. Names the row.
    """
    rows = as_rows(rows, objective)
    if hasattr(model, "objectives") and objective != "pairwise":
        raise ValueError(f"a multi-objective model learns from 'pairwise' rows, not from {objective!r}")
    if objective in ("ranking", "rating"):
        groups = [_single_group(model, index, row, objective) for index, row in enumerate(rows)]
    else:
        groups = []
        for _, same_prompt in groupby(enumerate(rows), key=lambda numbered: numbered[1]["prompt"]):
            run = list(same_prompt)
            for start in range(0, len(run), MAX_PAIRS):
                groups.append(_pair_group(model, run[start : start + MAX_PAIRS], objective))
    every = chain.from_iterable(group.sequences for group in groups)
    warn_of_lost_ends(model.tokenizer, every, model.max_length)
    return groups


def _pair_group(
    model: RewardModel, run: Sequence[tuple[int, Mapping[str, Any]]], objective: str
) -> PreferenceGroup:
    """Encode numbered pairs that share their prompt, each distinct answer once."""
    first, first_row = run[0]
    texts = list(dict.fromkeys(row[side] for _, row in run for side in ("chosen", "rejected")))
    with naming(f"row {first}"):
        group = PreferenceGroup(model.encode_answers(first_row["prompt"], texts))
    for index, row in run:
        chosen, rejected = texts.index(row["chosen"]), texts.index(row["rejected"])
        with naming(f"row {index}"):
            require_distinct([group.sequences[chosen], group.sequences[rejected]], model.max_length)
        for column, chosen_is_better in _verdicts(row, index, getattr(model, "objectives", None)):
            group.pairs.append((chosen, rejected) if chosen_is_better else (rejected, chosen))
            group.columns.append(column)
        if objective == "margin":
            group.numbers.append(row["margin"])
    return group


def _single_group(model: RewardModel, index: int, row: Mapping[str, Any], objective: str) -> PreferenceGroup:
    """Encode a ranking, or the one answer of a rating."""
    with naming(f"row {index}"):
        group = PreferenceGroup(model.encode_answers(row["prompt"], answers_of(row, objective)))
        require_distinct(group.sequences, model.max_length)
    if objective == "rating":
        group.numbers.append(row["rating"])
    return group


def answers_of(row: Mapping[str, Any], objective: str) -> list[str]:
    """Return the answers that a row judges, the better first where they are compared."""
    if objective == "ranking":
        return row["responses"]
    return [row[name] for name in ("chosen", "rejected", "response") if name in COLUMNS[objective]]


def _verdicts(row: Mapping[str, Any], index: int, objectives: Sequence[str] | None) -> list[tuple[int, bool]]:
    """(column of the head, whether chosen is the better) of each judgment in a row."""
    if objectives is None:
        return [(0, True)]
    labels: Any = row.get("objective_labels")
    known = isinstance(labels, Mapping) and set(labels) <= set(objectives)
    verdicts = [(k, labels[name] > 0) for k, name in enumerate(objectives) if known and labels.get(name)]
    if not verdicts:
        raise ValueError(
            f"row {index}: objective_labels must give some of {objectives} a number but 0, got {labels!r}"
        )
    return verdicts


def as_rows(rows: Rows, objective: str = "pairwise") -> list[Mapping[str, Any]]:
    """Rows as a list of dicts, from such a list, a `datasets.Dataset` or a dict of columns (its slice).

    Raises ValueError for an unknown objective, no row, columns of different length, an answer twice, or an
    entry that is missing or of the wrong kind (see `RewardModelTrainer.train`); names the row.
    """
    if objective not in COLUMNS:
        raise ValueError(f"there is no objective {objective!r}; choose from {tuple(COLUMNS)}")
    columns = COLUMNS[objective]
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
            raise ValueError(
                f"row {index}: ranks {row['ranks']} tie; read_preferences makes pairs of them, for 'pairwise'"
            )
    return checked


def _is_ranking(value: Any) -> bool:
    texts = isinstance(value, Sequence) and all(map(is_text, value))
    return texts and not isinstance(value, str) and len(set(value)) == len(value) >= 2


_TEXT = ("a text", is_text)
_NUMBER = ("a finite number", lambda value: isinstance(value, Real) and math.isfinite(value))
_RANKING = ("a list of at least two different texts", _is_ranking)
_KINDS = {"margin": _NUMBER, "rating": _NUMBER, "responses": _RANKING}
