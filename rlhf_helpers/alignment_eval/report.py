"""An evaluation as a report: one HTML file that needs nothing else, and one of Markdown for a repository."""

import base64
import html
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from rlhf_helpers.alignment_eval.evaluators import weights_fingerprint
from rlhf_helpers.core.files import write_atomically

NAME = "alignment_report"
Tables = dict[str, pd.DataFrame | str]
LIBRARIES = ("rlhf-helpers", "torch", "transformers", "numpy", "scipy")
_PNG = b"\x89PNG\r\n\x1a\n"
_STYLE = (
    "body{font-family:sans-serif;max-width:60em;margin:2em auto;padding:0 1em;line-height:1.5}"
    "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.2em .6em;text-align:right}"
    "th:first-child{text-align:left}img{max-width:100%}"
)


@dataclass(frozen=True)
class ReportFigure:
    """A picture for a report: the bytes of a PNG, and what it shows in words."""

    png: bytes
    alt: str

    def __post_init__(self) -> None:
        """Raise ValueError where the bytes are not a PNG or the alt text is too short."""
        if not self.png.startswith(_PNG):
            raise ValueError(f"a figure must be a PNG, got {self.png[:8]!r}: see lab.reports.figure_png")
        if len(self.alt.split()) < 5:
            raise ValueError(f"alt={self.alt!r} must say in words what the figure shows (five at least)")


class AlignmentReportGenerator:
    """Writes results, pictures and what it takes to get the same numbers again. Lesson 3."""

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
        self,
        results: Mapping[str, pd.DataFrame | Mapping[str, Any] | str],
        *,
        figures: Sequence[ReportFigure] = (),
        out: str | Path,
        overwrite: bool = False,
    ) -> dict[str, Path]:
        """Write OUT/alignment_report.html, .md and the Markdown's figures.

        All text is escaped: an answer that holds markup is shown, not obeyed. Nothing is written unless all
        can be.

        Args:
            results: heading -> table (its index is shown), mapping name -> value, or a paragraph; numbers
                with four significant digits.
            figures: Pictures, in order.
            out: The folder.
            overwrite: Replace an older report.

        Returns:
            The two files: {"html", "markdown"}.

        Raises:
            FileExistsError: a file is there already and overwrite is not asked for.
            TypeError: a result is of another kind.
        """
        out = Path(out)
        sections = {**results, "Run manifest": self.manifest}
        tables = {heading: _as_table(heading, result) for heading, result in sections.items()}
        pictures = {f"{NAME}_figure_{i}.png": figure for i, figure in enumerate(figures, 1)}
        paths = {"html": out / f"{NAME}.html", "markdown": out / f"{NAME}.md"}
        files = {out / name: figure.png for name, figure in pictures.items()}
        files[paths["html"]] = self._html(tables, figures).encode()
        files[paths["markdown"]] = self._markdown(tables, pictures).encode()
        if not overwrite and (there := [str(path) for path in files if path.exists()]):
            raise FileExistsError(f"{', '.join(there)} exist: name another folder or say overwrite=True")
        for path, content in files.items():
            write_atomically(path, content)
        return paths

    def _html(self, tables: Tables, figures: Sequence[ReportFigure]) -> str:
        title = html.escape(self.title)
        parts = [f"<h1>{title}</h1>"]
        for heading, table in tables.items():
            if isinstance(table, str):
                shown = f"<p>{html.escape(table)}</p>"
            else:
                with pd.option_context("display.max_colwidth", None):  # pandas cuts texts at 50 letters
                    shown = table.to_html(border=0)
            parts.append(f"<h2>{html.escape(heading)}</h2>\n{shown}")
        for figure in figures:
            alt = html.escape(figure.alt)
            source = f"data:image/png;base64,{base64.b64encode(figure.png).decode()}"
            parts.append(f'<figure><img src="{source}" alt="{alt}"><figcaption>{alt}</figcaption></figure>')
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        body = "\n".join(parts)
        return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def _markdown(self, tables: Tables, pictures: Mapping[str, ReportFigure]) -> str:
        parts = [f"# {_plain(self.title)}"]
        for heading, table in tables.items():
            parts += [f"## {_plain(heading)}", _plain(table) if isinstance(table, str) else _pipes(table)]
        parts += [f"![{_plain(figure.alt)}]({name})" for name, figure in pictures.items()]
        return "\n\n".join(parts) + "\n"


def markdown_table(result: pd.DataFrame | Mapping[str, Any]) -> str:
    """A table, or name -> value, as Markdown: escaped, numbers with four significant digits. Lesson 4."""
    return _pipes(_as_table("table", result))


def _as_table(heading: str, result: Any) -> pd.DataFrame | str:
    """A table of texts, or a paragraph."""
    if isinstance(result, str):
        return result
    if isinstance(result, Mapping):
        result = pd.DataFrame({"value": dict(result)}, dtype=object)
    if not isinstance(result, pd.DataFrame):
        raise TypeError(f"results[{heading!r}] must be a DataFrame, a mapping or a text, got {type(result)}")
    return result.astype(object).map(_cell).rename(index=str, columns=str)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float | np.floating) else str(value)


def _plain(text: str) -> str:
    """One line of Markdown that means itself: no markup, no table cell, no link."""
    line = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"[\\`*\[\]|#]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def _pipes(table: pd.DataFrame) -> str:
    """Write a table of texts as Markdown, escaped; all columns but the first stand to the right."""
    shown = table.rename(index=_plain, columns=_plain).map(_plain)
    rows = [["", *shown.columns], ["---", *["---:"] * len(shown.columns)]]
    rows += shown.reset_index().to_numpy().tolist()
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
