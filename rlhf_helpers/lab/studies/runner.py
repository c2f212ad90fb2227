"""One runner for all studies: a study is a generator of the rows for one seed."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_helpers.lab.studies.record import write_study

Row = dict[str, Any]
Rows = Callable[..., Iterator[Row]]

SEEDS = (0, 1, 2, 3, 4)


class Study:
    """Run a generator of rows once per seed and collect its rows in one table.

    Attributes:
        rows: `rows(seed, **settings)` yields one row per measurement. The defaults of its parameters are the
            settings of the stored study.
        seeds: Seeds of the stored study.
        settings: Names and defaults of the settings.
        facts: Constants that also decide the rows; the manifest records them next to the settings.
    """

    def __init__(self, rows: Rows, seeds: Sequence[int], facts: Row) -> None:
        """Take over the name and the docstring of `rows`."""
        functools.update_wrapper(self, rows)
        _, *settings = inspect.signature(rows).parameters.values()
        self.settings = {setting.name: setting.default for setting in settings}
        self.rows, self.seeds, self.facts = rows, seeds, facts
        named = {"out": None, "seeds": seeds, **self.settings}
        self.__signature__ = inspect.Signature(
            [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=named[name]) for name in named]
        )

    def __call__(
        self, out: str | Path | None = None, *, seeds: Sequence[int] | None = None, **changes: Any
    ) -> pd.DataFrame:
        """Run every seed and return the table; its first column is `seed`.

        Args:
            out: Folder for the CSV and the manifest. Each row is printed as it is made. None: quiet, and
                nothing is written.
            seeds: Other seeds than those of the stored study.
            **changes: Settings that differ from the stored study.
        """
        seeds = list(self.seeds if seeds is None else seeds)
        table = []
        for seed in seeds:
            for row in self.rows(seed, **changes):
                table.append({"seed": seed, **row})
                if out is not None:
                    print(table[-1], flush=True)
        facts = {**self.settings, **changes, **self.facts}
        return write_study(out, self.rows.__name__, pd.DataFrame(table), seeds=seeds, **facts)


def study(*, seeds: Sequence[int] = SEEDS, **facts: Any) -> Callable[[Rows], Study]:
    """Turn a generator of rows into a `Study` with these seeds and facts."""
    return lambda rows: Study(rows, seeds, facts)
