"""From one kind of judgement to another: rankings and ratings to pairs, pairs to labels or messages."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import datasets

from rlhf_helpers.preference_data.tidying import Row, clean_rows, to_dataset


def _by_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return list(groups.values())


def _further(row: Row, *used: str) -> Row:
    return {key: value for key, value in row.items() if key not in used}


def pairs_of_rankings(rows: Iterable[Row], noted: Counter[str]) -> list[Row]:
    """List the K (K - 1) / 2 pairs of each ranking, a prompt's together; ties are counted, not paired."""
    pairs = []
    for row in (row for group in _by_prompt(rows) for row in group):
        ranks = row.get("ranks") or range(len(row["responses"]))
        further = _further(row, "prompt", "responses", "ranks")
        for (chosen, rank), (rejected, other) in combinations(zip(row["responses"], ranks, strict=True), 2):
            noted["ties left out"] += rank == other
            if rank != other:
                pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected, **further})
    return pairs


def pairs_of_ratings(rows: Iterable[Row], noted: Counter[str]) -> list[Row]:
    """Pair all responses to one prompt by rating, with margin = difference; ties are counted, not paired."""
    pairs = []
    for group in _by_prompt(rows):
        noted["prompts with a single rating"] += len(group) == 1
        for two in combinations(group, 2):
            worse, better = sorted(two, key=lambda row: row["rating"])
            margin = better["rating"] - worse["rating"]
            noted["ties left out"] += margin == 0
            if margin:
                texts = {"chosen": better["response"], "rejected": worse["response"]}
                pairs.append({"prompt": better["prompt"], **texts, "margin": margin})
    return pairs


def labels_of_pairs(rows: Iterable[Row | None], noted: Counter[str]) -> list[Row | None]:
    """Make two labeled completions of each pair; a pair that shares no turn to answer (None) stays one."""
    labels: list[Row | None] = []
    for row in rows:
        labels += [_completion(row, side, label=side == "chosen") for side in ("chosen", "rejected")]
    return labels


def demonstrations_of_pairs(rows: Iterable[Row | None], noted: Counter[str]) -> list[Row | None]:
    """Make one demonstration of each pair: its chosen answer."""
    return [_completion(row, "chosen") for row in rows]


def _completion(row: Row | None, side: str, **columns: bool) -> Row | None:
    if row is None:
        return None
    further = _further(row, "prompt", "chosen", "rejected")
    return {"prompt": row["prompt"], "completion": row[side], **columns, **further}


def _unchanged(rows: list[Row | None], noted: Counter[str]) -> list[Row | None]:
    return rows


# Unit that a reader wants -> units that it can be made of, and how.
CONVERSIONS = {
    "pairs": {"rankings": pairs_of_rankings, "ratings": pairs_of_ratings},
    "labels": {"pairs": labels_of_pairs},
    "demonstrations": {"pairs": demonstrations_of_pairs},
    "prompts": {"pairs": _unchanged, "demonstrations": _unchanged},
}


def rankings_to_pairs(rankings: datasets.Dataset) -> datasets.Dataset:
    """Turn rankings (prompt, responses best first[, ranks]) into all their pairs prompt, chosen, rejected.

    A ranking of K gives K (K - 1) / 2 pairs; those of one prompt stand together, because they are not
    independent and belong into one batch element (InstructGPT 2022, section 3.5). Tied, empty and identical
    pairs are left out (`read_preferences` counts them); raises PreferenceDataError if none is left.
    """
    return to_dataset("rankings", clean_rows(pairs_of_rankings(rankings, Counter()), "pairs")[0])
