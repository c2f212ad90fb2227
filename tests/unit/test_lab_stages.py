"""Enter a made-up lesson in the middle: what a cell reads and binds, and which cells a section needs."""

import nbformat
import pytest
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
