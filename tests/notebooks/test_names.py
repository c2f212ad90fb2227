"""Cells can be run again in any order that keeps definitions before uses: a name stands for one thing."""

import ast
from collections import defaultdict

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from rlhf_helpers.lab.stages import code_cells, read_part
from tests.notebooks.test_sections import LESSONS

ONE_MAKER = ["01_reward_modeling", "02_policy_optimization"]


def read_cells(sources):
    """(needs, {name: what it is bound to}) of each cell, without the throwaway name `_`.

    An import of the same thing in two cells binds the same.
    """
    cells = []
    for number, source in enumerate(sources):
        statements = ast.parse(TransformerManager().transform_cell(source)).body
        part = read_part(source, statements, "")
        imported = {
            alias.asname or alias.name.split(".")[0]: f"import {alias.name}"
            for statement in statements
            for node in ast.walk(statement)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        cells.append(
            (part.needs, {name: imported.get(name, f"cell {number}") for name in part.binds - {"_"}})
        )
    return cells


def with_several_makers(sources):
    """{name: its makers} of the names that one cell takes from another and that several cells bind."""
    makers = defaultdict(set)
    cells = read_cells(sources)
    for _, binds in cells:
        for name, maker in binds.items():
            makers[name].add(maker)
    taken = set().union(*(needs for needs, _ in cells))
    return {name: sorted(makers[name]) for name in taken if len(makers[name]) > 1}


def rebound_by_live_cells(sources):
    """Names that a cell for RLHF_MODEL binds, in either branch, and another cell binds to something else."""
    cells = read_cells(sources)
    live = [number for number, source in enumerate(sources) if "RLHF_MODEL" in source]
    assert live, "each lesson has a cell that runs on a real model"
    return {
        name
        for number in live
        for name, maker in cells[number][1].items()
        if any(binds.get(name, maker) != maker for _, binds in cells)
    }


def sources_of(path):
    return [source for _, source in code_cells(path)[1]]


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_cell_for_a_real_model_rebinds_no_name_of_the_lesson(path):
    assert rebound_by_live_cells(sources_of(path)) == set()


@pytest.mark.parametrize("lesson", ONE_MAKER)
def test_a_name_that_a_cell_takes_from_another_has_one_maker(lesson):
    path = next(path for path in LESSONS if path.stem == lesson)
    assert with_several_makers(sources_of(path)) == {}


def test_a_name_that_changes_is_found():
    live = "import os\nif os.environ.get('RLHF_MODEL'):\n    from package import rloo\n    x = 1"
    sources = ["import os\nrloo = abs", "y = rloo(2)", "y = 3\nz = 4", "print(z)", live]
    assert with_several_makers(sources) == {"rloo": ["cell 0", "import rloo"]}
    assert rebound_by_live_cells(sources) == {"rloo"}
