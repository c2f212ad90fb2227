"""Enter a lesson in the middle: run only the earlier cells whose names a section reads."""

import ast
import builtins
import dis
import functools
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from IPython import get_ipython
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.capture import capture_output

from rlhf_helpers.lab.stage_cache import cache_path, keep, kept

_SECTION = re.compile(r'^## (.+)\s+<a id="([^"]+)">', re.MULTILINE)
ALONE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_running = False  # a cell that runs for another section may begin with a call of its own


@dataclass
class Part:
    """What can run by itself: an import, a function or class, or a whole code cell that does more."""

    source: str
    section: str = ""
    needs: set[str] = field(default_factory=set)  # read before the part itself binds them
    binds: set[str] = field(default_factory=set)
    changes: set[str] = field(default_factory=set)  # bound elsewhere, and changed here in place
    sure: set[str] = field(default_factory=set, compare=False)  # bound whatever an `if` decides
    alone: bool = field(default=False, compare=False)  # an import, a function or a class: quick to run


def stage(lesson: str, anchor: str) -> None:
    """Prepare the section of `lesson` marked `<a id="anchor">`, so that it runs after the setup cell alone.

    Runs the earlier cells that bind what the section reads, and what these cells read in turn, in the order
    of the lesson and without their output. In a run from top to bottom there is nothing left to do.

    Raises:
        FileNotFoundError: the notebook is neither in this folder, nor in notebooks/, nor beside the package.
        ValueError: the lesson has no such section; the message lists those it has.
        RuntimeError: a cell that the section needs fails, or this is not a notebook.
    """
    global _running
    if _running:
        return
    shell = get_ipython()
    if shell is None:
        raise RuntimeError(
            f"stage({lesson!r}, {anchor!r}): not in a notebook; call it in a cell of the lesson"
        )
    sections, cells = code_cells(find_lesson(lesson))
    parts = lesson_parts(tuple(cells))
    if anchor not in sections:
        raise ValueError(f"stage: {lesson} has no section {anchor!r}; it has {', '.join(sections)}")
    todo = missing_parts(parts, sections[anchor], shell.user_ns)
    if not todo:
        return
    setup = cells[0][1]
    # What stands beside results of other cells in this kernel may rest on what was typed there.
    fresh = todo == missing_parts(parts, sections[anchor], {})
    cache = cache_path(f"{lesson}.{anchor}", [setup, *(part.source for part in todo)]) if fresh else None
    names = set().union(*(part.binds for part in split_cell(setup)))
    given = {name: value for name, value in shell.user_ns.items() if name in names}
    _running = True
    try:
        read = set().union(*(part.needs for part in parts if part.section == sections[anchor]))
        found = _run_parts(shell, todo, read, cache, given, f"stage({lesson!r}, {anchor!r})")
    finally:
        _running = False
    how = f"Read what these made before, from {cache}" if found else "Ran the cells that make them"
    titles = "; ".join(dict.fromkeys(part.section for part in todo))
    print(f"This section needs results of others. {how}: {titles}.")


def _run_parts(
    shell: Any, todo: Sequence[Part], read: set[str], cache: Path | None, given: Mapping[str, Any], call: str
) -> bool:
    """Run the parts, or load from the cache what they make of the names `read`; tell whether it was there."""
    whole = [part for part in todo if not part.alone]
    names = set().union(*(part.binds for part in whole))
    changed = set().union(*(part.changes for part in whole)) - names
    names &= read.union(*(part.needs for part in todo if part.alone))
    if any(not isinstance(given.get(name), ModuleType) for name in changed):
        cache = None  # what changes an object of the setup cell must run
    made = None
    for part in todo:
        if part.alone:
            _run_quietly(shell, part, call)
            continue
        if cache and part is whole[0]:
            made = kept(cache, given)
            shell.user_ns.update(made or {})
        if made is None:
            _run_quietly(shell, part, call)
    if cache and made is None:
        keep(cache, {name: shell.user_ns[name] for name in names if name in shell.user_ns}, given)
    return made is not None


def find_lesson(lesson: str) -> Path:
    """Find the notebook in the working folder, in its notebooks/, or in the repository of the package."""
    folders = Path.cwd(), Path.cwd() / "notebooks", Path(__file__).parents[2] / "notebooks"
    for folder in folders:
        if (path := folder / f"{lesson}.ipynb").is_file():
            return path
    raise FileNotFoundError(
        f"stage: no {lesson}.ipynb in {', '.join(map(str, folders))}; start Jupyter in the folder of the "
        "lesson, or run the lesson from its first cell"
    )


