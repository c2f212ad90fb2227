"""Each guard of conftest.py fails a small notebook that nbval alone passes, and passes a sound one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytestmark = pytest.mark.slow


def stored(source, text):
    return new_code_cell(source, execution_count=1, outputs=[new_output("stream", name="stdout", text=text)])


def raising(source):
    return new_code_cell(source, metadata={"tags": ["raises-exception"]})


CHECKED = "# NBVAL_CHECK_OUTPUT\nprint(1)"
SABOTAGED = {  # name: (the faulty cell, what the report must say)
    "failed_magic": (new_code_cell("%nosuchmagic\nassert False"), "a failed magic?"),
    "check_never_run": (new_code_cell(CHECKED), "stores no output"),
    "check_without_output": (new_code_cell(CHECKED, execution_count=1), "stores no output"),
    "raises_nothing": (raising("x = 1"), "it raised none"),
    "output_differs": (stored(CHECKED, "2\n"), "Cell outputs differ"),
    "false_assert": (new_code_cell("assert 1 == 2"), "AssertionError"),
    "dead_kernel": (new_code_cell("import os; os._exit(1)"), "the kernel died"),
}
SOUND = [
    new_code_cell(f"import sys; assert sys.executable == {sys.executable!r}"),
    stored(CHECKED, "1\n"),
    raising("1 / 0"),
    new_code_cell("import os; assert os.environ['HF_HUB_OFFLINE'] == '1'"),
]


def outcomes(folder: Path, *arguments: str, timeout: float) -> tuple[dict[str, list[str]], str]:
    """Notebook name -> outcome of each cell, and the whole report, of pytest in a process of its own."""
    (folder / "pytest.ini").write_text(
        "[pytest]\nfilterwarnings = error\nmarkers = slow: as in the project\n", encoding="utf8"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--junitxml=report.xml",
        "-p",
        "no:cacheprovider",
        "--color=no",
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder)
    found: dict[str, list[str]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        name = re.search(r"(\w+)\.ipynb", case.get("classname") or case.get("name"))[1]
        found.setdefault(name, []).append(case[0].tag if len(case) else "passed")
    return found, done.stdout + done.stderr


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The outcomes of a project laid out like this one, its lessons run by its one test command."""
    root = tmp_path_factory.mktemp("project")
    (root / "tests" / "notebooks").mkdir(parents=True)
    (root / "notebooks").mkdir()
    shutil.copy(Path(__file__).with_name("conftest.py"), root / "tests" / "notebooks")
    nbformat.write(new_notebook(cells=SOUND), root / "notebooks" / "sound.ipynb")
    for name, (cell, _) in SABOTAGED.items():
        cells = [new_code_cell("y = 1"), cell, new_code_cell("y"), new_code_cell("y")]
        nbformat.write(new_notebook(cells=cells), root / "notebooks" / f"{name}.ipynb")
    return outcomes(root, "tests", timeout=120)  # a dead kernel must not wait for the cell's own 300 s


def test_sound_notebook_passes(guarded):
    found, report = guarded
    assert found["sound"] == ["passed"] * 4, report


@pytest.mark.parametrize("name", SABOTAGED)
def test_guard_fails_the_cell_and_skips_the_rest(guarded, name):
    found, report = guarded
    assert found[name] == ["passed", "failure", "skipped", "skipped"], report
    section = report.split(f"{name}.ipynb::Cell 1 ____")[1].split(".ipynb::Cell")[0]
    assert SABOTAGED[name][1] in section


def test_nbval_alone_passes_what_the_guards_refuse(tmp_path):
    """When this fails, nbval has closed a gap of its own and a guard may go."""
    names = ("failed_magic", "check_never_run", "raises_nothing")
    nbformat.write(new_notebook(cells=[SABOTAGED[name][0] for name in names]), tmp_path / "faulty.ipynb")
    found, report = outcomes(tmp_path, "--nbval-lax", "--nbval-current-env", "faulty.ipynb", timeout=60)
    assert found["faulty"] == ["passed"] * 3, report
