"""Each lesson gives the same outputs twice, and runs with an equivalent answer to every exercise."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from rlhf_helpers.lab.exercises import LESSONS as EXERCISE_LESSONS
from rlhf_helpers.lab.notebooks import execute
from tests.notebooks.test_solved import CHECK, FOLDER, LESSONS, SOLVED, printed_by, run

ROOT = Path(__file__).parents[2]
# lesson number -> the module with tested answers that are right and not the printed solution
ANSWERS = {
    number: f"tests.unit.test_lab_checks{'' if number == 1 else f'_lesson{number}'}" for number in range(1, 5)
}
PATHS = f"import sys\nsys.path.insert(0, {str(ROOT)!r})"


def with_variants(notebook, module):
    """Define each exercise by the last of its equivalent answers; return how many there are."""
    pasted = 0
    for cell in notebook.cells:
        found = CHECK.search(cell.source) if cell.cell_type == "code" else None
        if found:
            name, function = found.groups()
            answer = f"import {module} as right_answers\n{function} = right_answers.RIGHT[{name!r}][-1]\n"
            cell.source = f"{cell.source[: found.start()]}{answer}{cell.source[found.start() :]}"
            pasted += 1
    notebook.cells.insert(0, new_code_cell(PATHS))
    return pasted


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_the_lesson_runs_with_an_equivalent_answer_to_every_exercise(path):
    notebook = nbformat.read(path, as_version=4)
    pasted = with_variants(notebook, ANSWERS[int(path.stem[:2])])
    assert run(notebook, FOLDER) == {}
    checks = [cell for cell in notebook.cells if cell.cell_type == "code" and CHECK.search(cell.source)]
    assert pasted == len(checks) >= 6
    assert [printed_by(cell) for cell in checks if SOLVED not in printed_by(cell)] == []


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", EXERCISE_LESSONS)
def test_every_exercise_has_an_equivalent_answer(name):
    module = ANSWERS[EXERCISE_LESSONS[name]].rsplit(".", 1)[1]
    source = (ROOT / "tests" / "unit" / f"{module}.py").read_text(encoding="utf8")
    assert re.search(rf'^    "{name}": \[', source, re.M)


def outputs_of(notebook):
    return [(cell.source, cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_the_lesson_gives_the_same_outputs_twice(path):
    first, second = (outputs_of(execute(nbformat.read(path, as_version=4), FOLDER)) for _ in range(2))
    assert [one[0] for one, two in zip(first, second, strict=True) if one != two] == []


@pytest.mark.slow
def test_a_variant_is_pasted_and_a_random_output_is_seen(tmp_path):
    stub = "from rlhf_helpers.lab.checks import check\ndef f(c, r): ...\nf = check('bradley_terry', f)"
    notebook = new_notebook(cells=[new_code_cell(stub), new_code_cell("import os\nos.getpid()")])
    again = notebook.copy()
    assert with_variants(notebook, ANSWERS[1]) == 1
    run(notebook, tmp_path)
    assert SOLVED in printed_by(notebook.cells[2])
    ones = [outputs_of(execute(nbformat.from_dict(again), tmp_path)) for _ in range(2)]
    assert ones[0] != ones[1]
