"""From a source to records, each with its place, so that a fault can be found again.

A reader yields `(place, value)` and appends what it could not read to `faults`: it goes on as far as it can,
because a person who repairs a file wants to see every fault at once. That is why JSON lines and CSV are not
read by `datasets` or `pandas`: the first stops at the first fault and names no line, the second fills short
rows and cuts long ones without a word.
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow
import pyarrow.parquet

from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import is_text, naming
from rlhf_helpers.preference_data.report import PreferenceDataError

Record = tuple[str, Any]
Source = str | os.PathLike | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.DatasetDict

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
# Notes that the datasets library leaves beside the data.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Columns of a CSV file that hold numbers or truth values; every other cell is text.
CSV_VALUES = {"rating", "label", "margin"}
# A list of messages that was written as text, as pandas writes it into a CSV cell.
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content)\1\s*:""")
# What a damaged or broken file raises, whichever reader reads it.
UNREADABLE = (EOFError, OSError, ValueError, RecursionError, zlib.error, csv.Error, pyarrow.ArrowException)


def read_records(
    source: Source, *, split: str | None, limit: int | None
) -> tuple[str, list[Record], list[str]]:
    """Return the name of the source, its records (at most `limit`, reading no further) and the faults met.

    A folder's `split` is the part of its files named so (train.jsonl, train-00000.parquet, train/a.csv), of
    other local sources the records whose own column `split` says so; of a hub set without one, "train".
    Every value is as `plain_value` gives it.

    Raises:
        PreferenceDataError: There is nothing to read from.
        TypeError: The source is of another kind.
    """
    if limit is not None:
        require_number("limit", limit, at_least=1)
    faults: list[str] = []
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    if not isinstance(source, str | os.PathLike):
        records, split = _in_memory(source, split)
    elif os.path.exists(name):
        files, split = _files_of(Path(name), split)
        records = chain.from_iterable(_file_records(file, faults) for file in files)
    elif isinstance(source, os.PathLike) or name.endswith(SUFFIXES):
        raise PreferenceDataError(name, [f"{name}: no such file or folder; check the path"])
    else:
        records, split = _hub_records(name, split or "train", limit), None
    found = list(islice(_of_split(records, split, name, faults), limit))
    if not found and not faults:
        faults.append(f"{name}: holds no records; give at least one")
    return name, found, faults


def plain_value(value: Any) -> Any:
    """Return a value in the form that every later step can hold: line ends are "\\n", arrays are lists.

    Raises:
        ValueError: A text, number or column name can be stored by no data set. Says what it is.
        RecursionError: The value is nested too deeply.
    """
    if hasattr(value, "tolist"):  # NumPy, as pandas gives it
        value = value.tolist()
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError("holds half a surrogate pair (a cut emoji, or bytes that are not UTF-8)")
        if WRITTEN_MESSAGES.match(value):
            raise ValueError("holds messages written as text; parquet and JSON keep lists")
        return value.replace("\r\n", "\n")
    if isinstance(value, Mapping):
        plain = {}
        for key, inner in value.items():
            if not is_text(key):
                raise ValueError(f"the name {key!r} is not text")
            with naming(f"'{key}'"):
                plain[key] = plain_value(inner)
        return plain
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("holds a whole number of more than 64 bits")
    return value


