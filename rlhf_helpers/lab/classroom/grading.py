"""Grades what a class handed in: every exercise of every learner, each in a sandbox, with the mistake named.

    python -m rlhf_helpers grade DIR --out grades.csv

DIR holds one folder per learner, as nbgrader collects them or just with the notebooks in it. A submission is
code that nobody has read, so nothing of it runs here: the sandbox tries the function on the inputs of its
exercise and returns values, and these are judged as in the lesson. Whatever a submission changes in its own
process, its check among it, changes no grade.
"""

import ast
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from matplotlib.figure import Figure

from rlhf_helpers.lab.classroom.worker import restore
from rlhf_helpers.lab.exercises import EXERCISES, NAMES
from rlhf_helpers.lab.isolation import standard_settings
from rlhf_helpers.lab.judging import Verdict, verdict
from rlhf_helpers.lab.plots import PALETTE, axes
from rlhf_helpers.sandbox import SandboxResult, run_programs

SECONDS, MEMORY_MB, MAX_BYTES = 20.0, 3072, 20_000_000
# Optimizers import torch._dynamo when they are made, which a program of the sandbox may not.
PRELOAD = ("torch._dynamo", "rlhf_helpers.lab.classroom.worker")
_TRY = "from rlhf_helpers.lab.classroom.worker import try_out"


@dataclass(frozen=True)
class Handed:
    """One exercise of one learner: the program that defines `submitted`, or a verdict where there is none."""

    learner: str
    lesson: int
    exercise: str
    late: bool
    program: str = ""
    verdict: Verdict | None = None


def grade(folder: Path, *, due: datetime | None = None, workers: int | None = None) -> pd.DataFrame:
    """Grade every learner's notebooks.

    Args:
        folder: Holds one folder per learner.
        due: When the notebooks had to be handed in. The time of a submission is that in nbgrader's
            timestamp.txt, otherwise that of its file.
        workers: How many sandboxes run at a time; None: one per core.

    Returns:
        One row per learner and exercise of the lessons that anybody handed in: learner, lesson, exercise,
        state ("solved", "wrong", "open" or "missing"), points (1 or 0), message (the mistake by name), late.

    Raises:
        FileNotFoundError: No folder of a learner holds a notebook.
    """
    handed = list(_collect(folder, due))
    if not handed:
        raise FileNotFoundError(
            f"{folder} holds no folder of a learner with a notebook 01_... to 04_... in it"
        )
    programs = [item for item in handed if item.verdict is None]
    results = run_programs(
        [item.program for item in programs],
        calls_per_code=[[("try_out", (item.exercise,))] for item in programs],
        workers=workers,
        timeout=SECONDS,
        memory_mb=MEMORY_MB,
        preload=PRELOAD,
    )
    verdicts = {
        (item.learner, item.exercise): judge_result(item.exercise, result)
        for item, result in zip(programs, results, strict=True)
    }
    rows = []
    for item in handed:
        found = item.verdict or verdicts[item.learner, item.exercise]
        points = int(found.state == "solved")
        rows.append((item.learner, item.lesson, item.exercise, found.state, points, found.message, item.late))
    return pd.DataFrame(rows, columns=["learner", "lesson", "exercise", "state", "points", "message", "late"])


def judge_result(exercise: str, result: SandboxResult) -> Verdict:
    """Judge what came out of the sandbox; a program that was stopped there is wrong, for the reason given."""
    if result.verdict != "ok":
        return Verdict("wrong", f"stopped ({result.verdict}): {result.error}")
    try:
        (tried,) = result.values
        if "given" in tried:
            return Verdict("open", "not attempted yet.") if tried["given"] == "open" else _no_function(tried)
        outcomes, slopes = ([restore(part) for part in tried[key]] for key in ("outcomes", "gradients"))
        faults = [str(fault) for fault in tried["faults"]]
        probes = EXERCISES[exercise].probes
        if not len(outcomes) == len(slopes) == len(probes):
            raise ValueError("other than one outcome per input")

        def gradients_of(probe: Any) -> Any:
            return slopes[next(i for i, known in enumerate(probes) if known is probe)]

        with standard_settings():
            return verdict(EXERCISES[exercise], outcomes, faults, gradients_of)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        return Verdict("wrong", f"stopped (forged): the sandbox returned no outcome ({error})")


def _no_function(tried: dict[str, Any]) -> Verdict:
    return Verdict("wrong", f"not right yet: give check the function itself, not {tried['given']}.")


def _collect(folder: Path, due: datetime | None) -> Iterator[Handed]:
    """Yield every exercise of the lessons that anybody handed in, learner by learner."""
    learners = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {learner: _notebooks(learner) for learner in learners}
    lessons = sorted({lesson for notebooks in found.values() for lesson in notebooks})
    for learner, notebooks in found.items():
        for lesson in lessons:
            if lesson in notebooks:
                yield from _read(learner.name, lesson, notebooks[lesson], due)
                continue
            for name in NAMES[lesson]:
                nothing = Verdict("missing", "the notebook was not handed in.")
                yield Handed(learner.name, lesson, name, late=False, verdict=nothing)


