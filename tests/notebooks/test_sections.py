"""Each section of a lesson runs to its end after the setup cell and its preparation alone.

    python -m pytest -m nightly -s tests/notebooks/test_sections.py -k holds

prints the seconds of each preparation. A learner may wait 60 s for it with two idle cores; section "holds" of
lesson 1, the slowest, takes 41 s there, and 81 s of processor time beside another test, with one thread.
"""

import os
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_helpers.lab.stages import code_cells, missing_parts, read_lesson, split_cell

FOLDER = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
CELL_TIMEOUT_S = 600
PREPARE_LIMIT_S = 60  # of processor time: what else runs on the machine does not count in full
LONGER_S = {("01_reward_modeling", "holds"): 100}  # with one thread; 41 s of waiting with two
CACHE = tempfile.TemporaryDirectory()  # of what sections need: the first test of a section makes it
PREPARE = """
import time
from rlhf_helpers.lab.stages import stage
started = time.perf_counter(), time.process_time()
stage({lesson!r}, {anchor!r})
seconds = time.perf_counter() - started[0], time.process_time() - started[1]
print("prepared in {{:.0f}} s ({{:.0f}} s on the processor)".format(*seconds))
assert seconds[1] <= {limit_s}
"""


def sections_with_code():
    for path in LESSONS:
        sections, cells = code_cells(path)
        with_code = {title for title, _ in cells}
        yield from ((path.stem, anchor) for anchor, title in sections.items() if title in with_code)


def section_alone(path, anchor, after=()):
    """The setup cell, the preparation of the section, cells to put `after` that, and the section's own."""
    sections, cells = code_cells(path)
    own = [source for title, source in cells if title == sections[anchor]]
    prepare = PREPARE.format(
        lesson=path.stem, anchor=anchor, limit_s=LONGER_S.get((path.stem, anchor), PREPARE_LIMIT_S)
    )
    sources = [cells[0][1], prepare, *after, *own]
    return new_notebook(cells=[new_code_cell(source) for source in sources])


def run(notebook, folder):
    """Execute in `folder` with a learner's environment and no progress file."""
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=CELL_TIMEOUT_S, resources=resources)
    plain = {name: value for name, value in os.environ.items() if name not in ("RLHF_MODEL", "RLHF_DATA")}
    client.execute(env={**plain, "HF_HUB_OFFLINE": "1", "RLHF_PROGRESS": "", "XDG_CACHE_HOME": CACHE.name})
    return notebook


def printed_by(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("section", list(sections_with_code()), ids="-".join)
def test_a_section_runs_after_the_setup_cell(section):
    lesson, anchor = section
    notebook = run(section_alone(FOLDER / f"{lesson}.ipynb", anchor), FOLDER)
    print(f"\n{lesson} {anchor}:", printed_by(notebook.cells[1]))


def unprepared(path):
    """Section -> what its cells above its call of `stage` need and the setup cell lacks, by first lines."""
    sections, cells = code_cells(path)
    _, parts = read_lesson(path)
    setup = set().union(*(part.binds for part in split_cell(cells[0][1])))
    missing = {}
    for anchor, title in sections.items():
        own = [source for name, source in cells[1:] if name == title]
        call = f'stage("{path.stem}", "{anchor}")'
        above = own[: next((at for at, source in enumerate(own) if call in source), len(own))]
        first = [part for source in above for part in split_cell(source, title)]
        earlier = parts[: next((at for at, part in enumerate(parts) if part.section == title), 0)]
        needed = missing_parts(earlier + first, title, dict.fromkeys(setup)) if first else []
        missing[anchor] = [part.source.splitlines()[0] for part in needed]
    return missing


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_a_section_needs_the_setup_cell_alone_or_calls_stage(path):
    assert {anchor: lines for anchor, lines in unprepared(path).items() if lines} == {}


def test_a_section_without_its_call_is_found(tmp_path):
    def lesson(*cells):
        sources = ["import math", '## 1. One <a id="one">', "x = math.pi", '## 2. Two <a id="two">', *cells]
        make = {True: new_markdown_cell, False: new_code_cell}
        notebook = new_notebook(cells=[make[source.startswith("#")](source) for source in sources])
        nbformat.write(notebook, tmp_path / "lesson.ipynb")
        return unprepared(tmp_path / "lesson.ipynb")

    call = 'stage("lesson", "two")'
    assert lesson("y = math.e") == {"one": [], "two": []}
    assert lesson("y = x") == {"one": [], "two": ["x = math.pi"]}
    assert lesson(f"{call}\ny = x") == {"one": [], "two": []}
    assert lesson("y = math.e", f"{call}\nz = x") == {"one": [], "two": []}
    assert lesson("y = x", call) == {"one": [], "two": ["x = math.pi"]}
    assert lesson('stage("lesson", "one")\ny = x') == {"one": [], "two": ["x = math.pi"]}


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_every_name_that_a_section_reads_is_made_for_it(path):
    _, cells = code_cells(path)
    sections, parts = read_lesson(path)
    setup = set().union(*(part.binds for part in split_cell(cells[0][1])))
    unknown = {}
    for anchor, title in sections.items():
        own = [part for part in parts if part.section == title]
        ran = missing_parts(parts, title, dict.fromkeys(setup)) if own else []
        made = setup.union(*(part.binds for part in ran + own))
        unknown[anchor] = set().union(*(part.needs for part in ran + own)) - made - {"display", "get_ipython"}
    assert {anchor: names for anchor, names in unknown.items() if names} == {}


@pytest.mark.slow
def test_the_section_alone_is_cut_out(tmp_path):
    sources = [
        "base = 1",
        '## 1\n<a id="one"></a>',
        "x = base\nunused = 1",
        '## 2\n<a id="two"></a>',
        "y = x",
    ]
    cells = [new_markdown_cell(s) if s.startswith("#") else new_code_cell(s) for s in sources]
    path = tmp_path / "lesson.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    notebook = run(section_alone(path, "two"), tmp_path)
    assert [cell.source for cell in notebook.cells[2:]] == ["y = x"]
    assert "that make them: 1." in printed_by(notebook.cells[1])
