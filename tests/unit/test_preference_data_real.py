"""The real sets, where they are at hand: beside the repository, or in the folder RLHF_TEST_DATA."""

import os
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from rlhf_helpers.preference_data import (
    leaked_prompts,
    prompt_folds,
    read_preferences,
    split_by_prompt,
)

DATA = Path(os.environ.get("RLHF_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
TRANSCRIPTS = DATA / "hh-rlhf-harmless" / "pairs.jsonl.gz"
TREES = DATA / "oasst-trees" / "trees.jsonl"

needs_transcripts = pytest.mark.skipif(not TRANSCRIPTS.is_file(), reason=f"no {TRANSCRIPTS.name} at hand")
needs_trees = pytest.mark.skipif(not TREES.is_file(), reason=f"no {TREES.name} at hand")


@needs_transcripts
def test_all_transcripts_are_read():
    pairs, report = read_preferences(TRANSCRIPTS)
    assert (report.format, report.unit) == ("HH transcripts", "pairs")
    assert (report.records, report.read, report.kept) == (1600, 1600, 1596)
    assert report.dropped == {"empty": 4, "ambiguous": 0, "identical": 0, "unshared": 0}
    assert report.noted == {"exact duplicates": 0, "contradictory comparisons": 0}
    assert pairs.column_names == ["prompt", "chosen", "rejected"]
    longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in pairs)
    assert 0.42 < longer / len(pairs) < 0.46


@needs_transcripts
def test_transcripts_split_without_leaks():
    pairs, _ = read_preferences(TRANSCRIPTS)
    train, test = split_by_prompt(pairs, test_fraction=0.2, seed=0)
    assert leaked_prompts(train, test) == set()
    folds = prompt_folds(pairs, 5, 0)
    assert sum(len(test) for _, test in folds) == 1596
    assert all(leaked_prompts(*fold) == set() for fold in folds)


@needs_trees
def test_all_trees_are_read():
    rankings, report = read_preferences(TREES, unit="rankings")
    assert (report.format, report.unit) == ("OASST trees", "rankings")
    assert (report.records, report.read, report.kept) == (60, 152, 122)
    assert report.dropped == {"empty": 0, "ambiguous": 0, "with fewer than two responses": 30}
    assert report.noted == {
        "replies ranked": 371,
        "replies deleted": 0,
        "replies unranked": 31,
        "exact duplicates": 0,
    }
    sizes = [len(responses) for responses in rankings["responses"]]
    assert {size: sizes.count(size) for size in sizes} == {2: 30, 3: 73, 4: 13, 5: 1, 6: 3, 8: 1, 9: 1}
    assert all(ranks == list(range(len(ranks))) for ranks in rankings["ranks"])


@needs_trees
def test_all_pairs_of_the_trees():
    pairs, report = read_preferences(TREES)
    assert (report.records, report.read, report.kept, report.noted["rankings"]) == (60, 446, 446, 152)
    assert sum(report.dropped.values()) == 0
    rankings, _ = read_preferences(TREES, unit="rankings")
    assert read_preferences(rankings)[0].to_list() == pairs.to_list()
    prompts = pairs["prompt"][:]
    changes = sum(one != other for one, other in pairwise(prompts))
    assert changes + 1 == len(set(prompts)) == 122
    assert len(pairs) == sum(len(list(combinations(r, 2))) for r in rankings["responses"])
