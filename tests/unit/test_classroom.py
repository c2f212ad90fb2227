"""The edition for learners holds no answer, and what a class hands in is graded in a sandbox."""

import json
import os
import re
import socket
import time
from datetime import datetime
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_helpers.__main__ import main
from rlhf_helpers.lab.classroom import grading
from rlhf_helpers.lab.classroom.edition import points, student_edition, write_student_edition
from rlhf_helpers.lab.classroom.grading import SELF_REPORTED, grade, judge_result, program_of
from rlhf_helpers.lab.classroom.report import class_report
from rlhf_helpers.lab.classroom.worker import describe, restore
from rlhf_helpers.lab.exercises import EXERCISES, NAMES
from rlhf_helpers.lab.isolation import Raised
from rlhf_helpers.lab.judging import same
from rlhf_helpers.lab.quizzes import questions
from rlhf_helpers.sandbox import SandboxResult

ROOT = Path(__file__).parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>.*?```python\n(.*?)```", re.S)
RIGHT = "def my_bradley_terry(chosen, rejected):\n    return -F.logsigmoid(chosen - rejected)"
CHECK = re.compile(r"^.*\bcheck\(\s*[\"'](\w+)[\"']\s*,\s*(\w+)\s*\)", re.M)
CALL = '\n\nbradley_terry = check("bradley_terry", my_bradley_terry)'
# Lines of a solution that the student edition shows although no stub holds them, and why.
GIVEN = {
    "optimizer.zero_grad()": "the loop above the exercise on one step holds it",
    "optimizer.step()": "the loop above the exercise on one step holds it",
    "rewards = []": "the slow loss that the exercise is to repair",
    "for answers in (chosen, rejected):": "the slow loss that the exercise is to repair",
    "width = max(len(answer) for answer in answers)": "the slow loss that the exercise is to repair",
    "ids = torch.tensor([answer + [pad_id] * (width - len(answer)) for answer in answers])": "the same",
    "loss.backward()": "every training loop of lesson 2 holds it",
    "for row in findings:": "a loop further down",
    "try:": "a keyword",
}


def text_of(notebook):
    """Sources as they read, and all else that the file holds: outputs, metadata, attachments."""
    rest = [{key: part for key, part in cell.items() if key != "source"} for cell in notebook.cells]
    return "\n".join([*(cell.source for cell in notebook.cells), json.dumps([rest, notebook.metadata])])


def solutions_of(lesson):
    """The code of every printed solution."""
    return [code for cell in lesson.cells for code in SOLUTION.findall(cell.source)]


def solution_lines(lesson):
    """Lines of the solutions that neither the stub of their exercise nor GIVEN holds."""
    stubs = "\n".join(cell.source for cell in lesson.cells if CHECK.search(cell.source)).split("\n")
    known = {line.strip() for line in stubs} | set(GIVEN)
    lines = {line.strip() for code in solutions_of(lesson) for line in code.split("\n")}
    return {line for line in lines - known if re.search(r"\w", line)}


def right_options():
    """The right option of each quiz; a single word ("Up") stands anywhere in a text."""
    options = [item["options"][item["answer"]] for item in questions().values()]
    return [option for option in options if " " in option]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
class TestStudentEdition:
    def test_no_answer_is_left(self, path):
        lesson = nbformat.read(path, as_version=4)
        edition = student_edition(lesson)
        text = text_of(edition)
        lines = {line.strip() for cell in edition.cells for line in cell.source.split("\n")}
        assert len(solution_lines(lesson)) >= 20
        assert not solution_lines(lesson) & lines
        assert not [code for code in solutions_of(lesson) if code.strip() in text]
        assert not [option for option in right_options() if option in text]
        assert set(re.findall("<summary.*?>(.*?)</summary>", text)) <= {"Hint 1", "Hint 2", "Hint 3"}
        assert text.count("<details") == text.count("<summary>Hint")
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

    def test_slides_start_where_they_did(self, path):
        lesson = nbformat.read(path, as_version=4)
        types = {cell.id: cell.metadata.get("slideshow") for cell in student_edition(lesson).cells}
        assert any(types.values())
        assert all(types[cell.id] == cell.metadata.get("slideshow") for cell in lesson.cells)

    def test_the_lesson_itself_stays_as_it_is(self, path):
        lesson = nbformat.read(path, as_version=4)
        before = nbformat.writes(lesson)
        student_edition(lesson)
        assert nbformat.writes(lesson) == before


