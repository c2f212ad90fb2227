"""A lesson as a teacher hands it out: without its answers, with one graded cell per exercise.

    python -m rlhf_helpers student --out DIR

What goes: solutions, every folded text but hints, stored outputs (they hold results and answers of quizzes).
What comes: a read-only cell below each exercise whose value is its points, with the metadata of nbgrader.
The installed package still contains every reference solution.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell

from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.judging import judge

CHECK = re.compile(r"\bcheck\(\s*[\"'](\w+)[\"']\s*,\s*(.+?)\s*\)\s*$", re.M)
_FOLDED = re.compile(r"<details>\s*<summary>(?P<title>.*?)</summary>.*?</details>\n?", re.S)
_POINTS = """\
from rlhf_helpers.lab.classroom.edition import points

points("{name}", {function})"""
# nbgrader's own time limit is 30 seconds per cell, and a lesson trains.
_CONFIG = """\
c = get_config()
c.CourseDirectory.course_id = "rlhf"
c.Execute.timeout = 600
"""


def points(name: str, my_fn: Callable[..., Any]) -> int:
    """Return the points for an exercise: 1 if the function is right, otherwise 0.

    nbgrader takes the value of a graded cell as its score. Without a value it would give full marks to a
    cell that merely raises nothing.

    Raises:
        KeyError: No exercise has this name.
    """
    return int(judge(EXERCISES[name], my_fn).state == "solved")


def student_edition(lesson: NotebookNode) -> NotebookNode:
    """Return a copy of a lesson without answers and outputs, with a graded cell below each exercise."""
    edition = nbformat.from_dict({**lesson, "cells": list(_student_cells(lesson))})
    nbformat.validate(edition)
    return edition


def _student_cells(lesson: NotebookNode) -> Iterator[NotebookNode]:
    for original in lesson.cells:
        cell = nbformat.from_dict(original)
        if cell.cell_type != "code":
            cell.source = _FOLDED.sub(_hint_or_nothing, cell.source)
            yield cell
            continue
        cell.outputs, cell.execution_count = [], None
        yield cell
        for name, function in CHECK.findall(cell.source):
            yield _graded_cell(name, function)


def _hint_or_nothing(folded: re.Match[str]) -> str:
    return folded[0] if folded["title"].startswith("Hint") else ""


def _graded_cell(name: str, function: str) -> NotebookNode:
    nbgrader = {
        "grade": True,
        "grade_id": name,
        "locked": True,
        "points": 1,
        "schema_version": 3,
        "solution": False,
        "task": False,
        "cell_type": "code",
    }
    return new_code_cell(
        _POINTS.format(name=name, function=function),
        id=f"graded-{name}".replace("_", "-"),
        metadata={"nbgrader": nbgrader, "editable": False, "deletable": False},
    )


def write_student_edition(
    out: Path, lessons: Path = Path("notebooks"), *, nbgrader: bool = False, answers: bool = False
) -> list[Path]:
    """Write the lessons for learners to a folder and return the files.

    Args:
        out: The folder.
        lessons: Where the lessons are.
        nbgrader: Lay the folder out as a course of nbgrader, source/lesson_1/01_....ipynb, with its
            configuration.
        answers: Copy the lessons as they are: a working copy, so that an update of the repository never meets
            a changed notebook.

    Raises:
        FileNotFoundError: The folder of the lessons holds none.
        FileExistsError: A file exists already; nothing is written, so that no learner's work is lost.
    """
    found = sorted(lessons.glob("0*.ipynb"))
    if not found:
        raise FileNotFoundError(f"no lesson in {lessons}: run this at the root of the repository")
    folders = {path: out / "source" / f"lesson_{int(path.name[:2])}" if nbgrader else out for path in found}
    written = {path: folder / path.name for path, folder in folders.items()}
    if existing := [str(target) for target in written.values() if target.exists()]:
        raise FileExistsError(
            f"{', '.join(existing)} exists: name another --out, or move your work away first"
        )
    for path, target in written.items():
        lesson = nbformat.read(path, as_version=4)
        target.parent.mkdir(parents=True, exist_ok=True)
        text = nbformat.writes(lesson if answers else student_edition(lesson))
        target.write_text(text + "\n", encoding="utf8")
    if nbgrader:
        (out / "nbgrader_config.py").write_text(_CONFIG, encoding="utf8")
    return list(written.values())
