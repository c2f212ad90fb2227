"""An evaluation as a report in Markdown, with what it takes to get the same numbers again."""

import html
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from rlhf_helpers.alignment_eval.measuring import weights_fingerprint
from rlhf_helpers.core.files import write_atomically

LIBRARIES = ("rlhf-helpers", "torch", "transformers", "numpy", "scipy")


class AlignmentReportGenerator:
    """Writes results and what it takes to get the same numbers again. Lesson 3."""

    def __init__(
        self,
        title: str = "Alignment report",
        *,
        model: nn.Module | None = None,
        seeds: Sequence[int] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the title and the run manifest: versions, platform, seeds, settings, the model's weights."""
        self.title = title
        self.manifest = {
            "python": platform.python_version(),
            "platform": sys.platform,
            **{library: version(library) for library in LIBRARIES},
            "seeds": ", ".join(map(str, seeds)) or "not given",
            "model": "not given" if model is None else weights_fingerprint(model),
            **{key: str(value) for key, value in (settings or {}).items()},
        }

    def generate_alignment_report(
        self, results: Mapping[str, pd.DataFrame | Mapping[str, Any] | str], *, out: str | Path
    ) -> Path:
        """Write OUT/alignment_report.md, with the run manifest at its end; return the file.

        All text is escaped: an answer that holds markup is shown, not obeyed.

        Args:
            results: heading -> table (its index is shown), mapping name -> value, or a paragraph; numbers
                with four significant digits.
            out: The folder.

        Raises:
            FileExistsError: The file is there already.
            TypeError: A result is of another kind; nothing is written then.
        """
        path = Path(out) / "alignment_report.md"
        if path.exists():
            raise FileExistsError(f"{path} exists: name another folder, or remove the older report")
        parts = [f"# {_plain(self.title)}"]
        for heading, result in {**results, "Run manifest": self.manifest}.items():
            text = _plain(result) if isinstance(result, str) else markdown_table(result)
            parts += [f"## {_plain(heading)}", text]
        write_atomically(path, ("\n\n".join(parts) + "\n").encode())
        return path


def markdown_table(result: pd.DataFrame | Mapping[str, Any]) -> str:
    """Write a table, or name -> value, as Markdown: escaped, numbers with four significant digits.

    All columns but the first stand to the right. Lesson 4. Raises TypeError for anything else.
    """
    if isinstance(result, Mapping):
        result = pd.DataFrame({"value": dict(result)}, dtype=object)
    if not isinstance(result, pd.DataFrame):
        raise TypeError(f"a result must be a DataFrame, a mapping or a text, got {type(result)}")
    shown = result.astype(object).map(_cell).rename(index=_plain, columns=_plain)
    rows = [["", *shown.columns], ["---", *["---:"] * len(shown.columns)]]
    rows += shown.reset_index().to_numpy().tolist()
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any) -> str:
    return _plain(f"{value:.4g}" if isinstance(value, float | np.floating) else value)


def _plain(text: Any) -> str:
    """Write one line of Markdown that means itself: no markup, no table cell, no link."""
    line = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"[\\`*\[\]|#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
