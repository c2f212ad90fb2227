"""From a source to records, each with its place, so that a fault can be found again.

A reader yields `(place, value)` and appends what it could not read to `issues`: it goes on as far as it
can, because a person who repairs a file wants to see every fault at once. That is why files are not read by
`datasets` or `pandas`: they stop at the first fault and name no line.
"""

import ast
import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from rlhf_helpers.core.text import is_text, naming
from rlhf_helpers.preference_data.report import DataIssue, PreferenceDataError

Record = tuple[str, Any]
Source = str | os.PathLike | Sequence[Mapping[str, Any]] | datasets.Dataset | datasets.DatasetDict

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
# Notes that the datasets library leaves beside the data.
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# Columns of a CSV file that hold numbers, truth values or lists; every other cell is text.
CSV_VALUES = {"rating", "label", "margin", "choice", "responses", "ranks", "summaries", "info"}
# A list of messages that was written as text, as pandas writes it into a CSV cell.
WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(["'])(role|content)\1\s*:""")


def read_records(
    source: Source, *, split: str | None, limit: int | None
) -> tuple[str, list[Record], list[DataIssue]]:
    """Return the name of the source, its records (at most `limit`, reading no further) and the issues met.

    A folder's `split` is the part of its files named so (train.jsonl, train-00000.parquet, train/a.csv), of
    other local sources the records whose own column `split` says so; of a hub set without one, "train".
    Every value is as `plain_value` gives it.

    Raises:
        PreferenceDataError: There is nothing to read from.
        TypeError: The source is of another kind.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"limit must be a positive whole number of records or None, got {limit!r}")
    issues: list[DataIssue] = []
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(source).__name__
    if not isinstance(source, str | os.PathLike):
        records, split = _in_memory(source, split)
    elif os.path.isdir(name):
        files, split = _files_of(Path(name), split)
        records = chain.from_iterable(_file_records(file, issues) for file in files)
    elif os.path.isfile(name):
        records = _file_records(Path(name), issues)
    elif isinstance(source, os.PathLike) or name.endswith(SUFFIXES) or name.startswith((".", "/", "~")):
        raise _refusal(name, "no such file or folder", "check the path")
    else:
        records, split = _hub_records(name, split or "train", limit), None
    found = list(islice(_of_split(records, split, name, issues), limit))
    if not found and not issues:
        issues.append(DataIssue(name, "holds no records", "give at least one"))
    return name, found, issues


def plain_value(value: Any) -> Any:
    """Return a value in the form that every later step can hold.

    Line ends become "\\n", arrays become lists, and a list of messages that was written as text (CSV files
    keep no lists) is parsed.

    Raises:
        ValueError: A text, number or column name can be stored by no data set. Says what it is.
        RecursionError: The value is nested too deeply.
    """
    if isinstance(value, str) and WRITTEN_MESSAGES.match(value):
        value = _literal(value)
        if not isinstance(value, list):
            raise ValueError("holds messages written as text that do not parse (parquet and JSON keep lists)")
    if isinstance(value, str):
        if not is_text(value):
            raise ValueError("holds half a surrogate pair (a cut emoji)")
        return value.replace("\r\n", "\n")
    if isinstance(value, Mapping):
        plain = {}
        for key, inner in value.items():
            if not is_text(key):
                raise ValueError(f"the name {key!r} is not text")
            with naming(f"'{key}'"):
                plain[key] = plain_value(inner)
        return plain
    if hasattr(value, "tolist"):  # NumPy, as pandas gives it
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain_value(inner) for inner in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("holds a whole number of more than 64 bits")
    return value


def _literal(text: str) -> Any:
    """Parse JSON, or a Python literal as pandas writes it; None if the text is neither."""
    unparsable = (ValueError, SyntaxError, RecursionError, MemoryError)
    with suppress(*unparsable):
        return json.loads(text)
    with suppress(*unparsable):
        value = ast.literal_eval(text.strip())
        # NumPy writes ['a' 'b'], which Python would read as the one string 'ab'.
        return value if repr(value).split() == text.split() else None
    return None


def _refusal(name: str, problem: str, fix: str) -> PreferenceDataError:
    return PreferenceDataError(name, [DataIssue(name, problem, fix)])


def _in_memory(source: Any, split: str | None) -> tuple[Iterable[Record], str | None]:
    if isinstance(source, datasets.DatasetDict):
        wanted = split or "train"
        if wanted not in source:
            raise _refusal("DatasetDict", f"no split '{wanted}'", f"give split= as one of {sorted(source)}")
        source, split = source[wanted], None
    kinds = (Sequence, datasets.Dataset, datasets.IterableDataset)
    if not isinstance(source, kinds) or isinstance(source, bytes):
        wanted = "a hub name, a path, a list of dicts or a datasets.Dataset"
        raise TypeError(f"a source is {wanted}, not {type(source).__name__}")
    return ((f"row {index}", row) for index, row in enumerate(source)), split


def _of_split(
    records: Iterable[Record], split: str | None, name: str, issues: list[DataIssue]
) -> Iterator[Record]:
    seen: set[str] = set()
    for place, value in records:
        try:
            value = plain_value(value)
        except (ValueError, RecursionError) as error:
            problem = error if isinstance(error, ValueError) else "a value is nested too deeply"
            issues.append(DataIssue(place, str(problem), "correct or remove the record"))
            continue
        own = value.get("split") if isinstance(value, Mapping) else None
        seen.add(str(own))
        if split is None or own == split:
            yield place, value
    if split is not None and split not in seen:
        fix = f"its records say {sorted(seen)}: choose one, or leave split out"
        issues.append(DataIssue(name, f"no record of split '{split}'", fix))


def _files_of(folder: Path, split: str | None) -> tuple[list[Path], str | None]:
    """List a folder's data files, those named after `split` if there are any, and the split still to seek."""
    inside = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    files = [path for path in inside if path.name.endswith(SUFFIXES) and path.name not in NOT_DATA]
    files = [path for path in files if not any(part.startswith(".") for part in path.parts)]
    if not files:
        fix = f"give a folder with {', '.join(SUFFIXES)}; pass a saved set as datasets.load_from_disk(...)"
        raise _refusal(str(folder), f"no data file among its {len(inside)} files", fix)
    named = [path for path in files if split in re.split(r"[/.\-_]", path.as_posix())]
    return [folder / path for path in named or files], None if named else split


def _hub_records(name: str, split: str, limit: int | None) -> list[Record]:
    try:
        rows = datasets.load_dataset(name, split=split, streaming=limit is not None)
        return [(f"{name} ({split}) row {index}", row) for index, row in enumerate(islice(rows, limit))]
    except Exception as error:  # whatever fails on the way to the hub, the reader's choices are the same
        problem = f"is no local path, and the hub gave no split '{split}' ({type(error).__name__}: {error})"
        fix = "check name and connection, or give a local path, or a set loaded with datasets.load_dataset"
        raise _refusal(name, problem, fix) from error


def _file_records(path: Path, issues: list[DataIssue]) -> Iterator[Record]:
    kind, before, empty = path.name.lower().removesuffix(".gz"), len(issues), True
    readers = {".parquet": _parquet, ".csv": _csv, ".jsonl": _json_lines, ".json": _json}
    reader = readers.get(Path(kind).suffix)
    if reader is None:
        issues.append(DataIssue(str(path), "is of no known kind", f"use one of {', '.join(SUFFIXES)}"))
        return
    for record in reader(path, issues):
        empty = False
        yield record
    if empty and len(issues) == before:
        issues.append(DataIssue(str(path), "holds no records", "remove the file or fill it"))


def _lines(path: Path, issues: list[DataIssue]) -> Iterator[tuple[int, str]]:
    """Number and text of each line; bytes that are not UTF-8 are a fault, then shown as U+FFFD to read on."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    problem = f"byte 0x{raw[error.start]:02x} at column {error.start + 1} is not UTF-8"
                    issues.append(DataIssue(f"{path}:{number}", problem, "save the file as UTF-8"))
                    text = raw.decode("utf-8", errors="replace")
                yield number, text.removeprefix("\ufeff") if number == 1 else text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"the gzip stream is truncated or damaged after this line ({error})"
        issues.append(DataIssue(f"{path}:{number}", problem, "fetch or compress the file again"))


def _broken_json(path: Path, line: int, error: Exception) -> DataIssue:
    """Besides broken JSON, numbers of thousands of digits and nesting too deep for Python end up here."""
    where = (
        f"at column {error.colno} ({error.msg})" if isinstance(error, json.JSONDecodeError) else f"({error})"
    )
    return DataIssue(f"{path}:{line}", f"broken JSON {where}", "fix or remove the record")


def _json_lines(
    path: Path, issues: list[DataIssue], lines: Iterable[tuple[int, str]] | None = None
) -> Iterator[Record]:
    for number, text in lines or _lines(path, issues):
        if not text.strip():
            continue
        try:
            value = json.loads(text.rstrip())
        except (ValueError, RecursionError) as error:
            issues.append(_broken_json(path, number, error))
        else:
            yield f"{path}:{number}", value


def _json(path: Path, issues: list[DataIssue]) -> Iterator[Record]:
    """The items of a JSON array, one by one to know their lines, or JSON lines under this name."""
    lines = list(_lines(path, issues))
    text = "".join(line for _, line in lines)
    if not text.lstrip().startswith("["):
        yield from _json_lines(path, issues, lines)
        return
    decoder, gap, line, start = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    try:
        end = gap.match(text, text.index("[") + 1).end()
        while not text.startswith("]", end):
            line, start = line + text.count("\n", start, end), end
            value, end = decoder.raw_decode(text, start)
            yield f"{path}:{line}", value
            end = gap.match(text, end).end()
        json.loads(text)  # the walk above is lenient about commas and about what follows the array
    except (ValueError, RecursionError) as error:
        issues.append(_broken_json(path, getattr(error, "lineno", line), error))


def _csv(path: Path, issues: list[DataIssue]) -> Iterator[Record]:
    """Rows as dicts, each placed at its first line (a quoted cell may hold newlines)."""
    previous_limit = csv.field_size_limit(2**31 - 1)  # the default refuses texts over 128 KiB
    reader, header, line = csv.reader((text for _, text in _lines(path, issues)), strict=True), [], 1
    try:
        header = next(reader, [])
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return
            if cells and len(cells) != len(set(header)):
                problem = f"{len(cells)} cells for the columns {header}"
                fix = "name each column once, quote cells that hold commas or newlines"
                issues.append(DataIssue(f"{path}:{line}", problem, fix))
            elif cells:
                yield f"{path}:{line}", {k: _cell(k, cell) for k, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        issues.append(
            DataIssue(f"{path}:{line}", f"broken CSV ({error})", "close quotes, double those inside")
        )
    finally:
        csv.field_size_limit(previous_limit)


def _cell(key: str, cell: str) -> Any:
    """Read the cell of a column of values: a number, a list, TRUE as spreadsheets write it; empty is None."""
    if key not in CSV_VALUES or not cell:
        return None if key in CSV_VALUES else cell
    value = _literal(cell)
    value = _literal(cell.lower()) if value is None else value
    return cell if value is None else value


def _parquet(path: Path, issues: list[DataIssue]) -> Iterator[Record]:
    index = -1
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
            for index, row in enumerate(rows):
                yield f"{path} row {index}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        place = str(path) if index < 0 else f"{path} after row {index}"
        issues.append(DataIssue(place, f"is no readable parquet ({error})", "write or fetch the file again"))
