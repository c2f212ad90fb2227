"""Lesson 1 goes through nbgrader: assign, autograde and feedback for three fake submissions.

Takes about ten minutes of processor time. nbgrader 0.9.6 is installed in an environment of its own:

    RLHF_NBGRADER=that/environment/bin python -m pytest -m nightly tests/notebooks/test_nbgrader.py
"""

import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from rlhf_helpers.lab.classroom.edition import write_student_edition
from rlhf_helpers.lab.quizzes import questions
from tests.unit.test_classroom import exercise_cells, right_options, solution_lines, with_solutions

ROOT = Path(__file__).parents[2]
LESSON = ROOT / "notebooks" / "01_reward_modeling.ipynb"
NBGRADER = shutil.which("nbgrader", path=os.environ.get("RLHF_NBGRADER", os.environ["PATH"]))
COMMANDS_S = 3_600  # all cells of three submissions, on a busy machine
SCORES = {"solved": 9.0, "wrong": 0.0, "untouched": 0.0}


def submissions(released):
    """The notebook that was handed out: with every printed solution, with wrong functions, and as it is."""
    solved = with_solutions(nbformat.read(LESSON, as_version=4))
    codes = [cell.source for cell, _ in exercise_cells(solved)]
    handed_in = {kind: nbformat.read(released, as_version=4) for kind in SCORES}
    for (cell, _), code in zip(exercise_cells(handed_in["solved"]), codes, strict=True):
        cell.source = code
    for cell, call in exercise_cells(handed_in["wrong"]):
        wrong = f"def {call[2]}(*args, **kwargs):\n    return 41\n"
        cell.source = f"{cell.source[: call.start()]}{wrong}{cell.source[call.start() :]}"
    return handed_in


def nbgrader(course, *arguments):
    """Run a command of nbgrader whose kernel is this Python, so that it can import the package."""
    kernel = course.parent / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "3", "language": "python"}))
    folders = [str(course.parent / "jupyter"), os.environ.get("JUPYTER_PATH", "")]
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("RLHF_MODEL", "RLHF_DATA")},
        "HF_HUB_OFFLINE": "1",
        "JUPYTER_PATH": os.pathsep.join(filter(None, folders)),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(NBGRADER).parent), os.environ["PATH"]]),  # it calls alembic
        "PYTHONPATH": str(ROOT),
        "RLHF_PROGRESS": "",
    }
    done = subprocess.run(
        [NBGRADER, *arguments],
        cwd=course,
        env=environment,
        capture_output=True,
        text=True,
        timeout=COMMANDS_S,
    )
    assert done.returncode == 0, done.stderr[-3_000:]


def text_of_page(path):
    """The text of a page, a line for each line, without the colors of code."""
    return html.unescape(re.sub("<[^>]+>", "", path.read_text(encoding="utf8")))


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(NBGRADER is None, reason="there is no nbgrader; RLHF_NBGRADER names the folder of it")
def test_three_submissions_of_lesson_1_get_their_scores_and_see_no_answer(tmp_path):
    course = tmp_path / "course"
    write_student_edition(course, ROOT / "notebooks", nbgrader=True)
    nbgrader(course, "generate_assignment", "lesson_1", "--create")
    handed_in = submissions(course / "release" / "lesson_1" / LESSON.name)
    for learner, notebook in handed_in.items():
        folder = course / "submitted" / learner / "lesson_1"
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / LESSON.name)
    nbgrader(course, "autograde", "lesson_1", "--create")
    nbgrader(course, "generate_feedback", "lesson_1")
    nbgrader(course, "export")
    with (course / "grades.csv").open(encoding="utf8") as file:
        scores = {row["student_id"]: (float(row["score"]), row["max_score"]) for row in csv.DictReader(file)}
    assert scores == {learner: (score, "9.0") for learner, score in SCORES.items()}
    solutions = solution_lines(nbformat.read(LESSON, as_version=4))
    explanations = [item["explanation"] for item in questions().values()]
    for learner in SCORES:
        page = text_of_page(course / "feedback" / learner / "lesson_1" / f"{LESSON.stem}.html")
        lines = {line.strip() for line in page.split("\n")}
        # Who handed in the solutions sees their own code.
        assert solutions & lines == (solutions if learner == "solved" else set())
        assert not [answer for answer in [*explanations, *right_options()] if answer in page]