def _notebooks(learner: Path) -> dict[int, Path]:
    """Return the learner's notebook for each lesson; links are not followed, checkpoints are not read."""
    return {
        int(path.name[:2]): path
        for path in sorted(learner.rglob("0[1-4]_*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts and path.is_file() and not path.is_symlink()
    }


def _read(learner: str, lesson: int, path: Path, due: datetime | None) -> Iterator[Handed]:
    """Yield the exercises of one notebook."""
    late = due is not None and _handed_in(path) > due.astimezone()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        notebook = nbformat.reads(path.read_text(encoding="utf8"), as_version=4)
        sources = [str(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        unreadable = Verdict("wrong", f"the notebook cannot be read ({type(error).__name__}: {error})"[:300])
        for name in NAMES[lesson]:
            yield Handed(learner, lesson, name, late, verdict=unreadable)
        return
    for name in NAMES[lesson]:
        try:
            program = program_of(sources, name)
        except LookupError:
            missing = Verdict("missing", "the notebook does not call check for this exercise.")
            yield Handed(learner, lesson, name, late, verdict=missing)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            broken = Verdict("wrong", f"the cell is not Python: {error}"[:300])
            yield Handed(learner, lesson, name, late, verdict=broken)
        else:
            yield Handed(learner, lesson, name, late, program)


def _handed_in(path: Path) -> datetime:
    """Return when a notebook was handed in, by nbgrader's note beside it or by its file."""
    note = path.with_name("timestamp.txt")
    if note.is_file():
        return pd.Timestamp(note.read_text(encoding="utf8").strip()).to_pydatetime().astimezone()
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


def program_of(sources: Sequence[str], name: str) -> str:
    """Build the program that defines `submitted`, the function that a notebook gives to check(name, ...).

    It holds the cell of the exercise without its call of check, and of the cells above what that cell needs:
    imports, functions, classes and plain constants. Nothing else of the notebook runs.

    Raises:
        LookupError: No cell calls check for this exercise.
        SyntaxError: The cell that does is not Python.
    """
    above: list[ast.stmt] = []
    for source in sources:
        if "check(" in source and name in source:
            statements = _parse(source)
            call = next(
                (node for part in statements for node in ast.walk(part) if _is_check(node, name)), None
            )
            if isinstance(call, ast.Call):
                own = [part for part in statements if call not in ast.walk(part) and not _is_stage(part)]
                submitted = ast.Assign([ast.Name("submitted", ast.Store())], call.args[1])
                kept = [*_needed(above, [*own, submitted]), *own]
                lines = [*map(ast.unparse, kept), _TRY, ast.unparse(ast.fix_missing_locations(submitted))]
                return "\n".join(lines) + "\n"
        with contextlib.suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            above += [node for node in _parse(source) if _is_definition(node)]
    raise LookupError(name)


def _parse(source: str) -> list[ast.stmt]:
    """Parse a cell without its magic commands."""
    return ast.parse("\n".join(line for line in source.split("\n") if not line.startswith(("%", "!")))).body


def _is_check(node: ast.AST, name: str) -> bool:
    """Recognize check(NAME, function)."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "check"
        and len(node.args) == 2
        and isinstance(node.args[0], ast.Constant)
        and node.args[0].value == name
    )


def _is_stage(node: ast.stmt) -> bool:
    """Recognize stage(...), which prepares a section in a notebook."""
    return ast.unparse(node).startswith("stage(")


def _is_definition(node: ast.stmt) -> bool:
    """Say whether a statement only names something: an import, a function, a class, a plain constant."""
    if isinstance(node, ast.Assign):
        try:
            ast.literal_eval(node.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            return False
        return True
    return isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)


def _needed(definitions: Sequence[ast.stmt], statements: Sequence[ast.stmt]) -> list[ast.stmt]:
    """Return the definitions that the statements use, directly or through one another, in their order."""
    used = {node.id for part in statements for node in ast.walk(part) if isinstance(node, ast.Name)}
    kept: list[ast.stmt] = []
    for definition in reversed(definitions):
        if _bound(definition) & used:
            kept.insert(0, definition)
            used |= {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    return kept


def _bound(definition: ast.stmt) -> set[str]:
    """Return the names that a definition binds."""
    if isinstance(definition, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in definition.names}
    if isinstance(definition, ast.Assign):
        return {
            node.id
            for target in definition.targets
            for node in ast.walk(target)
            if isinstance(node, ast.Name)
        }
    return {definition.name} if isinstance(definition, ast.FunctionDef | ast.ClassDef) else set()


def mistakes_figure(grades: pd.DataFrame, *, most: int = 12) -> Figure:
    """Draw how many learners made each mistake, the most frequent first."""
    wrong = grades[grades["state"] == "wrong"]
    messages = wrong["message"].str.removeprefix("not right yet: ").str.slice(0, 90)
    counts = (wrong["exercise"] + ": " + messages).value_counts().head(most)[::-1]
    label = "learners (count)"
    with axes(xlabel=label, ylabel="mistake (name)", title="Which mistakes the class made") as (figure, axis):
        figure.set_size_inches(9, 1.2 + 0.4 * max(1, len(counts)))
        axis.barh(list(counts.index), counts.to_numpy(), color=PALETTE[0])
        axis.xaxis.get_major_locator().set_params(integer=True)
    return figure
