"""From a source to records, each with its place, so that a fault can be found again.

A reader yields `(place, value)` and appends what it could not read to `faults`: it goes on as far as it
can, because a person who mends a file wants to see every fault at once.
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from rlhf_helpers.preference_data.report import Fault, PreferenceDataError

Record = tuple[str, Any]
Source = str | os.PathLike | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.DatasetDict

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
# Notes that the datasets library leaves beside the data.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Columns of a CSV file that hold numbers or truth values; every other cell stays text.
CSV_NUMBERS = {"rating", "label", "margin", "choice"}


def read_records(
    source: Source, *, split: str | None, limit: int | None
) -> tuple[str, list[Record], list[Fault]]:
    """Return the name of the source, its records (at most `limit`, reading no further) and the faults met.

    A folder's `split` is the part of its files named so (train.jsonl, train-00000.parquet, train/a.csv), of
    other local sources the records whose own column `split` says so; of a hub set without one, "train".
    Raises PreferenceDataError when there is nothing to read from, TypeError for a source of another kind.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be a positive whole number of records or None, got {limit!r}")
    faults: list[Fault] = []
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    if not isinstance(source, str | os.PathLike):
        records, split = _in_memory(source, split)
    elif os.path.isdir(name):
        files, split = _files_of(Path(name), split)
        records = chain.from_iterable(_file_records(file, faults) for file in files)
    elif os.path.isfile(name):
        records = _file_records(Path(name), faults)
    elif isinstance(source, os.PathLike) or name.endswith(SUFFIXES) or name.startswith((".", "/", "~")):
        raise _refusal(name, "no such file or folder", "check the path")
    else:
        return name, _hub_records(name, split or "train", limit), faults
    found = list(islice(_of_split(records, split, name, faults), limit))
    if not found and not faults:
        faults.append(Fault(name, "holds no records", "give at least one"))
    return name, found, faults


def _refusal(name: str, problem: str, mend: str) -> PreferenceDataError:
    return PreferenceDataError(name, [Fault(name, problem, mend)])


def _in_memory(source: Any, split: str | None) -> tuple[Iterable[Record], str | None]:
    if isinstance(source, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in source:
            raise _refusal("DatasetDict", f"no split '{wanted}'", f"give split= as one of {sorted(source)}")
        source, split = source[wanted], None
    kinds = (Sequence, datasets.Dataset, datasets.IterableDataset)
    if not isinstance(source, kinds) or isinstance(source, bytes):
        kind = type(source).__name__
        raise TypeError(f"a source is a hub name, a path, a list of dicts or a datasets.Dataset, not {kind}")
    return ((f"row {index}", row) for index, row in enumerate(source)), split


def _of_split(
    records: Iterable[Record], split: str | None, name: str, faults: list[Fault]
) -> Iterator[Record]:
    seen: set[str] = set()
    for place, value in records:
        own = value.get("split") if isinstance(value, Mapping) else None
        seen.add(str(own))
        if split is None or own == split:
            yield place, value
    if split is not None and split not in seen:
        mend = f"its records say {sorted(seen)}: choose one, or leave split out"
        faults.append(Fault(name, f"no record of split '{split}'", mend))


def _files_of(folder: Path, split: str | None) -> tuple[list[Path], str | None]:
    """List a folder's data files, those named after `split` if there are any, and the split still to seek."""
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [path for path in inside if path.name.endswith(SUFFIXES) and path.name not in NOT_DATA]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    if not files:
        mend = f"give a folder with {', '.join(SUFFIXES)}; pass a saved set as datasets.load_from_disk(...)"
        raise _refusal(str(folder), f"no data file among its {len(inside)} files", mend)
    named = [path for path in files if split in re.split(r"[/.\-_]", path.as_posix())]
    return [folder / path for path in named or files], None if named else split


def _hub_records(name: str, split: str, limit: int | None) -> list[Record]:
    try:
        rows = datasets.load_dataset(name, split=split, streaming=limit is not None)
        return [(f"{name} ({split}) row {index}", row) for index, row in enumerate(islice(rows, limit))]
    except Exception as error:  # whatever fails on the way to the hub, the reader's choices are the same
        problem = f"is no local path, and the hub gave no split '{split}' ({type(error).__name__}: {error})"
        mend = "check name and connection, or give a local path, or a set loaded with datasets.load_dataset"
        raise _refusal(name, problem, mend) from error


def _file_records(path: Path, faults: list[Fault]) -> Iterator[Record]:
    kind, before, empty = path.name.lower().removesuffix(".gz"), len(faults), True
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines, ".json": _json}
    reader = readers.get(Path(kind).suffix)
    if reader is None:
        faults.append(Fault(str(path), "is of no known kind", f"use one of {', '.join(SUFFIXES)}"))
        return
    for record in reader(path, faults):
        empty = False
        yield record
    if empty and len(faults) == before:
        faults.append(Fault(str(path), "holds no records", "remove the file or fill it"))