def _in_memory(source: Any, split: str | None) -> tuple[Iterable[Record], str | None]:
    if isinstance(source, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in source:
            fault = f"DatasetDict: no split '{wanted}'; give split= as one of {sorted(source)}"
            raise PreferenceDataError("DatasetDict", [fault])
        source, split = source[wanted], None
    if not isinstance(source, Sequence | datasets.Dataset | datasets.IterableDataset):
        wanted = "a hub name, a path, a list of dicts or a datasets.Dataset"
        raise TypeError(f"a source is {wanted}, not {type(source).__name__}")
    return ((f"row {index}", row) for index, row in enumerate(source)), split


def _of_split(records: Iterable[Record], split: str | None, name: str, faults: list[str]) -> Iterator[Record]:
    seen: set[str] = set()
    for place, value in records:
        try:
            value = plain_value(value)
        except (ValueError, RecursionError) as error:
            faults.append(f"{place}: {error}; correct or remove the record")
            continue
        own = value.get("split") if isinstance(value, dict) else None
        seen.add(str(own))
        if split is None or own == split:
            yield place, value
    if split is not None and split not in seen:
        fix = f"its records say {sorted(seen)}: choose one, or leave split out"
        faults.append(f"{name}: no record of split '{split}'; {fix}")


def _files_of(path: Path, split: str | None) -> tuple[list[Path], str | None]:
    """List a folder's data files, those named after `split` if there are any, and the split still to seek."""
    if path.is_file():
        return [path], split
    inside = sorted(glob("**/*", root_dir=path, recursive=True))  # leaves hidden files out
    files = [name for name in inside if name.endswith(SUFFIXES) and (path / name).is_file()]
    files = [name for name in files if os.path.basename(name) not in NOT_DATA]
    if not files:
        fix = f"give a folder with {', '.join(SUFFIXES)}; pass a saved set as datasets.load_from_disk(...)"
        raise PreferenceDataError(str(path), [f"{path}: no data file among its {len(inside)} files; {fix}"])
    named = [name for name in files if split in re.split(r"[/\\.\-_]", name)]
    return [path / name for name in named or files], None if named else split


def _hub_records(name: str, split: str, limit: int | None) -> list[Record]:
    try:
        rows = datasets.load_dataset(name, split=split, streaming=limit is not None)
        return [(f"{name} ({split}) row {index}", row) for index, row in enumerate(islice(rows, limit))]
    except Exception as error:  # whatever fails on the way to the hub, the reader's choices are the same
        problem = f"is not a local path; the hub gave no split '{split}' ({type(error).__name__}: {error})"
        fix = "check name and connection, or give a local path, or a set loaded with datasets.load_dataset"
        raise PreferenceDataError(name, [f"{name}: {problem}; {fix}"]) from error


def _file_records(path: Path, faults: list[str]) -> Iterator[Record]:
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines, ".json": _json}
    reader = readers.get(Path(path.name.lower().removesuffix(".gz")).suffix)
    if reader is None:
        faults.append(f"{path}: is of no known kind; use one of {', '.join(SUFFIXES)}")
        return
    place, before = str(path), len(faults)
    try:
        for place, value in reader(path, faults):
            yield place, value
    except UNREADABLE as error:
        faults.append(
            f"{place}: the file is damaged or broken after this ({error}); repair or fetch it again"
        )
    if place == str(path) and len(faults) == before:
        faults.append(f"{path}: holds no records; remove the file or fill it")


def _open(path: Path) -> TextIO:
    """Open a text file; bytes that are not UTF-8 become half surrogate pairs, which `plain_value` refuses."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")


def _json_lines(path: Path, faults: list[str]) -> Iterator[Record]:
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                value = json.loads(line.rstrip())
            except (ValueError, RecursionError) as error:
                problem = str(error).replace("line 1 ", "")  # the record's only line
                faults.append(f"{place}: broken JSON ({problem}); fix or remove the record")
            else:
                yield place, value


def _json(path: Path, faults: list[str]) -> Iterator[Record]:
    """The items of a JSON array, or JSON lines under this name."""
    with _open(path) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, faults)
        return
    for index, value in enumerate(json.loads(text)):
        yield f"{path} row {index}", value


def _csv(path: Path, faults: list[str]) -> Iterator[Record]:
    """Rows as dicts, each placed at its first line (a quoted cell may hold newlines)."""
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    try:
        with _open(path) as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            line = reader.line_num + 1
            for cells in reader:
                if len(cells) == len(set(header)):
                    yield f"{path}:{line}", {k: _cell(k, cell) for k, cell in zip(header, cells, strict=True)}
                elif cells:
                    fix = "name each column once, quote cells that hold commas or newlines"
                    faults.append(f"{path}:{line}: {len(cells)} cells for the columns {header}; {fix}")
                line = reader.line_num + 1
    finally:
        csv.field_size_limit(previous_limit)


def _cell(key: str, cell: str) -> Any:
    """Read the cell of a column of values: a number, a truth value (TRUE too); an empty one is None."""
    if key not in CSV_VALUES:
        return cell
    try:
        return json.loads(cell.lower()) if cell else None
    except ValueError:
        return cell


def _parquet(path: Path, faults: list[str]) -> Iterator[Record]:
    batches = pyarrow.parquet.ParquetFile(path).iter_batches()
    rows = chain.from_iterable(batch.to_pylist() for batch in batches)
    for index, row in enumerate(rows):
        yield f"{path} row {index}", row