def test_the_minutes_of_the_plans_are_those_of_the_lessons():
    text = (ROOT / ".github" / "TEACHING.md").read_text(encoding="utf8")
    plan = re.findall(r"lesson (\d), sections? (\d+)(?: to (\d+))? \((\d+) min\)", text)
    assert len(plan) >= 16
    minutes_of = {}
    for lesson, path in enumerate(LESSONS, 1):
        for cell in nbformat.read(path, as_version=4).cells:
            if section := re.match(r"## (\d+)\. .*?(\d+) minutes", cell.source, re.S):
                minutes_of[lesson, int(section[1])] = int(section[2])
    for lesson, first, last, minutes in plan:
        sections = range(int(first), int(last or first) + 1)
        assert sum(minutes_of[int(lesson), number] for number in sections) == int(minutes), lesson


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
        torch.tensor([1.5], dtype=torch.bfloat16),
        np.array([1.5, 2.0]),
        np.zeros(0),
        [float("inf"), 10**30, torch.Size([2, 3])],
        [1, (2.5, "three"), {"four": None}],
        Raised("ValueError", "no"),
        True,
    ],
)
def test_what_leaves_the_sandbox_comes_back_the_same(value):
    back = restore(describe(value))
    assert np.array_equal(back, value) if isinstance(value, np.ndarray) else same(back, value)


def test_an_object_of_another_kind_cannot_leave():
    assert restore(describe(object())) == Raised("TypeError", "a result of type object cannot be graded")


def test_a_complex_tensor_cannot_leave():
    outcome = restore(describe({"outcomes": [torch.zeros(2, dtype=torch.complex64)]}))["outcomes"][0]
    assert outcome == Raised("TypeError", "a result of type Tensor cannot be graded")


FORGED = {
    "huge number": '{"given": {"tensor": [1%s], "dtype": "float32", "shape": [1]}}' % ("0" * 400),
    "other shape": '{"given": {"tensor": [1], "dtype": "float32", "shape": [2]}}',
    "no dtype": '{"given": {"tensor": [1], "dtype": "none", "shape": [1]}}',
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("values", FORGED.values(), ids=FORGED)
def test_a_forged_outcome_is_wrong_and_stops_nobody(values):
    found = judge_result("bradley_terry", SandboxResult("ok", values=(values,)))
    assert found.state == "wrong"
    assert found.message.startswith("stopped (forged)")


def test_a_message_can_be_written_and_is_short(tmp_path, monkeypatch):
    (tmp_path / "ada").mkdir()
    cell = new_code_cell("def my_fn(*args):\n    return 1\n\ncheck('bradley_terry', my_fn)")
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "ada" / LESSONS[0].name)
    each = len(EXERCISES["bradley_terry"].probes)
    for text in ("half \ud800", "a" * 100_000):
        outcomes = {"outcomes": [Raised("ValueError", text)] * each, "faults": [], "gradients": [None] * each}
        for tried in (outcomes, {"given": text}):
            result = SandboxResult("ok", values=(describe(tried),))
            monkeypatch.setattr(grading, "run_programs", lambda *args, one=result, **kwargs: [one])
            row = grade(tmp_path).set_index("exercise").loc["bradley_terry"]
            assert row.state == "wrong"
            assert len(row.message.encode("utf8")) <= grading.MAX_MESSAGE


