"""Exercise checks: show the verdict on a learner's function, and note it with the progress."""

import html
from collections.abc import Callable
from typing import Any

from IPython.display import display

from rlhf_helpers.lab.exercises import EXERCISES, LESSONS
from rlhf_helpers.lab.judging import Verdict, judge
from rlhf_helpers.lab.progress import MARKS, OPEN, Message, record, solved_so_far
from rlhf_helpers.lab.progress import progress as progress  # the lessons import it from here

# state of a verdict -> its mark and a color on which white text can be read
LOOKS = {
    "solved": (MARKS["solved"], "#0a7d33"),
    "wrong": (MARKS["tried"], "#c62828"),
    "open": (OPEN, "#616161"),
}


def check(name: str, my_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """Show the verdict on `my_fn`; return it when right, the package's function when open or wrong.

    Never stops the notebook: a crash of `my_fn` is reported in one line. Raises ValueError only for a name
    that no exercise has.
    """
    if name not in EXERCISES:
        raise ValueError(f"check: no exercise is named {name!r}; there are {', '.join(sorted(EXERCISES))}")
    exercise = EXERCISES[name]
    verdict = judge(exercise, my_fn)
    if verdict.state != "open":
        record("exercises", name, "solved" if verdict.state == "solved" else "tried")
    _show(name, verdict)
    return my_fn if verdict.state == "solved" else exercise.reference


def _show(name: str, verdict: Verdict) -> None:
    """Show a verdict by mark, color and text, and how much of the lesson is solved."""
    mark, color = LOOKS[verdict.state]
    notes = [solved_so_far(LESSONS[name])]
    if verdict.state != "solved":
        notes.append("The lesson goes on with the package's function; change yours and run this cell again.")
    sign = f"<b style='background: {color}; color: white; padding: 0 6px'>{mark}</b>"
    style = f"border-left: 4px solid {color}; padding-left: 8px"
    said = f"{sign} <b>{name}</b>: {html.escape(verdict.message)}<br>{' '.join(notes)}"
    page = f"<p class='rlhf-verdict' style='{style}'>{said}</p>"
    display(Message(page, "\n".join([f"{mark} {name}: {verdict.message}", *notes])))
