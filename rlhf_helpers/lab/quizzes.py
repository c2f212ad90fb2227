"""Quizzes of the lessons: each question is shown with its options, and the answer is folded away."""

import functools
import html
import json
from pathlib import Path
from typing import Any

from IPython.display import HTML

_QUESTIONS = Path(__file__).parents[1] / "assets" / "quizzes.json"


@functools.cache
def questions() -> dict[str, dict[str, Any]]:
    """Return every quiz by name: its question, options, answer (index of an option) and explanation."""
    return json.loads(_QUESTIONS.read_text(encoding="utf8"))


def quiz(name: str) -> HTML:
    """Show the question `name` with numbered options; the answer and its explanation are folded away.

    The text lives in the package, so that a cell of a lesson does not give the answer away.

    Raises:
        ValueError: no quiz has this name; the message lists the names.
    """
    if name not in questions():
        raise ValueError(f"quiz: no quiz is named {name!r}; there are {', '.join(sorted(questions()))}")
    item = questions()[name]
    number = item["answer"] + 1
    options = "".join(f"<li>{html.escape(option)}</li>" for option in item["options"])
    right = f"<b>{number}. {html.escape(item['options'][number - 1])}.</b>"
    solution = f"{right} {html.escape(item['explanation'])}"
    # JupyterLab reads keys as commands ("dd" deletes a cell) unless the focused element itself says no.
    summary = "<summary data-lm-suppress-shortcuts='true'>Answer</summary>"
    return HTML(
        f"<p><b>{html.escape(item['question'])}</b></p><ol>{options}</ol>"
        f"<details>{summary}{solution}</details>"
    )
