"""From one kind of judgement to another: rankings and ratings to pairs, pairs to labels or demonstrations."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

from rlhf_helpers.preference_data.tidying import Row


def _by_prompt(rows: Iterable[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row)
    return list(groups.values())


def _further(row: Row, *used: str) -> Row:
    return {key: value for key, value in row.items() if key not in used}


def pairs_of_rankings(rows: Iterable[Row], noted: Counter) -> list[Row]:
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


def pairs_of_ratings(rows: Iterable[Row], noted: Counter) -> list[Row]:
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


def labels_of_pairs(rows: Iterable[Row], noted: Counter) -> list[Row]:
    """Make two labeled completions of each pair."""
    labels = []
    for row in rows:
        further = _further(row, "prompt", "chosen", "rejected")
        for side in ("chosen", "rejected"):
            completion = {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            labels.append({**completion, **further})
    return labels


def demonstrations_of_pairs(rows: Iterable[Row], noted: Counter) -> list[Row]:
    """Make one demonstration of each pair: its chosen answer."""
    return [_further(row, "label") for row in labels_of_pairs(rows, noted)[::2]]


# Unit that a reader wants -> units that it can be made of, and how; prompts are read from any of theirs.
CONVERSIONS = {
    "pairs": {"rankings": pairs_of_rankings, "ratings": pairs_of_ratings},
    "labels": {"pairs": labels_of_pairs},
    "demonstrations": {"pairs": demonstrations_of_pairs},
    "prompts": {"pairs": lambda rows, noted: rows, "demonstrations": lambda rows, noted: rows},
}
