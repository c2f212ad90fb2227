"""Records of studies: a table as CSV, and a manifest that says how to make the same rows again."""

import json
import platform
import sys
from dataclasses import is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

STORED = Path(__file__).parents[2] / "assets" / "studies"
LIBRARIES = ("torch", "transformers", "scikit-learn", "numpy", "accelerate")


def write_study(out: str | Path | None, name: str, table: pd.DataFrame, **facts: Any) -> pd.DataFrame:
    """Write a table as NAME.csv and its manifest as NAME.json, and return the table.

    Args:
        out: The folder; None: nothing is written.
        name: Name of the study.
        table: Its rows.
        **facts: Settings, seeds, data: everything that decides the rows.
    """
    if out is None:
        return table
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / f"{name}.csv", index=False, float_format="%.6f")
    manifest = {
        "study": name,
        "command": f"python -m rlhf_helpers study {name}",
        **facts,
        "python": platform.python_version(),
        "versions": {library: version(library) for library in LIBRARIES},
        "platform": sys.platform,
        "threads": torch.get_num_threads(),
    }
    text = json.dumps(
        manifest, indent=1, default=lambda value: vars(value) if is_dataclass(value) else str(value)
    )
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return table


def load_study(name: str) -> pd.DataFrame:
    """Read the stored table of a study, with its manifest in `.attrs`.

    Raises:
        FileNotFoundError: No such study is stored; the error names those that are.
    """
    file = STORED / f"{name}.csv"
    if not file.is_file():
        found = sorted(path.stem for path in STORED.glob("*.csv"))
        raise FileNotFoundError(f"no study {name!r} is stored; there are {', '.join(found) or 'none'}")
    table = pd.read_csv(file)
    table.attrs = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
    return table


def prediction_interval(values: Any) -> tuple[float, float]:
    """Predict (95 %) where one further run falls: mean -+ t_(n-1) s sqrt(1 + 1/n) of n independent runs.

    Wider than the interval of the mean, which says nothing about a single run.

    Raises:
        ValueError: There are fewer than two values.
    """
    runs = np.asarray(values, dtype=float)
    if runs.size < 2:
        raise ValueError(f"a prediction interval needs at least two runs, got {runs.size}")
    # Not t.interval: that is NaN where all runs are the same.
    half = stats.t.ppf(0.975, runs.size - 1) * runs.std(ddof=1) * np.sqrt(1 + 1 / runs.size)
    return float(runs.mean() - half), float(runs.mean() + half)
