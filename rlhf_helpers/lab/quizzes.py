"""Quizzes of the lessons: a person clicks an answer; on a page without a kernel the answer is folded away."""

import functools
import html
import json
from pathlib import Path
from typing import Any

from rlhf_helpers.lab.progress import MARKS, OPEN, load_states, record
from rlhf_helpers.lab.widgets import Choices

_QUESTIONS = Path(__file__).parents[1] / "assets" / "quizzes.json"


@functools.cache
def questions() -> dict[str, dict[str, Any]]:
    """Return every quiz by name.

    A quiz holds its question, options, answer (index of an option), explanation and, for each wrong option,
    why it is wrong.
    """
    return json.loads(_QUESTIONS.read_text(encoding="utf8"))


class Quiz(Choices):
    """One question; each click says whether the answer is right, and the first one is remembered."""

    def __init__(self, name: str) -> None:
        """Show the question with its options unmarked."""
        self.name, self.item = name, questions()[name]
        options = self.item["options"]
        super().__init__(self.item["question"], options, [OPEN] * len(options))

    def click(self, index: int) -> None:
        """Mark an answer and record it; a wrong one is explained without the solution, to be tried again."""
        is_right = index == self.item["answer"]
        state = "right at once" if is_right else "tried"
        if is_right and self.name in load_states()["quizzes"]:
            state = "right later"
        record("quizzes", self.name, state)
        marks = list(self.shown["marks"])
        marks[index] = MARKS[state]
        if is_right:
            self.show(marks, f"Right. {self.item['explanation']}")
        else:
            self.show(marks, f"Not right. {self.item['why_not'][index]} Try another answer.")

    def _static_html(self) -> str:
        item = self.item
        number = item["answer"] + 1
        options = "".join(f"<li>{html.escape(option)}</li>" for option in item["options"])
        right = f"<b>{number}. {html.escape(item['options'][number - 1])}.</b>"
        solution = f"{right} {html.escape(item['explanation'])}"
        # JupyterLab reads keys as commands ("dd" deletes a cell) unless the focused element itself says no.
        summary = "<summary data-lm-suppress-shortcuts='true'>Answer</summary>"
        return (
            f"<p><b>{html.escape(item['question'])}</b></p><ol>{options}</ol>"
            f"<details>{summary}{solution}</details>"
        )


def quiz(name: str) -> Quiz:
    """Show the question `name` with its options as buttons; the text lives in the package, not in the cell.

    Raises:
        ValueError: no quiz has this name; the message lists the names.
    """
    if name not in questions():
        raise ValueError(f"quiz: no quiz is named {name!r}; there are {', '.join(sorted(questions()))}")
    return Quiz(name)
