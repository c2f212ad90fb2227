"""Enter a lesson in the middle: run only the earlier cells whose names a section reads."""

import ast
import builtins
import re
import symtable
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from IPython import get_ipython
from IPython.core.inputtransformer2 import TransformerManager
from IPython.utils.capture import capture_output

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

    @property
    def tree(self) -> ast.Module:
        """The part as Python reads it, magics translated."""
        return ast.parse(TransformerManager().transform_cell(self.source))


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
    sections, parts = read_lesson(find_lesson(lesson))
    if anchor not in sections:
        raise ValueError(f"stage: {lesson} has no section {anchor!r}; it has {', '.join(sections)}")
    todo = missing_parts(parts, sections[anchor], shell.user_ns)
    _running = True
    try:
        for part in todo:
            _run_quietly(shell, part, f"stage({lesson!r}, {anchor!r})")
    finally:
        _running = False
    if todo:
        titles = dict.fromkeys(part.section for part in todo)
        print(f"This section needs results of others. Ran the cells that make them: {'; '.join(titles)}.")


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
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            cells.append((title, cell.source))
        elif marked := _SECTION.search(cell.source):
            title, anchor = marked.groups()
            sections[anchor] = title
    return sections, cells


def read_lesson(path: Path) -> tuple[dict[str, str], list[Part]]:
    """Read a notebook: anchor -> title of each section, and the parts of its code cells after the first."""
    sections, cells = code_cells(path)
    parts = [part for title, source in cells[1:] for part in split_cell(source, title)]
    # Python deletes the name of `except ... as name`, whatever it stood for before.
    handlers = [node for part in parts for node in ast.walk(part.tree) if isinstance(node, ast.ExceptHandler)]
    for part in parts:
        part.sure -= {handler.name for handler in handlers if handler.name}
    return sections, parts


def split_cell(source: str, section: str = "") -> list[Part]:
    """Cut a cell into its imports, functions and classes, each alone, and the whole cell if it does more.

    A section that needs an import or a function of an earlier cell need not repeat the training beside it.
    """
    statements = Part(source).tree.body
    parts = [read_part(ast.unparse(s), [s], section) for s in statements if isinstance(s, ALONE)]
    if len(parts) < len(statements):
        whole = read_part(source, statements, section)
        alone_binds = set().union(*(part.binds for part in parts))
        whole.binds -= alone_binds
        whole.sure -= alone_binds
        parts.append(whole)
    return parts


def read_part(source: str, statements: Sequence[ast.stmt], section: str) -> Part:
    """Read what the statements of a source need, bind and change together."""
    names = _Names()
    sure = _Names()
    for statement in statements:
        names.visit(statement)
        if not isinstance(statement, ast.If):
            sure.visit(statement)
    needs = (names.needs | (names.later - names.binds)) - set(dir(builtins))
    return Part(source, section, needs, names.binds, names.changes - names.binds, sure.binds)


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


class _Names(ast.NodeVisitor):
    """Collects the names of a cell in the order in which Python comes to them."""

    def __init__(self) -> None:
        self.needs, self.binds, self.changes = set(), set(), set()
        self.later = set()  # read when a function is called: perhaps bound further down

    def generic_visit(self, node: ast.AST) -> None:
        """Visit the value before the target that receives it."""
        order = {"iter": 0, "value": 0, "target": 1, "targets": 1}
        for name in sorted(node._fields, key=lambda name: order.get(name, 2)):
            parts = getattr(node, name, None)
            for part in parts if isinstance(parts, list) else [parts]:
                if isinstance(part, ast.AST):
                    self.visit(part)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.needs |= {node.id} - self.binds
        elif isinstance(node.ctx, ast.Store):
            self.binds.add(node.id)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.needs |= {name.id for name in ast.walk(node.target) if isinstance(name, ast.Name)} - self.binds
        self.generic_visit(node)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        before = set(self.needs)
        self.generic_visit(node)
        self.needs -= {node.name} - before  # bound here, and gone behind the handler

    def visit_alias(self, node: ast.alias) -> None:
        self.binds.add((node.asname or node.name).split(".")[0])

    def visit_Lambda(self, node: ast.AST) -> None:
        self.later |= _outer_names(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        self.visit_Lambda(node)
        self.binds.add(node.name)

    visit_ClassDef = visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ListComp(self, node: ast.expr) -> None:
        self.needs |= _outer_names(node) - self.binds

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_Subscript(self, node: ast.Subscript | ast.Attribute) -> None:
        if not isinstance(node.ctx, ast.Load):
            self._note_change(node)
        self.generic_visit(node)

    visit_Attribute = visit_Subscript

    def visit_Expr(self, node: ast.Expr) -> None:
        # rows.append(row): nobody keeps the result, so the call is there for what it changes.
        if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Attribute):
            self._note_change(node.value.func)
        self.generic_visit(node)

    def _note_change(self, node: ast.expr) -> None:
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        if isinstance(node, ast.Name):
            self.changes.add(node.id)


def _outer_names(node: ast.AST) -> set[str]:
    """Names that a function, a class or a comprehension reads from outside itself."""
    top = symtable.symtable(ast.unparse(node), "cell", "exec")
    names = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    inner = top.get_children()
    while inner:
        table = inner.pop()
        inner += table.get_children()
        names |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names