def test_a_program_holds_what_the_exercise_needs_and_nothing_else():
    above = [
        "import os\nimport torch.nn.functional as F\nSCALE = 2\nmodel = train_for_hours()",
        "%matplotlib inline\ndef helper(x):\n    return SCALE * x",
    ]
    cell = (
        "stage('lesson', 'section')\nview = live(steps=3)\ntable = {}\ntable['a'] = make(1)\n\n"
        "def my_fn(x):\n    return helper(F.relu(x)) + table['a']\n\nprint(my_fn(2))\n"
        "fn = check('bradley_terry', my_fn)\nvalues = fn(model)"
    )
    program = program_of([*above, cell], "bradley_terry")
    assert "import torch.nn.functional as F" in program
    assert program.index("SCALE = 2") < program.index("def helper") < program.index("def my_fn")
    assert program.index("table['a'] = make(1)") < program.index("def my_fn")
    assert program.endswith("submitted = my_fn\n")
    left_out = ("train_for_hours", "import os", "check(", "stage(", "live(", "print(", "fn(model)")
    assert not [text for text in left_out if text in program]


def test_the_last_definition_above_counts():
    above = ["SCALE = 2\ndef my_fn(x):\n    raise NotImplementedError", "SCALE = 3", "def my_fn(:"]
    program = program_of([*above, "def my_fn(x):\n    return SCALE\n\ncheck('k3', my_fn)"], "k3")
    assert [line for line in program.split("\n") if "SCALE" in line] == ["SCALE = 3", "    return SCALE"]
    assert "NotImplementedError" not in program


def with_solutions(lesson):
    """The edition for learners with every printed solution pasted in."""
    codes, edition = solutions_of(lesson), student_edition(lesson)
    for cell, call in exercise_cells(edition):
        starts = re.compile(rf"^(def {call[2]}\b|{call[2]} = )", re.M)
        (code,) = [code for code in codes if starts.search(code)]
        cell.source = f"{cell.source[: call.start()]}{code}\n{cell.source[call.start() :]}"
    return edition


def exercise_cells(edition):
    """Each cell that holds a stub, with the match of its check."""
    calls = [(cell, CHECK.search(cell.source)) for cell in edition.cells if cell.cell_type == "code"]
    return [(cell, call) for cell, call in calls if call and "nbgrader" not in cell.metadata]


@pytest.mark.slow
def test_every_printed_solution_earns_its_point_and_every_stub_is_open(tmp_path):
    for make in (with_solutions, student_edition):
        (tmp_path / make.__name__).mkdir()
        for path in LESSONS:
            edition = make(nbformat.read(path, as_version=4))
            nbformat.write(edition, tmp_path / make.__name__ / path.name)
    grades = grade(tmp_path, workers=1)
    states = grades.groupby("learner")["state"].agg(list)
    count = sum(map(len, NAMES.values()))
    assert states.to_dict() == {"with_solutions": ["solved"] * count, "student_edition": ["open"] * count}
    assert not grades.message.str.contains("tried to").any()


@pytest.mark.nightly
@pytest.mark.slow
def test_thirty_different_copies_are_graded_in_two_minutes(tmp_path):
    solved = with_solutions(nbformat.read(LESSONS[0], as_version=4))
    cells = [cell for cell, _ in exercise_cells(solved)]
    sources = [cell.source for cell in cells]
    for number in range(30):
        for cell, source in zip(cells, sources, strict=True):
            name = CHECK.search(source)[2]
            # The sandbox runs equal programs once, so each copy needs code of its own.
            cell.source = re.sub(rf"^(def {name}\b|{name} = )", rf"COPY = {number}\n\1", source, flags=re.M)
            cell.source += f"\nassert COPY == {number}"
        (tmp_path / f"learner {number:02}").mkdir()
        nbformat.write(solved, tmp_path / f"learner {number:02}" / LESSONS[0].name)
    idle = os.getloadavg()[0] < 1
    start, used = time.monotonic(), sum(os.times()[:4])  # children included
    grades = grade(tmp_path, workers=2)
    seconds, used = time.monotonic() - start, sum(os.times()[:4]) - used
    print(f"30 copies of {LESSONS[0].name}: {seconds:.0f} s, {used:.0f} s of processor time")
    assert grades.groupby("learner").points.sum().tolist() == [len(NAMES[1])] * 30
    assert used < 2 * 120, "on two cores"
    assert seconds < 120 or not idle


