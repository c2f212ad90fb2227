"""Answers of several models side by side: a widget for the lesson, and one HTML file that needs no other."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from rlhf_helpers.alignment_eval.evaluators import write_atomically

Answers = Mapping[str, Sequence[str]]
Scores = Mapping[str, Sequence[float]] | None
# In every cell, since a notebook's page brings no style of ours.
_CELL = 'style="border:1px solid #767676;padding:6px;text-align:left;vertical-align:top;white-space:pre-wrap"'
_HEAD = (
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    "<style>body{font-family:sans-serif;margin:2em;line-height:1.5}table{border-collapse:collapse}</style>"
)


class ComparisonPage(widgets.VBox):
    """Shows the answers to one prompt at a time, chosen in a list; all of them where there is no kernel."""

    def __init__(self, prompts: Sequence[str], answers: Answers, scores: Scores = None) -> None:
        """Check what is given and show the first prompt."""
        _check(prompts, answers, scores)
        self.given = (prompts, answers, scores)
        choices = [(f"{i + 1}. {' '.join(prompt.split())[:80]}", i) for i, prompt in enumerate(prompts)]
        self.chooser = widgets.Dropdown(options=choices, value=0, description="Prompt")
        self.view = widgets.HTML(_table(*self.given, rows=[0]))
        self.chooser.observe(lambda change: self.show(change["new"]), names="value")
        super().__init__([self.chooser, self.view])

    def show(self, index: int) -> None:
        """Show the answers to prompt `index`."""
        self.chooser.value = index
        self.view.value = _table(*self.given, rows=[index])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle["text/html"] = _table(*self.given)
        return bundle


def compare_page(prompts: Sequence[str], answers: Answers, *, scores: Scores = None) -> ComparisonPage:
    """Make a widget of the answers of several models (base, SFT, RL, best-of-n) to the same P prompts.

    answers: name -> P texts; scores: name -> P numbers, for some or all of the names, shown with their means.
    All text is escaped. Lesson 4. Raises ValueError where there is no prompt or name, a column has another
    length than P, a text is no text, or scores name somebody without answers.
    """
    return ComparisonPage(prompts, answers, scores)


def write_comparison(
    path: str | Path, prompts: Sequence[str], answers: Answers, *, scores: Scores = None,
    title: str = "Answers side by side", note: str = "", overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the same as one HTML file, a row a prompt, a column a model; returns its path.

    It holds its own style and no script, and its policy forbids the browser to fetch anything. note: a
    paragraph above the table: who answered, and how. Lesson 4. Raises FileExistsError where the file is there
    already and overwrite is not asked for, and ValueError as `compare_page`.
    """
    _check(prompts, answers, scores)
    path, title, note = Path(path), html.escape(title), html.escape(note)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: name another file or say overwrite=True")
    head = f'<!doctype html>\n<html lang="en"><head>{_HEAD}<title>{title}</title></head>\n'
    body = f"<body>\n<h1>{title}</h1>\n<p>{note}</p>\n{_table(prompts, answers, scores)}\n</body></html>\n"
    write_atomically(path, (head + body).encode())
    return path


def _table(
    prompts: Sequence[str], answers: Answers, scores: Scores, rows: Iterable[int] | None = None
) -> str:
    """The table of some rows, or of all and the means of their scores."""
    scores = scores or {}
    lines = [_row("prompt", [html.escape(name) for name in answers], "col")]
    for i in range(len(prompts)) if rows is None else rows:
        texts = {name: html.escape(column[i]) or "<em>(empty)</em>" for name, column in answers.items()}
        texts |= {name: f"{texts[name]}\n<small>[{float(scores[name][i]):.2f}]</small>" for name in scores}
        lines.append(_row(prompts[i], texts.values()))
    if scores and rows is None:
        means = {name: f"{float(sum(column)) / len(prompts):.2f}" for name, column in scores.items()}
        lines.append(_row("mean score", [means.get(name, "") for name in answers]))
    caption = f"<caption>Answers of {len(answers)} models, side by side</caption>"
    return f"<table>{caption}<thead>{lines[0]}</thead>\n<tbody>" + "\n".join(lines[1:]) + "</tbody></table>"


def _row(title: str, cells: Iterable[str], scope: str = "row") -> str:
    kind = 'th scope="col"' if scope == "col" else "td"
    inside = "".join(f"<{kind} {_CELL}>{cell}</{kind[:2]}>" for cell in cells)
    return f'<tr><th scope="{scope}" {_CELL}>{html.escape(title)}</th>{inside}</tr>'


def _check(prompts: Sequence[str], answers: Answers, scores: Scores) -> None:
    if isinstance(prompts, str) or not len(prompts) or not answers:
        raise ValueError(f"give at least one prompt and one name, got {prompts!r:.60} and {list(answers)}")
    for name, column in [("prompts", prompts), *answers.items()]:
        if isinstance(column, str) or len(column) != len(prompts):
            raise ValueError(f"{name!r} needs a text for each of {len(prompts)} prompts, got {column!r:.60}")
        for row, text in enumerate(column):
            if not isinstance(text, str):
                raise ValueError(f"{name!r}, row {row}, must be a text, got {text!r:.60}")
    for name, column in (scores or {}).items():
        if name not in answers or len(column) != len(prompts):
            raise ValueError(
                f"scores[{name!r}] needs that name in answers ({list(answers)}) and {len(prompts)} numbers"
            )
