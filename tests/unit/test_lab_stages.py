"""Enter a made-up lesson in the middle: what a cell reads and binds, and which cells a section needs."""

from pathlib import Path

import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from rlhf_helpers.lab import stages
from rlhf_helpers.lab.stages import Part, missing_parts, read_lesson, split_cell, stage

CELLS = [
    "# Lesson",
    "import math\nlog = []",
    '## 1. Make\n<a id="make"></a>',
    "numbers = [1, 2]\nprint('loud')\nlog.append('numbers')",
    "unrelated = 1 / 1\nlog.append('unrelated')",
    "numbers.append(3)\nlog.append('longer')",
    "def total(scale=math.floor(1.5)):\n    return scale * sum(numbers)\nlog.append('total')\ntotal()",
    '## 2. Use\n<a id="use"></a>',
    "answer = total()",
    "assert answer == 6",
    '# Going deeper\n\n## A. Shared\n<a id="shared"></a>',
    "text = str(answer)",
    '## B. Fails\n<a id="fails"></a>',
    "broken = 1 / 0",
    '## C. Last\n<a id="last"></a>',
    "broken",
]


ONE, TWO, THREE = ([f'## {n}\n<a id="section-{n}"></a>'] for n in (1, 2, 3))


def write_lesson(folder, sources=CELLS):
    cells = [new_markdown_cell(s) if s.startswith("#") else new_code_cell(s) for s in sources]
    path = folder / "lesson.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return path


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell that has run the setup cell of the lesson, in the lesson's folder."""
    shell = InteractiveShell()
    shell.history_manager.enabled = False
    monkeypatch.setattr(stages, "get_ipython", lambda: shell)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_lesson(tmp_path)
    shell.run_cell(CELLS[1])
    return shell


@pytest.mark.parametrize(
    "source, needs, binds",
    [
        ("x = y + 1\nz = x", {"y"}, {"x", "z"}),
        ("x += 1", {"x"}, {"x"}),
        ("rows['a'].b = 1", {"rows"}, set()),
        ("x = f(x)", {"f", "x"}, {"x"}),
        ("import a.b, c as d\nfrom e import f", set(), {"a", "d", "f"}),
        ("for i in range(n):\n    last = i", {"n"}, {"i", "last"}),
        ("for x in x:\n    pass", {"x"}, {"x"}),
        ("with open(p) as file:\n    text = file.read()", {"p"}, {"file", "text"}),
        ("squares = [i * k for i in rows if i]", {"k", "rows"}, {"squares"}),
        ("pairs = {a: b for a in rows for b in a}", {"rows"}, {"pairs"}),
        ("def f(x: T, y=start):\n    z = x + other\n    return z", {"T", "start", "other"}, {"f"}),
        ("def f():\n    return g()\ndef g():\n    return f()", set(), {"f", "g"}),
        ("f = lambda x: x + shift", {"shift"}, {"f"}),
        ("class A(Base):\n    size = n\n    def f(self):\n        return m", {"Base", "n", "m"}, {"A"}),
        ("class A:\n    def step(self, x):\n        return step(x)", {"step"}, {"A"}),
        ("class A:\n    loss = 1\n    def f(self):\n        return loss", {"loss"}, {"A"}),
        ("class A:\n    n = 1\n    m = n\n    size = [n for _ in m]", {"n"}, {"A"}),
        ("del rows\nrows = 1", set(), {"rows"}),
        ("rows = 1\ndel rows", set(), set()),
        ("try:\n    x = 1\nexcept KeyError as e:\n    print(e)\ne = None", set(), {"x", "e"}),
        ("any((hit := x) > k for x in rows)\nprint(hit)", {"k", "rows"}, {"hit"}),
        ("try:\n    x = 1\nexcept KeyError as error:\n    print(error)", set(), {"x"}),
        ("if (n := len(rows)) > 3:\n    print(n)", {"rows"}, {"n"}),
        ("print(f'{value:.{digits}f}')", {"value", "digits"}, set()),
        ("%matplotlib inline\nx = y", {"y"}, {"x"}),
        ("first, (second, *rest) = rows", {"rows"}, {"first", "second", "rest"}),
    ],
)
def test_a_cell_is_read_in_the_order_in_which_it_runs(source, needs, binds):
    parts = split_cell(f"{source}\npass")
    made = set().union(*(part.binds for part in parts))
    assert (parts[-1].needs - {"get_ipython"}, made) == (needs, binds)