def test_a_notebook_that_never_checks_an_exercise_lacks_it():
    with pytest.raises(LookupError):
        program_of(["def my_bradley_terry(): ...", "print('check')"], "bradley_terry")


def test_a_notebook_cannot_keep_the_grader_busy():
    many = "\n".join(f"def f{i}(): return f{i + 1}" for i in range(4_000))
    with pytest.raises(ValueError, match="too many"):
        program_of([many, "def my_fn(): return f0()\n\ncheck('k3', my_fn)"], "k3")


SUBMISSIONS = {
    "right": RIGHT,
    "sign": "def my_bradley_terry(chosen, rejected):\n    return F.logsigmoid(chosen - rejected)",
    "detached": RIGHT + ".detach()",
    "untouched": "def my_bradley_terry(chosen, rejected):\n    raise NotImplementedError",
    "endless": "def my_bradley_terry(chosen, rejected):\n    while True:\n        pass",
    "deletes": "import os\ndef my_bradley_terry(chosen, rejected):\n    os.remove(VICTIM)",
    "network": "import socket\ndef my_bradley_terry(*args):\n    socket.create_connection(LISTENER)",
    "starts": "import subprocess\ndef my_bradley_terry(*args):\n    subprocess.run(['true'])",
    "secretly": (
        "import os, socket\n\ndef attempt(function, *args):\n    try:\n        function(*args)\n"
        "    except Exception:\n        pass\n\n"
        + RIGHT.replace(
            "    return",
            "    attempt(os.remove, VICTIM)\n    attempt(socket.create_connection, LISTENER)\n    return",
        )
    ),
    "replaces": (
        "from rlhf_helpers.lab.classroom import worker\nfrom rlhf_helpers.lab.judging import attempt\n"
        "worker.attempt = lambda exercise, function: attempt(exercise, exercise.reference)\n"
        "def my_bradley_terry(*args):\n    return worker"
    ),
    "forks": "import os\ndef my_bradley_terry(*args):\n    while True:\n        os.fork()",
    "patches": (
        "import rlhf_helpers.lab.classroom.worker as worker\nworker.attempt = lambda *args: True\n"
        "worker.describe = lambda value: 'true'\n"
        "def my_bradley_terry(*args):\n    return bool(worker)"
    ),
    "forges": (
        "import rlhf_helpers.lab.classroom.worker as worker\nworker.try_out = lambda name: '{}'\n"
        "def my_bradley_terry(*args):\n    return bool(worker)"
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
    "deletes": ("wrong", "tried to delete a file; not right yet: your function raised"),
    "network": ("wrong", "tried to open a socket; not right yet: your function raised"),
    "starts": ("wrong", "tried to start processes; "),
    "secretly": ("solved", "tried to delete a file and open a socket; right. Well done!"),
    "replaces": ("wrong", "tried to change the grader; not right yet: the values are right"),
    "forks": ("wrong", "tried to start processes; "),
    "patches": ("wrong", "tried to change the grader; stopped"),
    "forges": ("wrong", "tried to change the grader; stopped (forged)"),
    "syntax": ("wrong", "the code cannot be read"),
    "exits": ("wrong", "raised SystemExit: it would end the kernel"),
}


# The progress files that some of them handed in beside it.
REPORTS = {
    "right": '{"exercises": {}, "quizzes": {"reward_offset": "right at once", "baseline_effect": "tried"}}',
    "sign": '{"exercises": {}, "quizzes": {"reward_offset": "tried", "why_a_reward_model": "right later"}}',
    "detached": '{"exercises": {}}',
    "untouched": '{"exercises": {}, "quizzes": {"reward_offset": "=HYPERLINK(0)"}}',
    "forks": "[" * 100_000,
    "exits": "<script>",
}
LEARNERS = len(SUBMISSIONS) + 1  # and one who handed in nothing
DUE = datetime.fromisoformat("2026-12-01T09:00:00+00:00")
UNREADABLE = {"untouched", "forks", "exits", "endless"}


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """Grades of one exercise that many handed in, the hostile among them; a file and a port to protect."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    folder = tmp_path_factory.mktemp("class")
    victim = folder / "victim.txt"
    victim.write_text("still here")
    for learner, code in SUBMISSIONS.items():
        (folder / learner).mkdir()
        setup = f"import torch\nimport torch.nn.functional as F\nVICTIM = {str(victim)!r}"
        setup += f"\nLISTENER = {listener.getsockname()}"
        cells = [new_markdown_cell("# Lesson"), new_code_cell(setup), new_code_cell(code + CALL)]
        path = folder / learner / "01_reward_modeling.ipynb"
        nbformat.write(new_notebook(cells=cells), path)
        os.utime(path, (DUE.timestamp() - 60, DUE.timestamp() - 60))
    (folder / "right" / "timestamp.txt").write_text("2026-12-01 09:30:00 UTC")
    (folder / "sign" / "timestamp.txt").write_text("tomorrow")
    (folder / "absent").mkdir()
    for learner, text in REPORTS.items():
        (folder / learner / ".rlhf_progress.json").write_text(text)
    (folder / "endless" / ".rlhf_progress.json").symlink_to(folder / "right" / ".rlhf_progress.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grading, "SECONDS", 3.0)
        grades = grade(folder, due=DUE, workers=1)
    yield grades, victim, listener
    listener.close()


@pytest.mark.slow
class TestGrading:
    @pytest.mark.parametrize("learner", SUBMISSIONS)
    def test_each_submission_gets_its_state_and_a_reason(self, graded, learner):
        grades = graded[0]
        row = grades[(grades.learner == learner) & (grades.exercise == "bradley_terry")].iloc[0]
        state, reason = EXPECTED[learner]
        assert row.state == state
        assert reason in row.message
        assert row.points == int(state == "solved")

    def test_no_submission_reaches_a_file_outside(self, graded):
        assert graded[1].read_text() == "still here"

    def test_no_submission_reaches_a_port(self, graded):
        with pytest.raises(BlockingIOError):  # nobody has knocked
            graded[2].accept()

    def test_the_report_names_an_attempt_also_of_a_solved_exercise(self, graded):
        page = class_report(graded[0])
        for attempt, count in {
            "delete a file and open a socket": 1,
            "start processes": 2,
            "change the grader": 3,
        }.items():
            assert re.search(f"bradley_terry: tried to {attempt}<.*>{count} of {LEARNERS}<", page)

    def test_what_was_not_handed_in_is_missing(self, graded):
        grades = graded[0]
        assert set(grades[grades.learner == "absent"].state) == {"missing"}
        exercises = grades[grades.state != SELF_REPORTED]
        others = exercises[(exercises.learner == "right") & (exercises.exercise != "bradley_terry")]
        assert set(others.state) == {"missing"}

    def test_late_is_judged_by_the_note_of_nbgrader(self, graded):
        grades = graded[0]
        assert grades[grades.learner == "right"].late.all()
        assert not grades[grades.learner != "right"].late.any()

    def test_quiz_answers_are_self_reported_and_earn_nothing(self, graded):
        grades = graded[0]
        quizzes = grades[grades.state == SELF_REPORTED]
        assert quizzes.points.isna().all()
        assert grades[grades.state != SELF_REPORTED].points.notna().all()
        answers = quizzes.pivot(index="learner", columns="exercise", values="message")
        assert set(answers.index) == set(REPORTS) | UNREADABLE
        assert answers.loc["right", "reward_offset"] == "right at once"
        assert answers.loc["right", "why_a_reward_model"] == "not answered"
        assert "baseline_effect" not in answers  # a quiz of lesson 2
        assert answers.loc["sign", ["reward_offset", "why_a_reward_model"]].tolist() == [
            "tried",
            "right later",
        ]
        assert set(answers.loc["detached"].dropna()) == {"not answered"}

    def test_a_broken_progress_file_is_named_and_touched_by_nobody(self, graded):
        grades, victim, _ = graded
        broken = grades[(grades.exercise == "quizzes")]
        assert set(broken.learner) == UNREADABLE
        assert broken.message.str.startswith("the progress file cannot be read").all()
        assert not broken.message.str.contains("HYPERLINK|script").any()
        assert {p.name for p in (victim.parent / "exits").iterdir()} == {
            "01_reward_modeling.ipynb",
            ".rlhf_progress.json",
        }

    def test_the_report_shows_solved_mistakes_absence_and_quizzes(self, graded):
        page = class_report(graded[0])
        assert "<th scope='row'>Lesson 1: bradley_terry</th>" in page
        assert f"2 of {LEARNERS}" in page  # solved
        assert "bradley_terry: the minus is missing" in page
        assert "Lesson 1, missing (1): absent" in page
        assert "Lesson 1, late (1): right" in page
        assert "Points: 1% of all" in page
        question = questions()["reward_offset"]["question"]
        assert re.search(re.escape(question) + ".{,90}50%.{,40}1 of 2<", page)
        assert page.index(questions()["why_a_reward_model"]["question"]) < page.index(question)
        assert not re.search("https?:|src=|<script", page)


def test_what_learners_wrote_cannot_become_a_part_of_the_report():
    hostile = "<img src=x onerror=alert(1)>"
    rows = [(hostile, 1, "bradley_terry", "wrong", 0, f"your function raised {hostile}", True)]
    columns = ["learner", "lesson", "exercise", "state", "points", "message", "late"]
    page = class_report(pd.DataFrame(rows, columns=columns))
    assert "<img" not in page
    assert page.count("&lt;img") == 2


def test_equal_mistakes_count_as_one_whatever_values_they_have():
    rows = [
        (learner, 1, "bradley_terry", "wrong", 0, f"not right yet: {message}", False)
        for learner, message in {
            "ada": "with x = [1\n2] (shape (2,)) expected 3, got 4.",
            "bob": "with x = [1\n2] (shape (2,)) expected 3, got 5.",
            "eva": "your function raised ValueError: no (with x = 1).",
        }.items()
    ]
    columns = ["learner", "lesson", "exercise", "state", "points", "message", "late"]
    page = class_report(pd.DataFrame(rows, columns=columns))
    assert re.search("bradley_terry: a wrong result that fits no known mistake<.*2 of 3<", page)
    assert "bradley_terry: your function raised ValueError: no</th>" in page


def test_a_class_without_a_mistake_or_a_quiz_has_a_report():
    rows = [("ada", 1, "bradley_terry", "solved", 1, "right. Well done!", False)]
    columns = ["learner", "lesson", "exercise", "state", "points", "message", "late"]
    page = class_report(pd.DataFrame(rows, columns=columns))
    assert page.count("<p>None.</p>") == 2
    assert "late (0): none" in page


@pytest.mark.slow
def test_the_command_writes_the_table_and_the_report(tmp_path, capsys):
    (tmp_path / "class" / "ada").mkdir(parents=True)
    cell = new_code_cell("def my_bradley_terry(*args):\n    return 1" + CALL)
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "class" / "ada" / LESSONS[0].name)
    out, report = tmp_path / "grades.csv", tmp_path / "class.html"
    assert main(["grade", str(tmp_path / "class"), "--out", str(out), "--report", str(report)]) == 0
    assert "ada" in capsys.readouterr().out
    assert pd.read_csv(out).set_index("exercise").state["bradley_terry"] == "wrong"
    assert "<h1>Class report</h1>" in report.read_text(encoding="utf8")


def test_a_folder_without_learners_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="learner"):
        grade(tmp_path)
