"""Each lesson runs to its end with every printed solution pasted in, and reuses no name for another thing."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
CELL_TIMEOUT_S = 300
CHECK = re.compile(r"^.*\bcheck\(\s*[\"'](\w+)[\"']\s*,\s*(\w+)\s*\)", re.M)
SOLUTION = re.compile(r"<details>\s*<summary>Solution</summary>(.*?)</details>", re.S)
CODE = re.compile(r"```python\n(.*?)```", re.S)
SOLVED = "right. Well done!"

# Runs inside the kernel: after each cell, notes the kind of every name that the cell bound. All of it stays
# inside one function, so that no name of a lesson can replace a name of the watch.
WATCH = '''
def start_name_watch():
    import ast, numbers, types

    import numpy

    functions = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
    inner_scopes = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    inner_scopes += (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    shell, kinds = get_ipython(), {}

    def bound_names(source):
        """Names that a cell binds at its top level: assignments, loops, with, def, class, import."""
        names, todo = set(), [ast.parse(source)]
        while todo:
            node = todo.pop()
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).split(".")[0])
            if not isinstance(node, inner_scopes):
                todo += ast.iter_child_nodes(node)
        return names - {"_"}

    def kind_of(value):
        """One word for what a value is; all numbers are of one kind, and so are all functions."""
        if isinstance(value, bool | numpy.bool_):
            return "bool"
        if isinstance(value, numbers.Number | numpy.number):
            return "number"
        return "function" if isinstance(value, functions) else type(value).__name__

    def after_cell(result):
        source = shell.input_transformer_manager.transform_cell(result.info.raw_cell)
        for name in bound_names(source) & set(shell.user_ns):
            kinds.setdefault(name, set()).add(kind_of(shell.user_ns[name]))

    shell.events.register("post_run_cell", after_cell)
    return kinds


kinds_of_names = start_name_watch()
'''
REPORT = """
import json

print(json.dumps({name: sorted(kinds) for name, kinds in kinds_of_names.items() if len(kinds) > 1}))
"""


def with_solutions(notebook):
    """Paste each printed solution in front of the line that checks it; return how many there are."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    solutions = ["\n".join(CODE.findall(part)) for text in texts for part in SOLUTION.findall(text)]
    pasted = 0
    for number, cell in enumerate(notebook.cells):
        found = CHECK.search(cell.source) if cell.cell_type == "code" else None
        if not found:
            continue
        defines = re.compile(rf"^(def {found[2]}\b|{found[2]} = )", re.M)
        fitting = [code for code in solutions if defines.search(code)]
        assert len(fitting) == 1, f"{len(fitting)} solutions define {found[2]}, which cell {number} checks"
        cell.source = f"{cell.source[: found.start()]}{fitting[0]}\n{cell.source[found.start() :]}"
        pasted += 1
    return pasted


def run(notebook, folder):
    """Execute the notebook under the watch; return {name: kinds} for each name with several kinds."""
    notebook.cells = [new_code_cell(WATCH), *notebook.cells, new_code_cell(REPORT)]
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=CELL_TIMEOUT_S, resources=resources)
    plain = {name: value for name, value in os.environ.items() if name not in ("RLHF_MODEL", "RLHF_DATA")}
    client.execute(env={**plain, "HF_HUB_OFFLINE": "1", "RLHF_PROGRESS": ""})
    return json.loads(notebook.cells[-1].outputs[0].text)


def printed_by(cell):
    """What a cell prints, and its verdicts as text."""
    return "".join(
        output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in cell.outputs
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.name)
def test_the_solved_lesson_runs_and_reuses_no_name(path):
    notebook = nbformat.read(path, as_version=4)
    pasted = with_solutions(notebook)
    reused = run(notebook, FOLDER)
    checks = [cell for cell in notebook.cells if cell.cell_type == "code" and CHECK.search(cell.source)]
    assert pasted == len(checks) >= 7
    assert [printed_by(cell) for cell in checks if SOLVED not in printed_by(cell)] == []
    assert reused == {}


STUB = "def double(x):\n    raise NotImplementedError\n\ndouble = check('double', double)"
CHECKER = (
    "def check(name, fn):\n    print('right. Well done!' if fn(2) == 4 else 'not right yet')\n    return fn"
)


def small_lesson(solution, *after):
    text = f"<details><summary>Solution</summary>\n\n```python\n{solution}\n```\n</details>"
    cells = [new_code_cell(CHECKER), new_code_cell(STUB), new_markdown_cell(text)]
    return new_notebook(cells=[*cells, *map(new_code_cell, after)])


@pytest.mark.slow
def test_a_solution_is_pasted_and_a_reused_name_is_found(tmp_path):
    loop = "[q for q in 'ab']\nfor q in (1, 2.5):\n    pass"
    shadows = "import numpy\nq = numpy.ones(2)[0]\nnumbers = ast = 1"  # names that the watch uses, too
    notebook = small_lesson("def double(x):\n    return x + x", "q = [1]", loop, shadows)
    assert with_solutions(notebook) == 1
    assert run(notebook, tmp_path) == {"q": ["list", "number"]}
    assert printed_by(notebook.cells[2]).strip() == SOLVED


@pytest.mark.slow
def test_a_lesson_that_stops_when_solved_is_found(tmp_path):
    notebook = small_lesson("def double(x):\n    return x + x", "assert double is None")
    with_solutions(notebook)
    with pytest.raises(CellExecutionError, match="assert double is None"):
        run(notebook, tmp_path)


def test_a_solution_must_define_the_function():
    with pytest.raises(AssertionError, match="0 solutions define double"):
        with_solutions(small_lesson("def twice(x):\n    return x + x"))
