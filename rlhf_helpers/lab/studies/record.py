"""One runner for all studies, and their records: a table as CSV, and a manifest that says how it was made."""

import functools
import hashlib
import inspect
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from rlhf_helpers.core.files import write_atomically

Row = dict[str, Any]
Rows = Iterator[Row]
Study = Callable[..., pd.DataFrame]

STUDIES: dict[str, Study] = {}  # by name: those whose modules were imported
STORED = Path(__file__).parents[2] / "assets" / "studies"
LIBRARIES = ("torch", "transformers", "scikit-learn", "numpy", "accelerate")
SEEDS = (0, 1, 2, 3, 4)


def study(rows: Callable[..., Rows], seeds: Sequence[int] = SEEDS) -> Study:
    """Turn a generator of rows into a study: run it once per seed and collect its rows in one table.

    The generator, `rows(seed, **settings)`, yields one row per measurement; the defaults of its parameters
    are the settings of the stored study. The first column of the table is `seed`. Arguments of a study:

        out: Folder for the CSV and the manifest. Each row is printed and kept in NAME.csv.part as it is made.
            None: quiet, and nothing is written.
        seeds: Other seeds than those of the stored study.
        **changes: Settings that differ from the stored study.

    Args:
        rows: The generator.
        seeds: Seeds of the stored study.
    """

    @functools.wraps(rows)
    def run(out: str | Path | None = None, seeds: Sequence[int] = seeds, **changes: Any) -> pd.DataFrame:
        name = rows.__name__
        # An unknown setting or a folder that cannot be made is refused before the first measurement.
        bound = inspect.signature(rows).bind(None, **changes)
        bound.apply_defaults()
        _, *settings = bound.arguments.items()
        if out is not None:
            out = Path(out)
            out.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        table = []
        for seed in seeds:
            for row in rows(seed, **changes):
                table.append({"seed": seed, **row})
                if out is not None:  # a run that stops early keeps what it has measured
                    print(table[-1], flush=True)
                    write_atomically(out / f"{name}.csv.part", _csv(table))
        frame = pd.DataFrame(table)
        if out is None:
            return frame
        facts = dict(settings)
        facts |= file_facts(facts.pop("data", None))  # a file of preferences: named, without its folder
        read = f" --data {facts['data']}" if "data" in facts else ""
        manifest = {
            "study": name,
            "command": f"python -m rlhf_helpers study {name}{read}",
            "seeds": [*seeds],
            **facts,
            "python": platform.python_version(),
            "versions": {library: version(library) for library in LIBRARIES},
            "platform": sys.platform,
            "threads": torch.get_num_threads(),
            "minutes": round((time.monotonic() - begin) / 60, 1),  # all seeds, as long as one waits
        }
        write_atomically(out / f"{name}.csv", _csv(table))
        (out / f"{name}.csv.part").unlink(missing_ok=True)
        # Settings and annotators are dataclasses: their fields are recorded.
        text = json.dumps(manifest, indent=1, default=vars)
        (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        return frame

    STUDIES[rows.__name__] = run
    return run


def _csv(table: list[Row]) -> bytes:
    return pd.DataFrame(table).to_csv(index=False, float_format="%.6f", lineterminator="\n").encode()


def file_facts(data: Any) -> dict[str, Any]:
    """Name and fingerprint a data file, so that a rerun can tell whether it reads the same data."""
    if not isinstance(data, (str, os.PathLike)):
        return {}
    path = Path(data)
    contents = [file.read_bytes() for file in (path, *sorted(path.rglob("*"))) if file.is_file()]
    digest = hashlib.sha256(b"".join(contents)).hexdigest() if contents else None
    return {"data": path.name, "sha256": digest}


def load_study(name: str, folder: Path = STORED) -> pd.DataFrame:
    """Read the stored table of a study, with its manifest in `.attrs`.

    Args:
        name: The study.
        folder: Where it is stored; the default holds the studies that the lessons show.

    Raises:
        FileNotFoundError: No such study is stored; the error names those that are.
    """
    file = folder / f"{name}.csv"
    if not file.is_file():
        stored = sorted(path.stem for path in folder.glob("*.csv"))
        raise FileNotFoundError(f"no study {name!r} is stored; there are {', '.join(stored)}")
    table = pd.read_csv(file)
    table.attrs = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return table