@pytest.mark.parametrize(
    "source, changes",
    [
        ("rows.append(1)", {"rows"}),
        ("frame['a'] = 1", {"frame"}),
        ("model.head.weight = 1", {"model"}),
        ("del table[0]", {"table"}),
        ("rows = []\nrows.append(1)", set()),
        ("print(rows)", set()),
        ("x = rows.copy()", set()),
    ],
)
def test_changes_in_place_are_seen(source, changes):
    assert split_cell(source)[-1].changes == changes


def test_a_cell_is_read_without_warnings(recwarn):
    split_cell("same = x is 1")
    assert not recwarn.list


def test_sections_have_anchors_and_cells(tmp_path):
    sections, parts = read_lesson(write_lesson(tmp_path))
    assert sections == {
        "make": "1. Make",
        "use": "2. Use",
        "shared": "A. Shared",
        "fails": "B. Fails",
        "last": "C. Last",
    }
    assert parts[0] == Part(CELLS[3], "1. Make", {"log"}, {"numbers"}, {"log"})  # the setup cell is left out


def test_an_import_or_a_function_runs_without_its_cell():
    source = (
        "from math import pi, tau as turn\n\ndef half():\n    return turn / 2\n\ntrained = half() + start"
    )
    imports, function, whole = split_cell(source)
    assert imports == Part("from math import pi, tau as turn", binds={"pi", "turn"})
    assert (function.needs, function.binds) == ({"turn"}, {"half"})
    assert whole == Part(source, needs={"start"}, binds={"trained"})


def test_a_section_runs_after_the_setup_cell_alone(shell, capsys):
    stage("lesson", "use")
    assert (
        capsys.readouterr().out
        == "This section needs results of others. Ran the cells that make them: 1. Make.\n"
    )
    assert shell.user_ns["log"] == ["numbers", "longer"]  # in order, not the unrelated cell
    assert "answer" not in shell.user_ns
    assert shell.run_cell("answer = total()\nassert answer == 6").success


def test_needs_of_needed_cells_are_followed(shell):
    stage("lesson", "shared")
    assert shell.user_ns["log"] == ["numbers", "longer"]
    assert shell.user_ns["answer"] == 6


def test_nothing_runs_from_top_to_bottom(shell, capsys):
    for source in CELLS[3:7]:
        shell.run_cell(source)
    before = list(shell.user_ns["log"])
    capsys.readouterr()
    for anchor in ("make", "use"):
        stage("lesson", anchor)
    assert shell.user_ns["log"] == before
    assert capsys.readouterr().out == ""


def test_a_cell_that_runs_for_another_section_prepares_nothing(shell, tmp_path):
    sources = list(CELLS)
    sources[8] = "stage('lesson', 'last')\nanswer = total()"
    write_lesson(tmp_path, sources)
    shell.user_ns["stage"] = stage
    stage("lesson", "shared")
    assert shell.user_ns["answer"] == 6


def test_a_name_of_several_cells_does_not_tell_which_of_them_ran(tmp_path):
    sources = ["x = 0", *ONE, "rng, a = 1, 1", *TWO, "rng, b = 2, 2", *THREE, "print(rng)"]
    _, parts = read_lesson(write_lesson(tmp_path, sources))
    missing = missing_parts(parts, "3", {"x": 0, "rng": 1, "a": 1})
    assert [part.source for part in missing] == ["rng, b = 2, 2"]
    assert missing_parts(parts, "3", {"x": 0, "rng": 1, "b": 2}) == []


def test_what_an_if_may_leave_out_or_an_except_deletes_is_not_missed(tmp_path):
    live = "live = False\nif live:\n    import math\n    model = 1"
    failing = "error = 1\nfit = 2\ntry:\n    1 / 0\nexcept ZeroDivisionError as error:\n    print(error)"
    sources = ["x = 0", *ONE, "import math", failing, live, *TWO, "print(math.pi, fit)"]
    _, parts = read_lesson(write_lesson(tmp_path, sources))
    assert missing_parts(parts, "2", {"x": 0, "math": 0, "fit": 2, "live": False}) == []
    missing = [part.source for part in missing_parts(parts, "2", {"x": 0})]
    assert missing == ["import math", failing]


