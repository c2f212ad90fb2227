"""Progress: quizzes and checklists beside the exercises, the page over all lessons, visible verdicts."""

import json
import re

import pytest
from IPython.core.interactiveshell import InteractiveShell

from rlhf_helpers.lab import progress
from rlhf_helpers.lab.checks import check
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS, NAMES
from rlhf_helpers.lab.quizzes import questions, quiz
from rlhf_helpers.lab.widgets import Choices

SCRIPT = str(Choices._esm)
QUIZ = "baseline_effect"
ANSWER = questions()[QUIZ]["answer"]
WRONG = (ANSWER + 1) % len(questions()[QUIZ]["options"])


@pytest.fixture(autouse=True)
def progress_file(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv("RLHF_PROGRESS", str(path))
    monkeypatch.setattr(progress, "_unsaved", {})
    return path


def click(form, index):
    """Handle a click as it comes from the page."""
    content = {"data": {"method": "custom", "content": {"index": index}}}
    form._handle_msg({"content": content, "buffers": []})
    return form.get_state("shown")["shown"]


def saved(path):
    return json.loads(path.read_text(encoding="utf8"))


def test_a_quiz_answered_at_once(progress_file):
    shown = click(quiz(QUIZ), ANSWER)
    assert shown["message"].startswith("Right. The expected gradient")
    assert shown["marks"] == ["✓" if index == ANSWER else "○" for index in range(4)]
    assert saved(progress_file) == {"exercises": {}, "quizzes": {QUIZ: "right at once"}}
    click(quiz(QUIZ), WRONG)
    assert saved(progress_file)["quizzes"] == {QUIZ: "right at once"}  # the first answer counts


def test_a_wrong_answer_says_why_and_can_be_tried_again(progress_file):
    form = quiz(QUIZ)
    shown = click(form, WRONG)
    assert questions()[QUIZ]["why_not"][WRONG] in shown["message"]
    assert questions()[QUIZ]["options"][ANSWER] not in shown["message"]
    assert shown["marks"][WRONG] == "✗"
    assert saved(progress_file)["quizzes"] == {QUIZ: "tried"}
    shown = click(form, ANSWER)
    assert shown["marks"][WRONG] == "✗"
    assert shown["marks"][ANSWER] == "✓"
    assert saved(progress_file)["quizzes"] == {QUIZ: "right later"}


@pytest.mark.parametrize("index", [-1, 99, None, "0"])
def test_a_click_on_nothing_changes_nothing(index, progress_file):
    form = quiz(QUIZ)
    assert click(form, index)["message"] == ""
    assert not progress_file.exists()


def test_exercises_and_quizzes_share_one_file(progress_file):
    progress_file.write_text(
        '{"exercises": {"rloo": "solved"}}', encoding="utf8"
    )  # as older versions wrote it
    click(quiz(QUIZ), ANSWER)
    assert saved(progress_file) == {"exercises": {"rloo": "solved"}, "quizzes": {QUIZ: "right at once"}}
    check("dpo_loss", lambda *args: 0)
    assert saved(progress_file)["exercises"] == {"rloo": "solved", "dpo_loss": "tried"}


@pytest.mark.parametrize("text", ['{"exercises": {}, "quizzes": {"a": "solved"}}', '{"quizzes": {}}'])
def test_states_of_a_wrong_kind_are_kept_aside(text, progress_file, capsys):
    progress_file.write_text(text, encoding="utf8")
    assert progress.load_states()["quizzes"] == {}
    assert "was broken" in capsys.readouterr().out
    assert progress_file.with_name("progress.json.broken-0").read_text(encoding="utf8") == text


def test_a_missing_file_is_a_learner_who_has_done_nothing(progress_file):
    click(quiz(QUIZ), ANSWER)
    check("dpo_loss", EXERCISES["dpo_loss"].reference)
    progress_file.unlink()  # the next learner starts in the same kernel
    assert progress.load_states() == {"exercises": {}, "quizzes": {}, "checklists": {}}
    assert set(progress.progress().state) == {"open"}


def test_statements_can_be_ticked_and_unticked(progress_file):
    form = progress.Checklists()
    assert set(form.shown["marks"]) == {"☐"}
    assert click(form, 1)["marks"][:3] == ["☐", "☑", "☐"]
    assert form.shown["message"] == f"1 of {len(form.shown['labels'])} ticked."
    assert progress.Checklists().shown["marks"][1] == "☑"
    assert click(form, 1)["marks"][1] == "☐"
    assert set(saved(progress_file)["checklists"].values()) == {"not ticked"}


def test_every_statement_and_item_has_its_section():
    for lesson in progress.NOTEBOOKS:
        sections, _ = progress.code_cells(progress.find_lesson(progress.NOTEBOOKS[lesson]))
        statements = [s for s in progress.Checklists().statements.values() if s["lesson"] == lesson]
        assert len(statements) == 5
        assert {s["section"] for s in statements} <= set(sections)
        items = list(progress.items_of(lesson))
        assert [item.name for item in items if item.kind == "exercises"] == list(NAMES[lesson])
        assert {item.name for item in items if item.kind == "quizzes"} <= set(questions())
        assert {item.link.split("#")[1] for item in items} <= set(sections)


def test_the_page_counts_marks_and_says_what_comes_next():
    first, second = NAMES[1][:2]
    check(first, EXERCISES[first].reference)
    check(second, lambda *args: 0)
    page = progress.progress_page()
    assert re.search(rf"Next: <a href='01_reward_modeling\.ipynb#\w+'>{second}</a>", page)
    assert f"1 of {len(NAMES[1])} exercises solved, 0 of 4 quizzes right" in page
    for state, mark, name in (("solved", "✓", first), ("tried", "✗", second), ("open", "○", NAMES[1][2])):
        assert re.search(rf"<span title='{state}'>{mark}</span> <a href='[^']+'>{name}</a>", page)


def test_the_page_says_when_everything_is_done(monkeypatch):
    for name in LESSONS:
        progress.record("exercises", name, "solved")
    for name in questions():
        progress.record("quizzes", name, "right later")
    assert progress.progress_page().startswith("<p><b>Every exercise is solved")


def test_without_the_notebooks_the_exercises_are_listed_without_links(monkeypatch):
    monkeypatch.setattr(progress, "find_lesson", lambda lesson: (_ for _ in ()).throw(FileNotFoundError))
    page = progress.progress_page()
    assert "<a href='#" not in page
    assert all(name in page for name in LESSONS)


def test_progress_is_a_table_that_shows_a_page(monkeypatch):
    shown = []
    monkeypatch.setattr(progress, "display", shown.append)
    table = progress.progress()
    assert list(table.query("lesson == 1").exercise) == list(NAMES[1])
    assert type(table[table.lesson == 1]) is not type(table)  # a part of the table is shown as a table
    table._ipython_display_()
    assert shown[0]._repr_html_().startswith("<p><b>Next")
    assert "exercise" in repr(shown[0])
    assert repr(shown[1]) == "Checklists: Tick what you can do without looking it up."
    assert "01_reward_modeling.ipynb#problem" in shown[1]._repr_mimebundle_()[0]["text/html"]


@pytest.mark.parametrize(
    "answer, mark, color",
    [
        (EXERCISES["dpo_loss"].reference, "✓", "#0a7d33"),
        (lambda *args: 0, "✗", "#c62828"),
        (None, "○", "#616161"),
    ],
)
def test_a_verdict_has_mark_color_and_count(answer, mark, color, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr("rlhf_helpers.lab.checks.display", shown.append)
    check("dpo_loss", answer)
    page, plain = shown[0]._repr_html_(), repr(shown[0])
    assert f"background: {color}" in page
    assert mark in page
    assert plain.startswith(f"{mark} dpo_loss: ")
    count = f"{int(mark == '✓')} of {len(NAMES[2])} solved in lesson 2."
    assert count in page
    assert count in plain
    assert ("goes on with the package's function" in plain) is (mark != "✓")


def test_a_message_escapes_what_a_function_says(monkeypatch):
    shown = []
    monkeypatch.setattr("rlhf_helpers.lab.checks.display", shown.append)
    check("dpo_loss", lambda *args: {}["<script>"])
    assert "<script>" not in shown[0]._repr_html_()


def test_a_notebook_gets_both_texts():
    data, _ = InteractiveShell().display_formatter.format(progress.Message("<p>page</p>", "plain"))
    assert data["text/html"] == "<p>page</p>"
    assert data["text/plain"] == "plain"


def test_the_script_keeps_keys_from_the_notebook_and_sets_text_only():
    for node in ("root", "button"):
        assert f"keepKeys({node});" in SCRIPT
    made = set(re.findall(r'add\([^"]*"(\w+)"', SCRIPT))
    assert made == {"div", "p", "button"}, "keepKeys every other element that takes the focus"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", SCRIPT)
    assert 'setAttribute("role", "status")' in SCRIPT
    assert ":focus-visible" in Choices._css
