"""Human preferences from wherever they are, as one data set of flat strings with an honest report.

Columns follow TRL: prompt, chosen, rejected (and further ones such as margin). Structural faults stop the
reading with one error that lists them all; what is wrong in meaning is dropped and counted, or, where
people merely contradict each other, kept and counted.
"""

import importlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from rlhf_helpers.preference_data.conversions import (
    pairs_of_rankings,
    pairs_of_ratings,
    pairs_to_unpaired,
    rankings_to_pairs,
    ratings_to_pairs,
    to_conversational,
)
from rlhf_helpers.preference_data.formats import Findings, Format, Row, recognise
from rlhf_helpers.preference_data.reading import Source, read_records
from rlhf_helpers.preference_data.report import Fault, LoadReport, PreferenceDataError
from rlhf_helpers.preference_data.splits import (
    leaked_prompts,
    normalised_prompt,
    prompt_folds,
    split_by_prompt,
)
from rlhf_helpers.preference_data.tidying import tidy, to_dataset

__all__ = [
    "Fault",
    "LoadReport",
    "PreferenceDataError",
    "leaked_prompts",
    "load_preferences",
    "normalised_prompt",
    "pairs_to_unpaired",
    "prompt_folds",
    "rankings_to_pairs",
    "ratings_to_pairs",
    "read_preferences",
    "read_rankings",
    "read_ratings",
    "read_unpaired",
    "split_by_prompt",
    "to_conversational",
]

# What needs torch, models or the world loads on first use (PEP 562): name -> its file.
_LAZY = {
    "Guideline": "collection",
    "PreferenceDataset": "creation",
    "ai_labels": "selection",
    "annotator_reliability": "quality",
    "augment": "augmentation",
    "cohen_kappa": "quality",
    "collect_comparisons": "collection",
    "collect_rankings": "collection",
    "collect_ratings": "collection",
    "create_preference_data": "creation",
    "flattery_bias": "quality",
    "fleiss_kappa": "quality",
    "krippendorff_alpha": "quality",
    "length_bias": "quality",
    "position_bias": "quality",
    "select_pairs": "selection",
    "under_guideline": "collection",
}
__all__ += [*_LAZY]

logger = logging.getLogger(__name__)

Reading = tuple[Dataset, LoadReport]
READERS = {"pairs": "preferences", "rankings": "rankings", "ratings": "ratings", "labels": "unpaired"}


def __getattr__(name: str) -> Any:
    """Load a name of `_LAZY` when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def load_preferences(source: Source, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Return the pairs of `read_preferences`; its report is logged, as a warning when pairs were dropped."""
    dataset, report = read_preferences(source, split=split, limit=limit)
    logger.log(logging.WARNING if report.read > report.kept else logging.INFO, "%s", report)
    return dataset


def read_preferences(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read pairs from any known source and format into columns prompt, chosen, rejected, with a report.

    source: a hub name; a .json, .jsonl (or .gz of both), .csv or .parquet file or a folder of them; a list
        of dicts; a datasets.Dataset. The format is recognised from the records: TRL standard and
        conversational, prompt explicit or implicit; HH transcripts; OpenAI comparisons; rankings and OASST
        trees (all pairs of each ranking); ratings (with margin). Further columns are kept.
    split: of the hub set (default "train"), the folder's files, or the records' own column `split`.
    limit: read at most so many records.

    Texts are in the one text form of `core.text`. Raises PreferenceDataError with every structural fault,
    its place and its mend, or when no pair is left. Derived in lesson 1.
    """
    parsed = _parse(source, split, limit, ("pairs", "rankings", "ratings"))
    rows, unit = parsed.rows, parsed.format.unit
    if unit != "pairs":
        parsed.noted[unit] = len(rows)
        rows = (pairs_of_rankings if unit == "rankings" else pairs_of_ratings)(rows, parsed.noted)
    return _finish(parsed, rows, "pairs")


def read_rankings(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rankings (K >= 2) into prompt, responses (best first), ranks (lower is better), with a report.

    Accepts rows prompt, responses[, ranks] and OASST message trees, where every user turn that assistants
    answered is a ranking, its prompt the conversation down to it. The rest as `read_preferences`.
    """
    parsed = _parse(source, split, limit, ("rankings",))
    return _finish(parsed, parsed.rows, "rankings")


def read_ratings(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rows prompt, response, rating (float, higher is better); the rest as `read_preferences`."""
    parsed = _parse(source, split, limit, ("ratings",))
    return _finish(parsed, parsed.rows, "ratings")


def read_unpaired(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rows prompt, completion, label (bool); the rest as `read_preferences`."""
    parsed = _parse(source, split, limit, ("labels",))
    return _finish(parsed, parsed.rows, "labels")


@dataclass(frozen=True)
class _Parsed:
    name: str
    format: Format
    records: int
    rows: list[Row | None]
    noted: Counter[str]


def _parse(source: Source, split: str | None, limit: int | None, units: tuple[str, ...]) -> _Parsed:
    """Read and parse, in the format that most records have; any fault of either step ends it here."""
    name, records, faults = read_records(source, split=split, limit=limit)
    formats = Counter(form for form in (recognise(value) for _, value in records) if form)
    form = formats.most_common(1)[0][0] if formats else None
    if form is None and records:
        place, value = records[0]
        columns = sorted(map(str, value)) if isinstance(value, Mapping) else type(value).__name__
        mend = "give prompt, chosen, rejected, or another format that read_preferences names"
        faults.append(Fault(place, f"unknown format, the record has {columns}", mend))
    elif form and form.unit not in units:
        mend = f"read it with read_{READERS[form.unit]}"
        faults.append(Fault(name, f"holds {form.unit} ('{form.name}'), not {' or '.join(units)}", mend))
    rows: list[Row | None] = []
    noted: Counter[str] = Counter()
    for place, value in records if form else []:
        found = Findings()
        rows += form.examples(value, found)
        faults += [Fault(place, problem, mend) for problem, mend in found.problems]
        noted.update(found.noted)
    if faults or not form:
        raise PreferenceDataError(name, faults)
    return _Parsed(name, form, len(records), rows, noted)


def _finish(parsed: _Parsed, rows: list[Row | None], unit: str) -> Reading:
    kept, dropped, noticed = tidy(rows, unit)
    counts = parsed.records, len(rows), len(kept), dropped, {**parsed.noted, **noticed}
    report = LoadReport(parsed.name, parsed.format.name, unit, *counts)
    if not kept:
        raise PreferenceDataError(
            parsed.name, [Fault(parsed.name, f"nothing is left ({report})", "give more")]
        )
    return to_dataset(parsed.name, kept), report
