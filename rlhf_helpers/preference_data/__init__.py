"""Training data from wherever they are, as one data set of flat strings with an honest report.

Columns follow TRL: prompt, chosen, rejected (and further ones such as margin). Structural faults stop the
reading with one error that lists them all; what is wrong in meaning is dropped and counted, or, where
people merely contradict each other, kept and counted.

The way of one record through the files of this folder, here line 7 of a file given to `read_preferences`:

    pairs.jsonl, line 7             {"prompt": [{"role": "user", "content": "2 + 2?"}], "chosen": [...], ...}
    reading      read_records       ("pairs.jsonl:7", {...}): the record with its place
    formats      detect_format      CHAT, the format of most records, is used for all of them
    formats      Format.examples    [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}], or none and the
                                    problems with their fixes; an OASST tree gives several
    conversions  CONVERSIONS        only for examples of another unit (rankings, where pairs are read)
    tidying      clean_rows         the example is kept, or dropped and counted under its reason
    tidying      to_dataset         row of the `datasets.Dataset`; the counts go into the LoadReport (report)
"""

import importlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset

from rlhf_helpers.preference_data.conversions import (
    CONVERSIONS,
    rankings_to_pairs,
)
from rlhf_helpers.preference_data.formats import Findings, Format, Row, detect_format, detect_prompts
from rlhf_helpers.preference_data.reading import Source, read_records
from rlhf_helpers.preference_data.report import DataIssue, LoadReport, PreferenceDataError
from rlhf_helpers.preference_data.splits import (
    leaked_prompts,
    normalised_prompt,
    prompt_folds,
    split_by_prompt,
)
from rlhf_helpers.preference_data.tidying import COLUMNS, clean_rows, to_dataset

# What needs torch, models or the world loads on first use (PEP 562): name -> its file, relative to here.
_LAZY = {
    "Guideline": "collection",
    "PreferenceDataset": "creation",
    "ai_labels": "selection",
    "annotator_reliability": "quality",
    "augment": "augmentation",
    "cohen_kappa": ".core.stats",
    "collect_comparisons": "collection",
    "collect_rankings": "collection",
    "collect_ratings": "collection",
    "create_preference_data": "creation",
    "flattery_bias": "quality",
    "fleiss_kappa": ".core.stats",
    "krippendorff_alpha": ".core.stats",
    "length_bias": "quality",
    "position_bias": "quality",
    "select_pairs": "selection",
    "under_guideline": "collection",
}

logger = logging.getLogger(__name__)

Reading = tuple[Dataset, LoadReport]
READERS = {  # unit of the examples -> its reader
    "pairs": "read_preferences",
    "rankings": "read_rankings",
    "ratings": "read_ratings",
    "labels": "read_unpaired",
    "demonstrations": "read_demonstrations",
    "prompts": "read_prompts",
}


def __getattr__(name: str) -> Any:
    """Load a name of `_LAZY` when it is first asked for."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def load_preferences(source: Source, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Return the pairs of `read_preferences`; its report is logged, as a warning when pairs were dropped."""
    dataset, report = read_preferences(source, split=split, limit=limit)
    logger.log(logging.WARNING if report.read > report.kept else logging.INFO, "%s", report)
    return dataset


def read_preferences(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read pairs from any known source and format into columns prompt, chosen, rejected, with a report.

    The format is recognised from the records: TRL standard and conversational, prompt explicit or implicit;
    HH transcripts; OpenAI comparisons; rankings and OASST trees (all pairs of each ranking); ratings (with
    margin). Texts are in the one text form of `core.text`; Windows line ends are read as "\\n". Further
    columns are kept.

    Args:
        source: A hub name; a .json, .jsonl (or .gz of both), .csv or .parquet file or a folder of them; a
            list of dicts; a datasets.Dataset.
        split: Of the hub set (default "train"), the folder's files, or the records' own column `split`.
        limit: Read at most so many records.

    Raises:
        PreferenceDataError: Lists every structural fault with its place and its fix (a prompt under another
            name such as "question" is one), or says that no pair is left.

    Derived in lesson 1.
    """
    return _read(source, split, limit, "pairs")


def read_rankings(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rankings (K >= 2) into prompt, responses (best first), ranks (lower is better), with a report.

    Accepts rows prompt, responses[, ranks] and OASST message trees, where every user turn that assistants
    answered is a ranking, its prompt the conversation down to it. The rest as `read_preferences`.
    """
    return _read(source, split, limit, "rankings")


def read_ratings(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rows prompt, response, rating (float, higher is better); the rest as `read_preferences`."""
    return _read(source, split, limit, "ratings")


def read_unpaired(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read rows prompt, completion, label (bool), or two of them from each pair; the rest as above."""
    return _read(source, split, limit, "labels")


def read_demonstrations(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read what supervised fine-tuning imitates into columns prompt, completion, with a report.

    Accepts rows prompt, completion, and rows messages, where each answer of the assistant is an example
    whose prompt is the conversation before it. Of pairs, the chosen answer is read. The rest as
    `read_preferences`.
    """
    return _read(source, split, limit, "demonstrations")


def read_prompts(source: Source, *, split: str | None = None, limit: int | None = None) -> Reading:
    """Read prompts for a policy to answer, with a report; further columns are kept for the reward.

    Accepts any rows with a prompt, a text or messages, and the pairs and conversations that hold one without
    such a column; their answers are further columns. The rest as `read_preferences`.
    """
    return _read(source, split, limit, "prompts", detect_prompts)


def _read(
    source: Source,
    split: str | None,
    limit: int | None,
    unit: str,
    detect: Callable[[Any], Format | None] = detect_format,
) -> Reading:
    """Read, parse in the format that `detect` finds in most records, convert to `unit` and clean."""
    name, records, issues = read_records(source, split=split, limit=limit)
    formats = Counter(form for form in (detect(value) for _, value in records) if form)
    form = formats.most_common(1)[0][0] if formats else None
    conversions = CONVERSIONS.get(unit, {})
    if form is None and records:
        place, value = records[0]
        columns = sorted(value) if isinstance(value, Mapping) else type(value).__name__
        fix = f"give {', '.join(COLUMNS[unit])}, or another format that {READERS[unit]} names"
        issues.append(DataIssue(place, f"unknown format, the record has {columns}", fix))
    elif form and form.unit not in (unit, *conversions):
        wanted = " or ".join((unit, *conversions))
        fix = f"read it with {READERS[form.unit]}"
        issues.append(DataIssue(name, f"holds {form.unit} ('{form.name}'), not {wanted}", fix))
    rows: list[Row | None] = []
    noted: Counter[str] = Counter()
    for place, value in records if form else []:
        found = Findings()
        rows += form.examples(value, found)
        issues += [DataIssue(place, problem, fix) for problem, fix in found.problems]
        noted.update(found.noted)
    if issues or not form:
        raise PreferenceDataError(name, issues)
    if form.unit != unit:
        noted[form.unit] = len(rows)
        rows = conversions[form.unit](rows, noted)
    kept, dropped, noticed = clean_rows(rows, unit)
    counts = len(records), len(rows), len(kept), dropped, {**noted, **noticed}
    report = LoadReport(name, form.name, unit, *counts)
    if not kept:
        raise PreferenceDataError(name, [DataIssue(name, f"nothing is left ({report})", "give more")])
    return to_dataset(name, kept), report
