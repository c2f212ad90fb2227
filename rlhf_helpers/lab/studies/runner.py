"""One runner for all studies: a study is a generator of the rows for one seed."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_helpers.lab.studies.record import write_study

Row = dict[str, Any]
Rows = Iterator[Row]
Study = Callable[..., pd.DataFrame]

SEEDS = (0, 1, 2, 3, 4)


def study(*, seeds: Sequence[int] = SEEDS, **facts: Any) -> Callable[[Callable[..., Rows]], Study]:
    """Turn a generator of rows into a study: run it once per seed and collect its rows in one table.

    The generator, `rows(seed, **settings)`, yields one row per measurement; the defaults of its parameters
    are the settings of the stored study. The first column of the table is `seed`. Arguments of a study:

        out: Folder for the CSV and the manifest. Each row is printed as it is made. None: quiet, and nothing
            is written.
        seeds: Other seeds than those of the stored study.
        **changes: Settings that differ from the stored study.

    Args:
        seeds: Seeds of the stored study.
        **facts: Constants that also decide the rows; the manifest records them next to the settings.
    """

    def decorate(rows: Callable[..., Rows]) -> Study:
        @functools.wraps(rows)
        def run(out: str | Path | None = None, seeds: Sequence[int] = seeds, **changes: Any) -> pd.DataFrame:
            table = []
            for seed in seeds:
                for row in rows(seed, **changes):
                    table.append({"seed": seed, **row})
                    if out is not None:
                        print(table[-1], flush=True)
            manifest = {setting.name: setting.default for setting in settings} | changes | facts
            return write_study(out, rows.__name__, pd.DataFrame(table), seeds=seeds, **manifest)

        _, *settings = inspect.signature(rows).parameters.values()
        *own, _ = inspect.signature(run, follow_wrapped=False).parameters.values()
        run.__signature__ = inspect.Signature([*own, *settings])
        return run

    return decorate