def test_a_function_may_read_what_stands_below_it(tmp_path):
    cell = "def twice():\n    return 2 * start\n\nstart = 4"
    sources = ["x = 0", *ONE, cell, "later = 1", *TWO, "print(twice())", *THREE, "start = 5"]
    _, parts = read_lesson(write_lesson(tmp_path, sources))
    missing = [part.source for part in missing_parts(parts, "2", {"x": 0})]
    assert missing == ["def twice():\n    return 2 * start", cell]
    assert missing_parts(parts, "2", {"x": 0, "twice": 0, "start": 4}) == []


def test_errors_name_lesson_anchor_and_fix(shell, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no nothing\.ipynb in .*; start Jupyter in the folder"):
        stage("nothing", "use")
    with pytest.raises(ValueError, match=r"lesson has no section 'uses'; it has make, use, shared"):
        stage("lesson", "uses")
    with pytest.raises(
        RuntimeError, match=r"'last'\): a cell of .*'B. Fails' failed \(ZeroDivisionError.*run"
    ):
        stage("lesson", "last")
    stage("lesson", "use")  # a failure leaves nothing behind that would stop the next call
    assert "total" in shell.user_ns
    monkeypatch.setattr(stages, "get_ipython", lambda: None)
    with pytest.raises(RuntimeError, match="not in a notebook"):
        stage("lesson", "use")


KEPT = [
    "# A lesson",
    "import torch\nlayer = torch.nn.Linear(2, 2)\nruns = []",
    '## 1. Make\n<a id="make"></a>',
    "def twice(x):\n    return x * factor",
    "factor = 2\ndrawn = torch.rand(3)\nboth = {'layer': layer, 'own': torch.nn.Linear(1, 1)}",
    '## 2. Use\n<a id="use"></a>',
    "total = twice(drawn) + torch.rand(3)\nlayer_seen = both['layer']\nown = both['own']",
]


def enter(shell, *, sources=KEPT):
    """Run the setup cell in a new kernel, enter section 2 and run its cell; return what the cells made."""
    shell.reset(new_session=False)
    write_lesson(Path.cwd(), sources)
    torch.manual_seed(0)
    shell.run_cell(sources[1])
    stage("lesson", "use")
    assert shell.run_cell(sources[6]).success
    return dict(shell.user_ns)


def test_results_are_kept_from_one_kernel_to_the_next(shell, capsys, tmp_path):
    first = enter(shell)
    assert "Ran the cells that make them: 1. Make." in capsys.readouterr().out
    (file,) = (tmp_path / "cache").rglob("lesson.use.*.pickle")
    second = enter(shell)
    assert f"Read what these made before, from {file}: 1. Make." in capsys.readouterr().out
    assert torch.equal(first["total"], second["total"]), "values, functions and random numbers are the same"
    assert torch.equal(first["own"].weight, second["own"].weight)
    assert second["layer_seen"] is second["layer"], "what the setup cell made is not copied"

    changed = [*KEPT[:4], KEPT[4].replace("factor = 2", "factor = 3"), *KEPT[5:]]
    assert enter(shell, sources=changed)["factor"] == 3
    assert "Ran the cells" in capsys.readouterr().out
    (newer,) = (tmp_path / "cache").rglob("lesson.use.*.pickle")
    assert newer != file, "one file for each section: the newest"
    newer.write_bytes(b"cut short")
    assert enter(shell, sources=changed)["factor"] == 3
    assert "Ran the cells" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [
        "handle = (n for n in runs)",  # cannot be written
        "runs.append(1)",  # changes what the setup cell made: would be lost
    ],
)
def test_what_cannot_be_kept_is_made_again(shell, capsys, tmp_path, more):
    sources = [*KEPT[:4], f"{KEPT[4]}\n{more}", KEPT[5], f"{KEPT[6]}\n{more.split()[0].split('.')[0]}"]
    for _ in range(2):
        names = enter(shell, sources=sources)
        assert "Ran the cells" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("*.pickle"))
    assert names["runs"] == ([1] if "append" in more else [])


def test_results_beside_what_was_typed_are_not_kept(shell, capsys, tmp_path):
    sources = [*KEPT[:4], "factor = 2", KEPT[4].replace("factor = 2", "third = factor"), *KEPT[5:]]
    write_lesson(tmp_path, sources)
    shell.run_cell(KEPT[1])
    shell.run_cell("factor = 7")
    stage("lesson", "use")
    assert shell.user_ns["third"] == 7
    assert not list((tmp_path / "cache").rglob("*.pickle"))
