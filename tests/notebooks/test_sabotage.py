"""With one sign flipped in a helper, the asserts of the lesson that teaches it must fail.

Each lesson runs as it is, except for a first cell that flips the sign; the unharmed lesson passes in the
same test command (conftest.py), so a failure here is the flip's doing: an assert's, not a crash's.
"""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

LESSONS = Path(__file__).parents[2] / "notebooks"
FLIP = """
import functools
import rlhf_helpers.{module} as module
kept = module.{function}
@functools.wraps(kept)
def {function}(*args, **kwargs):
    return {flipped}
module.{function} = {function}
"""
# lesson -> the helper whose sign is flipped: its module, its name, and the wrong value in terms of `kept`
SABOTAGE = {
    "01_reward_modeling.ipynb": {
        "module": "core.preference_losses",
        "function": "bradley_terry_loss",
        "flipped": "kept(args[1], args[0], *args[2:], **kwargs)",
    },
    "02_policy_optimization.ipynb": {
        "module": "core.policy_losses",
        "function": "rloo_advantages",
        "flipped": "-kept(*args, **kwargs)",
    },
    "03_alignment_and_safety.ipynb": {
        "module": "core.choices",
        "function": "choice_logps",
        "flipped": "-kept(*args, **kwargs)",
    },
    "04_applications.ipynb": {
        "module": "guards",
        "function": "pick_answer",
        "flipped": "kept([-float(reward) for reward in args[0]], *args[1:], **kwargs)",
    },
}


def failure_of(notebook, folder):
    """(exception, source of the cell) at which the notebook stops, or None when it runs through."""
    client = NotebookClient(
        notebook, kernel_name="python3", timeout=300, resources={"metadata": {"path": str(folder)}}
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("RLHF_MODEL", "RLHF_DATA")}
    try:
        client.execute(env={**plain, "HF_HUB_OFFLINE": "1", "RLHF_PROGRESS": ""})
    except CellExecutionError as error:
        cell = next(c for c in notebook.cells if any(o.output_type == "error" for o in c.get("outputs", [])))
        return error.ename, cell.source
    return None


def test_every_lesson_has_its_sabotage():
    assert {path.name for path in LESSONS.glob("*.ipynb")} <= set(SABOTAGE)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", SABOTAGE)
def test_a_flipped_sign_fails_an_assert_of_the_lesson(lesson):
    path = LESSONS / lesson
    if not path.exists():
        pytest.skip(f"{lesson} is not written yet")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, new_code_cell(FLIP.format(**SABOTAGE[lesson])))
    found = failure_of(notebook, LESSONS)
    assert found is not None, f"{lesson} runs through with {SABOTAGE[lesson]['function']} flipped"
    assert found[0] == "AssertionError", f"stopped by {found[0]}, not by an assert, at:\n{found[1]}"


IMPORT = "import torch\nfrom rlhf_helpers.core.preference_losses import bradley_terry_loss"
VALUE = "loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.0]))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "flipped, last, expected",
    [
        (True, "assert loss < 0.2", "AssertionError"),
        (False, "assert loss < 0.2", None),
        (True, "loss", None),  # a lesson that asserts nothing is found out
    ],
)
def test_the_sabotage_itself(flipped, last, expected, tmp_path):
    cells = [new_code_cell(FLIP.format(**SABOTAGE["01_reward_modeling.ipynb"]))] if flipped else []
    found = failure_of(new_notebook(cells=[*cells, *map(new_code_cell, (IMPORT, VALUE, last))]), tmp_path)
    assert (found and found[0]) == expected
