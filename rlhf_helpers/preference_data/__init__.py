"""Training data from wherever they are, as one data set of flat strings with an honest report.

Columns follow TRL: prompt, chosen, rejected (and further ones such as margin). Structural faults stop the
reading with one error that lists them all; what is wrong in meaning is dropped and counted, or, where
people merely contradict each other, kept and counted.

The way of one record through the files of this folder, here line 7 of a file given to `read_preferences`:

    hh.jsonl, line 7                {"chosen": "\\n\\nHuman: 2 + 2?\\n\\nAssistant: 4", "rejected": ...}
    reading      read_records       ("hh.jsonl:7", {...}): the record with its place
    formats      detect_format      TRANSCRIPTS; the format of most records is used for all
    formats      parse_transcripts  [{"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}], or an error with
                                    the problems and their fixes; an OASST tree gives several
    conversions  CONVERSIONS        only for examples of another unit (rankings, where pairs are read)
    tidying      clean_rows         the example is kept, or dropped and counted under its reason
    tidying      to_dataset         row of the `datasets.Dataset`; the counts go into the LoadReport (report)
"""

import logging
from collections import Counter

from datasets import Dataset

from rlhf_helpers.core.stats import cohen_kappa, fleiss_kappa, krippendorff_alpha
from rlhf_helpers.preference_data.collection import (
    collect_comparisons,
    collect_rankings,
    collect_ratings,
)
from rlhf_helpers.preference_data.conversions import CONVERSIONS
from rlhf_helpers.preference_data.creation import PreferenceDataset, create_preference_data
from rlhf_helpers.preference_data.formats import Format, Row, detect_format
from rlhf_helpers.preference_data.quality import (
    annotator_reliability,
    flattery_bias,
    length_bias,
    position_bias,
)
from rlhf_helpers.preference_data.reading import Record, Source, read_records
from rlhf_helpers.preference_data.report import LoadReport, PreferenceDataError
from rlhf_helpers.preference_data.selection import ai_labels, select_pairs
from rlhf_helpers.preference_data.splits import (
    leaked_prompts,
    prompt_folds,
    split_by_prompt,
)
from rlhf_helpers.preference_data.tidying import COLUMNS, clean_rows, to_dataset
from rlhf_helpers.world.annotators import Guideline

logger = logging.getLogger(__name__)

Reading = tuple[Dataset, LoadReport]


def load_preferences(source: Source, *, split: str | None = None, limit: int | None = None) -> Dataset:
    """Return the pairs of `read_preferences`; its report is logged, as a warning when pairs were dropped."""
    dataset, report = read_preferences(source, split=split, limit=limit)
    logger.log(logging.WARNING if report.read > report.kept else logging.INFO, "%s", report)
    return dataset


def read_preferences(
    source: Source, *, unit: str = "pairs", split: str | None = None, limit: int | None = None
) -> Reading:
    """Read training data of one unit from any known source and format, with a report.

    The format is recognised from the records: TRL standard and conversational, prompt explicit or implicit;
    HH transcripts; OpenAI comparisons; OASST message trees; rankings; ratings; labels; demonstrations;
    conversations. Texts are in the one text form of `core.text`; Windows line ends are read as "\\n". Further
    columns are kept.

        unit            columns                       made of
        pairs           prompt, chosen, rejected      pairs, all pairs of each ranking, ratings (with margin)
        rankings        prompt, responses (K >= 2,    rankings, and trees: every user turn that assistants
                        best first), ranks (lower     answered, its prompt the conversation down to it
                        is better)
        ratings         prompt, response, rating      ratings (higher is better)
        labels          prompt, completion, label     labels, and two of each pair
        demonstrations  prompt, completion            what supervised fine-tuning imitates: also each answer
                                                      of a conversation, and the chosen answers of pairs
        prompts         prompt                        any rows with a prompt, for a policy to answer; their
                                                      answers are further columns, for the reward

    Args:
        source: A hub name; a .json, .jsonl (or .gz of both), .csv or .parquet file or a folder of them; a
            list of dicts; a datasets.Dataset.
        unit: What an example is, see the table.
        split: Of the hub set (default "train"), the folder's files, or the records' own column `split`.
        limit: Read at most so many records.

    Raises:
        PreferenceDataError: Lists every structural fault with its place and its fix (a prompt under another
            name such as "question" is one), or says that no example is left.
        ValueError: The unit is unknown.

    Derived in lesson 1.
    """
    if unit not in COLUMNS:
        raise ValueError(f"unit={unit!r} is unknown; choose from {list(COLUMNS)}")
    name, records, faults = read_records(source, split=split, limit=limit)
    usable = (unit, *CONVERSIONS.get(unit, {}))
    form = _choose_format(name, records, usable, faults)
    # Examples by the parser of the format: of HH transcripts, `formats.parse_transcripts`.
    examples, unshared, noted = _parse(form, records, faults)
    # Every fault of every record is listed: a person repairs a file once.
    if faults:
        raise PreferenceDataError(name, faults, form.unit if form and form.unit not in usable else None)
    if form.unit != unit:
        noted[form.unit] = len(examples) + unshared
        examples = CONVERSIONS[unit][form.unit](examples, noted)
    rows, dropped, noticed = clean_rows(examples, unit)
    if unshared:
        dropped["unshared"] = unshared
    counts = len(records), len(examples) + unshared, len(rows), dropped, {**noted, **noticed}
    report = LoadReport(name, form.name, unit, *counts)
    return to_dataset(report, rows), report


def _choose_format(
    name: str, records: list[Record], usable: tuple[str, ...], faults: list[str]
) -> Format | None:
    """Return one format for all records, that of most of them; a fault is added if it is of no usable unit.

    usable: the unit that is read, then those that can be converted to it.
    """
    unit = usable[0]
    formats = Counter(form for form in (detect_format(value, unit) for _, value in records) if form)
    form = formats.most_common(1)[0][0] if formats else None
    if form is None and records:
        place, value = records[0]
        columns = sorted(value) if isinstance(value, dict) else type(value).__name__
        fix = f"give {', '.join(COLUMNS[unit])}, or another format that read_preferences names"
        faults.append(f"{place}: unknown format, the record has {columns}; {fix}")
    elif form and form.unit not in usable:
        fix = f"it fits unit={form.unit!r} of read_preferences"
        faults.append(f"{name}: holds {form.unit} ('{form.name}'), not {' or '.join(usable)}; {fix}")
    return form


def _parse(form: Format | None, records: list[Record], faults: list[str]) -> tuple[list[Row], int, Counter]:
    """Return the examples of all records, the number of pairs that share no turn to answer, and counts."""
    examples: list[Row] = []
    unshared, noted = 0, Counter()
    for place, value in records if form else []:
        try:
            parsed = form.examples(value, noted)
        except ValueError as error:
            faults += [f"{place}: {fault}" for fault in error.args]
        else:
            examples += parsed
            unshared += form.unit == "pairs" and not parsed
    return examples, unshared, noted
