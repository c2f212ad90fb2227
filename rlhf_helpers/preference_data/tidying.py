"""From parsed examples to a data set: what is dropped, what is only counted, which columns result."""

from typing import Any

import datasets
import pyarrow

from rlhf_helpers.preference_data.report import DataIssue, PreferenceDataError

Row = dict[str, Any]
Counts = dict[str, int]

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


def _why_dropped(row: Row | None, unit: str) -> str | None:
    if row is None:
        return "unshared"
    values = [row[key] for key in COLUMNS[unit]] + row.get("responses", []) * (unit == "rankings")
    if None in values:
        return "ambiguous"
    if not all(value.strip() for value in values if isinstance(value, str)):
        return "empty"
    if unit == "pairs" and row["chosen"].strip() == row["rejected"].strip():
        return "identical"
    return "with fewer than two responses" if unit == "rankings" and len(row["responses"]) < 2 else None


def clean_rows(rows: list[Row | None], unit: str) -> tuple[list[Row], Counts, Counts]:
    """Return the rows to keep, the dropped counted by reason, and counts of what was noticed in the kept.

    Dropped as empty: with a blank prompt or response. Identical: the responses differ in outer white space
    at most. Unshared: no shared turn to answer. Ambiguous: a turn holds a role label after a blank line, so
    the text form could not be read back. Noticed: "exact duplicates", rows that repeat an earlier one, and
    "contradictory comparisons", pairs of responses to one prompt that were judged both ways: noise to be
    measured, not an error to be hidden, so both stay.
    """
    reasons = [_why_dropped(row, unit) for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
    possible = ("empty", "ambiguous", *REASONS.get(unit, ()))
    dropped = {reason: reasons.count(reason) for reason in (*possible, *filter(None, reasons))}
    distinct = {str([row[key] for key in COLUMNS[unit]]) for row in kept}
    noted = {"exact duplicates": len(kept) - len(distinct)}
    if unit == "pairs":
        judged = {(row["prompt"], row["chosen"], row["rejected"]) for row in kept}
        both_ways = sum((prompt, worse, better) in judged for prompt, better, worse in judged)
        noted["contradictory comparisons"] = both_ways // 2
    return kept, dropped, noted


def to_dataset(name: str, rows: list[Row]) -> datasets.Dataset:
    """Put rows into an in-memory data set; a column that a row lacks is None there.

    Raises PreferenceDataError, naming `name`, when there is no row or a further column mixes types.
    """
    issues = [] if rows else [DataIssue(name, "no example is left to keep", "give more, or better ones")]
    keys = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in keys}
    for key, values in columns.items():
        try:
            pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            issues.append(
                DataIssue(f"column '{key}'", f"mixes types ({error})", "give all its values one type")
            )
    if issues:
        raise PreferenceDataError(name, issues)
    return datasets.Dataset.from_dict(columns)