def code_cells(path: Path) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Read a notebook: anchor -> title of each section, and (section, source) of each code cell."""
    sections: dict[str, str] = {}
    cells: list[tuple[str, str]] = []
    title = "the opening"
    # Not by nbformat: with the schemas it checks by, its import takes seconds at the start of each lesson.
    for cell in json.loads(path.read_text(encoding="utf8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cells.append((title, source))
        elif marked := _SECTION.search(source):
            title, anchor = marked.groups()
            sections[anchor] = title
    return sections, cells


def read_lesson(path: Path) -> tuple[dict[str, str], list[Part]]:
    """Read a notebook: anchor -> title of each section, and the parts of its code cells after the first."""
    sections, cells = code_cells(path)
    return sections, lesson_parts(tuple(cells))


@functools.lru_cache(maxsize=1)
def lesson_parts(cells: tuple[tuple[str, str], ...]) -> list[Part]:
    """Cut all code cells but the first, the setup cell, into parts; cells: (section, source).

    Each section of a lesson asks for the same parts, and cutting takes half a second.
    """
    return [part for title, source in cells[1:] for part in split_cell(source, title)]


def split_cell(source: str, section: str = "") -> list[Part]:
    """Cut a cell into its imports, functions and classes, each alone, and the whole cell if it does more.

    A section that needs an import or a function of an earlier cell need not repeat the training beside it.
    """
    statements = ast.parse(TransformerManager().transform_cell(source)).body  # magics translated
    parts = [read_part(ast.unparse(s), [s], section) for s in statements if isinstance(s, ALONE)]
    for part in parts:
        part.alone = True
    if len(parts) < len(statements):
        whole = read_part(source, statements, section)
        alone_binds = set().union(*(part.binds for part in parts))
        whole.binds -= alone_binds
        whole.sure -= alone_binds
        parts.append(whole)
    return parts


def read_part(source: str, statements: Sequence[ast.stmt], section: str) -> Part:
    """Read what the statements of a source need, bind and change together."""
    needs, binds = _read_names(_compiled(statements))
    _, sure = _read_names(_compiled([one for one in statements if not isinstance(one, ast.If)]))
    changes = set().union(*map(_changed, statements)) - binds
    needs -= {*dir(builtins), "__annotations__"}
    return Part(source, section, needs, binds, changes, sure)


def _compiled(statements: Sequence[ast.stmt]) -> CodeType:
    module = ast.Module(list(statements), type_ignores=[])
    with warnings.catch_warnings(action="ignore"):  # `x is 1`: Python says so when the cell itself runs
        return compile(module, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def missing_parts(parts: Sequence[Part], section: str, namespace: Mapping[str, Any]) -> list[Part]:
    """Parts before `section` that must run first, in order: they bind or change what is read later.

    A part counts as run when all the names that it binds exist, but those that an `if` may leave out: names
    that several cells bind, such as `rng`, do not tell which of them ran.
    """
    inside = [index for index, part in enumerate(parts) if part.section == section]
    readers, todo = list(inside), set(inside)
    while readers:
        reader = readers.pop()
        for name in parts[reader].needs:
            makers = [i for i in range(inside[-1]) if name in parts[i].sure]
            makers = makers or [i for i in range(inside[-1]) if name in parts[i].binds]
            # A function may read what is bound below it, because it is called still further down.
            maker = max((i for i in makers if i < reader), default=min(makers, default=None))
            if maker is None or maker in todo or parts[maker].sure | {name} <= namespace.keys():
                continue
            changers = [i for i in range(maker + 1, reader) if name in parts[i].changes]
            readers += {maker, *changers} - todo
            todo |= {maker, *changers}
    return [parts[index] for index in sorted(todo - set(inside))]


def _run_quietly(shell: Any, part: Part, call: str) -> None:
    with capture_output():
        result = shell.run_cell(part.source, silent=True)
    if error := result.error_before_exec or result.error_in_exec:
        raise RuntimeError(
            f"{call}: a cell of the section {part.section!r} failed ({type(error).__name__}: {error}); "
            f"run the lesson from its first cell, or repair this cell and save the notebook:\n{part.source}"
        ) from error


def _read_names(code: CodeType) -> tuple[set[str], set[str]]:
    """Read which names compiled code needs and which it binds, in the order in which Python comes to them.

    A function reads what it needs when it is called, so that may be bound further down; a comprehension reads
    it at once.
    """
    needs: set[str] = set()
    later: set[str] = set()
    binds: set[str] = set()
    deletes: set[str] = set()
    # The methods and comprehensions of a class do not see what its body binds.
    seen = binds if code.co_name == "<module>" else set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            needs |= {step.argval} - binds
        elif step.opname == "LOAD_GLOBAL":
            needs |= {step.argval} - seen
        elif step.opname in ("STORE_NAME", "STORE_GLOBAL"):
            binds.add(step.argval)
            deletes.discard(step.argval)
        elif step.opname == "DELETE_NAME":  # at the end of `except ... as name` too
            deletes.add(step.argval)
        elif isinstance(step.argval, CodeType):
            inner, bound = _read_names(step.argval)
            if step.argval.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>", "<genexpr>"):
                needs |= inner - seen
                binds |= bound  # by :=
            else:
                later |= inner
    return needs | (later - seen), binds - deletes


def _changed(node: ast.AST) -> set[str]:
    """Return the names of what a statement changes in place: rows.append(row), frame["a"] = 1."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return set()
    found = set().union(*map(_changed, ast.iter_child_nodes(node)))
    match node:
        # The result is not kept, so the call is there for what it changes.
        case ast.Expr(value=ast.Call(func=ast.Attribute() as target)):
            pass
        case ast.Attribute(ctx=ast.Store() | ast.Del()) | ast.Subscript(ctx=ast.Store() | ast.Del()):
            target = node
        case _:
            return found
    while isinstance(target, ast.Attribute | ast.Subscript):
        target = target.value
    return found | {name.id for name in [target] if isinstance(name, ast.Name)}
