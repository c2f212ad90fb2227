"""The edition for learners holds no answer, and what a class hands in is graded in a sandbox."""

import json
import re
from datetime import datetime
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_helpers.__main__ import main
from rlhf_helpers.lab.classroom import grading
from rlhf_helpers.lab.classroom.edition import points, student_edition, write_student_edition
from rlhf_helpers.lab.classroom.grading import grade, mistakes_figure, program_of
from rlhf_helpers.lab.classroom.worker import describe, restore
from rlhf_helpers.lab.exercises import NAMES
from rlhf_helpers.lab.isolation import Raised
from rlhf_helpers.lab.judging import same
from rlhf_helpers.lab.quizzes import questions

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```", re.S)
RIGHT = "def my_bradley_terry(chosen, rejected):\n    return -F.logsigmoid(chosen - rejected)"
CHECK = '\n\nbradley_terry = check("bradley_terry", my_bradley_terry)'


def text_of(notebook):
    return "\n".join(cell.source for cell in notebook.cells) + json.dumps(
        [cell.get("outputs", []) for cell in notebook.cells]
    )


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
class TestStudentEdition:
    def test_no_answer_is_left(self, path):
        lesson = nbformat.read(path, as_version=4)
        solutions = [text for cell in lesson.cells for text in SOLUTION.findall(cell.source)]
        text = text_of(student_edition(lesson))
        assert solutions
        assert not [code for code in solutions if code.strip() in text]
        assert set(re.findall("<summary>(.*?)</summary>", text)) <= {"Hint 1", "Hint 2", "Hint 3"}
        assert not [name for name, item in questions().items() if item["explanation"] in text]

    def test_each_exercise_has_one_graded_cell_that_cannot_be_edited(self, path):
        edition = student_edition(nbformat.read(path, as_version=4))
        graded = [cell for cell in edition.cells if "nbgrader" in cell.metadata]
        assert [cell.metadata.nbgrader.grade_id for cell in graded] == list(NAMES[int(path.name[:2])])
        for cell in graded:
            assert cell.metadata.nbgrader.grade
            assert cell.metadata.nbgrader.locked
            assert cell.metadata.nbgrader.points == 1
            assert cell.metadata.editable is False

    def test_the_lesson_itself_stays_as_it_is(self, path):
        lesson = nbformat.read(path, as_version=4)
        before = nbformat.writes(lesson)
        student_edition(lesson)
        assert nbformat.writes(lesson) == before


def test_nothing_is_overwritten(tmp_path):
    written = write_student_edition(tmp_path, ROOT / "notebooks")
    assert [path.name for path in written] == [path.name for path in LESSONS]
    written[2].write_text("a learner's work")
    with pytest.raises(FileExistsError, match=written[2].name):
        write_student_edition(tmp_path, ROOT / "notebooks")
    assert written[2].read_text() == "a learner's work"


def test_a_working_copy_keeps_the_answers(tmp_path):
    copies = write_student_edition(tmp_path, ROOT / "notebooks", answers=True)
    assert all("<summary>Solution</summary>" in copy.read_text(encoding="utf8") for copy in copies)


def test_the_course_of_nbgrader(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["student", "--out", str(tmp_path), "--nbgrader"]) == 0
    assert (tmp_path / "source" / "lesson_1" / "01_reward_modeling.ipynb").is_file()
    assert "timeout = 600" in (tmp_path / "nbgrader_config.py").read_text()


def test_without_lessons_the_error_says_where_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="root"):
        write_student_edition(tmp_path, tmp_path)


def test_points_are_one_for_a_right_function_only():
    def right(chosen, rejected):
        return -torch.nn.functional.logsigmoid(chosen - rejected)

    assert points("bradley_terry", right) == 1
    assert points("bradley_terry", lambda chosen, rejected: -right(chosen, rejected)) == 0
    assert points("bradley_terry", None) == 0


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([[1.0, float("nan")], [float("inf"), -2.0]]),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
        np.array([1.5, 2.0]),
        [1, (2.5, "three"), {"four": None}],
        Raised("ValueError", "no"),
        True,
    ],
)
def test_what_leaves_the_sandbox_comes_back_the_same(value):
    back = restore(json.loads(json.dumps(describe(value))))
    assert np.array_equal(back, value) if isinstance(value, np.ndarray) else same(back, value)


def test_an_object_of_another_kind_cannot_leave():
    assert restore(describe(object())) == Raised("TypeError", "a result of type object cannot be graded")


def test_a_program_holds_what_the_exercise_needs_and_nothing_else():
    above = [
        "import os\nimport torch.nn.functional as F\nSCALE = 2\nmodel = train_for_hours()",
        "%matplotlib inline\ndef helper(x):\n    return SCALE * x",
    ]
    cell = (
        "stage('lesson', 'section')\ndef my_fn(x):\n    return helper(F.relu(x))\n\n"
        "fn = check('bradley_terry', my_fn)"
    )
    program = program_of([*above, cell], "bradley_terry")
    assert "import torch.nn.functional as F" in program
    assert program.index("SCALE = 2") < program.index("def helper") < program.index("def my_fn")
    assert program.endswith("submitted = my_fn\n")
    assert not [text for text in ("train_for_hours", "import os", "check(", "stage(") if text in program]


def test_a_notebook_that_never_checks_an_exercise_lacks_it():
    with pytest.raises(LookupError):
        program_of(["def my_bradley_terry(): ...", "print('check')"], "bradley_terry")


SUBMISSIONS = {
    "right": RIGHT,
    "sign": "def my_bradley_terry(chosen, rejected):\n    return F.logsigmoid(chosen - rejected)",
    "detached": RIGHT + ".detach()",
    "untouched": "def my_bradley_terry(chosen, rejected):\n    raise NotImplementedError",
    "endless": "def my_bradley_terry(chosen, rejected):\n    while True:\n        pass",
    "deletes": "import os\ndef my_bradley_terry(chosen, rejected):\n    os.remove(VICTIM)",
    "network": "import socket\ndef my_bradley_terry(*args):\n    socket.create_connection(('127.0.0.1', 9))",
    "forks": "import os\ndef my_bradley_terry(*args):\n    while True:\n        os.fork()",
    "patches": (
        "import rlhf_helpers.lab.classroom.worker as worker\nworker.attempt = lambda *args: True\n"
        "worker.describe = lambda value: ['plain', True]\ndef my_bradley_terry(*args):\n    return True"
    ),
    "forges": (
        "import rlhf_helpers.lab.classroom.worker as worker\nworker.try_out = lambda name: {'outcomes': []}\n"
        "def my_bradley_terry(*args):\n    return True"
    ),
    "syntax": "def my_bradley_terry(chosen, rejected)\n    return 1",
    "exits": "import os\ndef my_bradley_terry(*args):\n    os._exit(0)",
}
EXPECTED = {
    "right": ("solved", "right"),
    "sign": ("wrong", "the minus is missing"),
    "detached": ("wrong", "no gradient reaches"),
    "untouched": ("open", "not attempted"),
    "endless": ("wrong", "timeout"),
    "deletes": ("wrong", "raised"),
    "network": ("wrong", "raised"),
    "forks": ("wrong", ""),
    "patches": ("wrong", "stopped"),
    "forges": ("wrong", "forged"),
    "syntax": ("wrong", "not Python"),
    "exits": ("wrong", ""),
}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Grades of one exercise handed in by twelve learners, the hostile among them; and a file to protect."""
    folder = tmp_path_factory.mktemp("class")
    victim = folder / "victim.txt"
    victim.write_text("still here")
    for learner, code in SUBMISSIONS.items():
        (folder / learner).mkdir()
        setup = f"import torch\nimport torch.nn.functional as F\nVICTIM = {str(victim)!r}"
        cells = [new_markdown_cell("# Lesson"), new_code_cell(setup), new_code_cell(code + CHECK)]
        nbformat.write(new_notebook(cells=cells), folder / learner / "01_reward_modeling.ipynb")
    (folder / "right" / "timestamp.txt").write_text("2026-12-01 09:30:00 UTC")
    (folder / "absent").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "SECONDS", 3.0)
        grades = grade(folder, due=datetime.fromisoformat("2026-12-01T09:00:00+00:00"), workers=1)
    return grades, victim


@pytest.mark.slow
class TestGrading:
    @pytest.mark.parametrize("learner", SUBMISSIONS)
    def test_each_submission_gets_its_state_and_a_reason(self, graded, learner):
        grades, _ = graded
        row = grades[(grades.learner == learner) & (grades.exercise == "bradley_terry")].iloc[0]
        state, reason = EXPECTED[learner]
        assert row.state == state
        assert reason in row.message
        assert row.points == int(state == "solved")

    def test_no_submission_reaches_a_file_outside(self, graded):
        assert graded[1].read_text() == "still here"

    def test_what_was_not_handed_in_is_missing(self, graded):
        grades, _ = graded
        assert set(grades[grades.learner == "absent"].state) == {"missing"}
        others = grades[(grades.learner == "right") & (grades.exercise != "bradley_terry")]
        assert set(others.state) == {"missing"}

    def test_late_is_judged_by_the_note_of_nbgrader(self, graded):
        grades, _ = graded
        assert grades[grades.learner == "right"].late.all()

    def test_the_picture_counts_each_mistake(self, graded):
        (axis,) = mistakes_figure(graded[0]).axes
        labels = [text.get_text() for text in axis.get_yticklabels()]
        assert any("the minus is missing" in label for label in labels)


def test_a_folder_without_learners_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="learner"):
        grade(tmp_path)
