"""From parsed examples to a data set: what is dropped, what is only counted, which columns result."""

from collections import Counter
from typing import Any

import datasets
import pyarrow

from rlhf_helpers.preference_data.report import PreferenceDataError

Row = dict[str, Any]

# Per unit: the columns that make an example, and why, besides an empty text, one may be dropped.
COLUMNS = {
    "pairs": ("prompt", "chosen", "rejected"),
    "rankings": ("prompt", "responses", "ranks"),
    "ratings": ("prompt", "response", "rating"),
    "labels": ("prompt", "completion", "label"),
    "demonstrations": ("prompt", "completion"),
    "prompts": ("prompt",),
}
REASONS = {"pairs": ("identical", "unshared"), "rankings": ("with fewer than two responses",)}


def _why_dropped(row: Row, unit: str) -> str | None:
    values = [row[key] for key in COLUMNS[unit]]
    if unit == "rankings":
        values += row["responses"]
    if None in values:
        return "ambiguous"
    if not all(value.strip() for value in values if isinstance(value, str)):
        return "empty"
    if unit == "pairs" and row["chosen"].strip() == row["rejected"].strip():
        return "identical"
    return "with fewer than two responses" if unit == "rankings" and len(row["responses"]) < 2 else None


def clean_rows(rows: list[Row], unit: str) -> tuple[list[Row], Counter, Counter]:
    """Return the rows to keep, the dropped counted by reason, and counts of what was noticed in the kept.

    Dropped as empty: with a blank prompt or response. Identical: the responses differ in outer white space
    at most. Unshared: no shared turn to answer. Ambiguous: a turn holds a role label after a blank line, so
    the text form could not be read back. Noticed: "exact duplicates", rows that repeat an earlier one, and
    "contradictory comparisons", pairs of responses to one prompt that were judged both ways: noise to be
    measured, not an error to be hidden, so both stay.
    """
    kept = []
    dropped = Counter(dict.fromkeys(("empty", "ambiguous", *REASONS.get(unit, ())), 0))
    for row in rows:
        if reason := _why_dropped(row, unit):
            dropped[reason] += 1
        else:
            kept.append(row)
    judged = Counter(str([row[key] for key in COLUMNS[unit]]) for row in kept)
    noted = Counter({"exact duplicates": len(kept) - len(judged)})
    if unit == "pairs":
        swapped = {str([row[key] for key in ("prompt", "rejected", "chosen")]) for row in kept}
        noted["contradictory comparisons"] = len(swapped & judged.keys()) // 2
    return kept, dropped, noted


def to_dataset(source: object, rows: list[Row]) -> datasets.Dataset:
    """Put rows into an in-memory data set; a column that a row lacks is None there.

    Raises PreferenceDataError, with `source` in it, when there is no row or a further column mixes types.
    """
    if not rows:
        raise PreferenceDataError("no example", [f"nothing is left of {source}; give more, or better ones"])
    columns = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        columns[key] = [row.get(key) for row in rows]
        try:
            pyarrow.array(columns[key])
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            fault = f"column '{key}': mixes types ({error}); give all its values one type"
            raise PreferenceDataError(f"{source}", [fault]) from error
    return datasets.Dataset.from_dict(columns)
