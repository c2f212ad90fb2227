"""The estimate of a lesson's hours: its rules on made-up cells, and the limit for each core."""

import json

import pandas as pd
import pytest

from tests.notebooks.hours import NOTEBOOKS, cell_minutes, core_hours, sections

# The promise of the guide.
CORE_HOURS = {
    "01_reward_modeling": 5.0,
    "02_policy_optimization": 5.0,
    "03_alignment_and_safety": 4.0,
    "04_applications": 4.0,
}
# What a reader can oversee: at most this many cells, of text and of code.
CORE_CELLS = dict(zip(CORE_HOURS, (120, 160, 160, 120), strict=True))


def markdown(source):
    return {"cell_type": "markdown", "metadata": {}, "source": source}


def code(source, *, hidden=False, outputs=()):
    metadata = {"jupyter": {"source_hidden": True}} if hidden else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": list(outputs)}


def test_text_is_read_at_110_words_per_minute_and_folded_text_counts_half():
    words = " ".join(["word"] * 110)
    assert cell_minutes(markdown(words)) == pytest.approx(1)
    assert cell_minutes(markdown(f"<details>{words}</details>")) == pytest.approx(0.5)
    assert cell_minutes(markdown(f"[{words}](https://example.org/a-long-address)")) == pytest.approx(1)


def test_code_is_read_at_12_lines_per_minute_and_a_hidden_cell_counts_half():
    lines = "x = 1\n\n" * 12
    table = {"output_type": "execute_result", "data": {"text/html": "<table></table>"}}
    assert cell_minutes(code(lines)) == pytest.approx(1)
    assert cell_minutes(code(lines, hidden=True)) == pytest.approx(0.5)
    verdict = {"output_type": "display_data", "data": {"text/html": ["<p class='rlhf-verdict'>", "open</p>"]}}
    assert cell_minutes(code(lines, outputs=[table])) == pytest.approx(2)
    assert cell_minutes(code(lines, outputs=[verdict])) == pytest.approx(1)


FRAME = pd.DataFrame({"gold": [0.471, 0.809], "proxy": [0.721, 1.622]}, index=["low", "high"])
BY_STEP = FRAME.rename_axis("step").to_string()
MARKDOWN = "| | value |\n| --- | ---: |\n| gold | 0.39 |"


@pytest.mark.parametrize("text", [str(FRAME), BY_STEP, f"two\n{FRAME}", str(FRAME.gold), MARKDOWN])
def test_a_table_takes_its_minute_in_any_form(text):
    printed = {"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)}
    shown = {"output_type": "execute_result", "data": {"text/plain": text}}
    assert [cell_minutes(code("", outputs=[output])) for output in (printed, shown)] == [1, 1]
    both = {"output_type": "execute_result", "data": {"text/plain": text, "text/html": "<table></table>"}}
    assert cell_minutes(code("", outputs=[both])) == 1


@pytest.mark.parametrize(
    "text",
    [
        "mean 0.4\nlast 0.5\n",
        "good one   p(A) = 0.741\nsame one   p(A) = 0.386",
        "  settings:\n  --steps INT",
        "",
    ],
)
def test_other_text_takes_no_minute(text):
    assert cell_minutes(code("", outputs=[{"output_type": "stream", "text": [text]}])) == 0


def test_a_printed_series_is_told_by_its_call():
    printed = {"output_type": "stream", "text": ["follows       0.148\nother words   0.852\n"]}
    source = "print(chances.round(3).to_string())"
    assert cell_minutes(code(source, outputs=[printed])) == pytest.approx(1, abs=0.1)


def test_a_table_in_the_text_takes_a_minute_and_half_of_it_where_it_is_folded():
    assert cell_minutes(markdown(f"Costs:\n\n{MARKDOWN}\n")) == pytest.approx(1.1, abs=0.05)
    assert cell_minutes(markdown(f"<details>\n\n{MARKDOWN}\n</details>")) == pytest.approx(0.55, abs=0.05)


@pytest.mark.parametrize("difficulty, minutes", [("easy", 8), ("medium", 15), ("hard", 25)])
def test_an_exercise_takes_the_minutes_of_its_difficulty(difficulty, minutes):
    header = f"### Exercise 1: a title\n\n*Difficulty: {difficulty}. Importance: high.*"
    assert cell_minutes(markdown(header)) == pytest.approx(minutes, abs=0.2)
    assert cell_minutes(markdown(f"## A section\n\n{header}")) == pytest.approx(minutes, abs=0.2)


def test_the_core_ends_at_going_deeper():
    cells = [markdown("# Lesson"), markdown("## 1. One"), markdown("# Going deeper"), markdown("## A. Two")]
    notebook = {"cells": [cell for heading in cells for cell in (heading, markdown("word " * 110))]}
    rows = list(sections(notebook))
    assert [(title, core) for title, core, *_ in rows] == [
        ("Lesson", True),
        ("1. One", True),
        ("Going deeper", False),
        ("A. Two", False),
    ]
    assert core_hours(notebook) == pytest.approx((3 + 2) / 60, abs=0.01)


@pytest.mark.parametrize("name", CORE_HOURS)
def test_a_core_fits_its_hours(name):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf8"))
    assert core_hours(notebook) <= CORE_HOURS[name]


@pytest.mark.parametrize("name", CORE_CELLS)
def test_a_core_has_no_more_cells_than_planned(name):
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf8"))
    assert sum(count for _, core, count, _ in sections(notebook) if core) <= CORE_CELLS[name]
