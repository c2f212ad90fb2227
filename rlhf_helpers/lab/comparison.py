"""Answers of several models side by side: a table for the lesson, and one HTML file that needs no other."""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from IPython.display import HTML

from rlhf_helpers.core.files import write_atomically

Answers = Mapping[str, Sequence[str]]
Scores = Mapping[str, Sequence[float]] | None
# In every cell, since a notebook's page brings no style of ours.
_CELL = 'style="border:1px solid #767676;padding:6px;text-align:left;vertical-align:top;white-space:pre-wrap"'
_HEAD = (
    '<!doctype html>\n<html lang="en"><head><title>Answers side by side</title>'
    '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    "<style>:root{color-scheme:light dark}body{font-family:sans-serif;margin:2em;line-height:1.5}"
    "table{border-collapse:collapse}th,td{overflow-wrap:anywhere}</style>"
    "</head>\n<body>\n"
)


def compare_page(prompts: Sequence[str], answers: Answers, *, scores: Scores = None) -> HTML:
    """Show the answers of several models (base, SFT, RL, best-of-n) to the same P prompts as one table.

    All text is escaped, and nothing in the table takes the keyboard away from the notebook. Lesson 4.

    Args:
        answers: name -> P texts.
        scores: name -> P numbers, for some or all of the names, shown with their means.

    Raises:
        ValueError: there is no prompt or name, a column has another length than P, a text is not a text, or
            scores have a name that answers lack.
    """
    return HTML(_table(prompts, answers, scores))


def write_comparison(
    path: str | Path,
    prompts: Sequence[str],
    answers: Answers,
    *,
    scores: Scores = None,
) -> Path:
    """Write the same table as one HTML file, with a row per prompt and a column per model; return its path.

    It holds its own style and no script, and its policy forbids the browser to fetch anything. Lesson 4.

    Raises:
        FileExistsError: The file is there already.
        ValueError: As `compare_page`.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists: name another file or delete it")
    page = f"{_HEAD}<h1>Answers side by side</h1>\n{_table(prompts, answers, scores)}\n</body></html>\n"
    write_atomically(path, page.encode())
    return path


def _table(prompts: Sequence[str], answers: Answers, scores: Scores) -> str:
    """Check what is given; return a table with one row per prompt, and the means of the scores."""
    scores = scores or {}
    _check(prompts, answers, scores)
    lines = [_row("prompt", [html.escape(name) for name in answers], "col")]
    for i in range(len(prompts)):
        texts = {name: html.escape(column[i]) or "<em>(empty)</em>" for name, column in answers.items()}
        texts |= {name: f"{texts[name]}\n<small>[{float(scores[name][i]):.2f}]</small>" for name in scores}
        lines.append(_row(prompts[i], texts.values()))
    if scores:
        means = {name: f"{float(sum(column)) / len(prompts):.2f}" for name, column in scores.items()}
        lines.append(_row("mean score", [means.get(name, "") for name in answers]))
    caption = f"<caption>Answers of {len(answers)} models, side by side</caption>"
    return f"<table>{caption}<thead>{lines[0]}</thead>\n<tbody>" + "\n".join(lines[1:]) + "</tbody></table>"


def _row(title: str, cells: Iterable[str], scope: str = "row") -> str:
    kind = 'th scope="col"' if scope == "col" else "td"
    inside = "".join(f"<{kind} {_CELL}>{cell}</{kind[:2]}>" for cell in cells)
    return f'<tr><th scope="{scope}" {_CELL}>{html.escape(title)}</th>{inside}</tr>'


def _check(prompts: Sequence[str], answers: Answers, scores: Mapping[str, Sequence[float]]) -> None:
    if isinstance(prompts, str) or not len(prompts) or not answers:
        raise ValueError(f"give at least one prompt and one name, got {prompts!r:.60} and {list(answers)}")
    for name, column in [("prompts", prompts), *answers.items()]:
        texts = not isinstance(column, str) and all(isinstance(text, str) for text in column)
        if not texts or len(column) != len(prompts):
            raise ValueError(f"{name!r} needs a text for each of {len(prompts)} prompts, got {column!r:.60}")
    for name, column in scores.items():
        if name not in answers or len(column) != len(prompts):
            raise ValueError(
                f"scores[{name!r}] needs that name in answers ({list(answers)}) and {len(prompts)} numbers"
            )
