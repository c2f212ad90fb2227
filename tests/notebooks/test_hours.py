"""The estimate of a lesson's hours: its rules on made-up cells, and the limit for each core."""

import json

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