def _lines(path: Path, faults: list[Fault]) -> Iterator[tuple[int, str]]:
    """Number and text of each line; bytes that are not UTF-8 are a fault, then shown as U+FFFD to read on."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    problem = f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8"
                    faults.append(Fault(f"{path}:{number}", problem, "save the file as UTF-8"))
                    text = raw.decode("utf-8", errors="replace")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the gzip stream is truncated or damaged after this line ({error})"
        faults.append(Fault(f"{path}:{number}", problem, "fetch or compress the file again"))


def _broken_json(path: Path, line: int, error: json.JSONDecodeError) -> Fault:
    problem = f"broken JSON at column {error.colno} ({error.msg})"
    return Fault(f"{path}:{line}", problem, "mend or remove the record")


def _json_lines(path: Path, faults: list[Fault]) -> Iterator[Record]:
    for number, text in _lines(path, faults):
        if not text.strip():
            continue
        try:
            value = json.loads(text.rstrip())
        except json.JSONDecodeError as error:
            faults.append(_broken_json(path, number, error))
        else:
            yield f"{path}:{number}", value


def _json(path: Path, faults: list[Fault]) -> Iterator[Record]:
    """The items of a JSON array, one by one to know their lines, or JSON lines under this name."""
    met: list[Fault] = []
    text = "".join(line for _, line in _lines(path, met))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, faults)
        return
    faults += met
    decoder, gap, line, start = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    try:
        end = gap.match(text, text.index("[") + 1).end()
        while not text.startswith("]", end):
            line, start = line + text.count("\n", start, end), end
            value, end = decoder.raw_decode(text, start)
            yield f"{path}:{line}", value
            end = gap.match(text, end).end()
        json.loads(text)  # the walk above is lenient about commas and about what follows the array
    except json.JSONDecodeError as error:
        faults.append(_broken_json(path, error.lineno, error))


def _csv(path: Path, faults: list[Fault]) -> Iterator[Record]:
    """Rows as dicts, each placed at its first line (a quoted cell may hold newlines)."""
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    reader, header, line = csv.reader((text for _, text in _lines(path, faults)), strict=True), [], 1
    try:
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells and len(cells) != len(set(header)):
                problem = f"{len(cells)} cells for the columns {header}"
                mend = "name each column once, quote cells that hold commas or newlines"
                faults.append(Fault(f"{path}:{line}", problem, mend))
            elif cells:
                yield f"{path}:{line}", {k: _cell(k, cell) for k, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        faults.append(Fault(f"{path}:{line}", f"broken CSV ({error})", "close quotes, double those inside"))
    finally:
        csv.field_size_limit(previous_limit)


def _cell(key: str, cell: str) -> Any:
    try:
        return json.loads(cell.strip().lower()) if key in CSV_NUMBERS else cell
    except json.JSONDecodeError:
        return cell


def _parquet(path: Path, faults: list[Fault]) -> Iterator[Record]:
    index = -1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for index, row in enumerate(rows):
                yield f"{path} row {index}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        place = str(path) if index < 0 else f"{path} after row {index}"
        faults.append(Fault(place, f"is no readable parquet ({error})", "write or fetch the file again"))
