"""Grades what a class handed in: every exercise of every learner, each in a sandbox, with the mistake named.

    python -m rlhf_helpers grade DIR --out grades.csv

DIR holds one folder per learner, as nbgrader collects them or just with the notebooks in it. A submission is
untrusted code, so nothing of it runs here: the sandbox tries the function on the inputs of its
exercise and returns values, and these are judged as in the lesson. Whatever a submission changes in its own
process, its check among it, changes no grade.
"""

import ast
import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import nbformat
import pandas as pd

from rlhf_helpers.lab.classroom.worker import restore
from rlhf_helpers.lab.exercises import EXERCISES, NAMES
from rlhf_helpers.lab.isolation import standard_settings
from rlhf_helpers.lab.judging import Verdict, judge, verdict
from rlhf_helpers.lab.progress import items_of, read_states
from rlhf_helpers.lab.stages import ALONE, Part, missing_parts, read_part, split_cell
from rlhf_helpers.sandbox import SandboxResult, run_programs

SECONDS, MEMORY_MB, MAX_BYTES = 20.0, 3072, 20_000_000
MAX_MESSAGE = 2_000  # characters
# Optimizers import torch._dynamo when they are made, which a program of the sandbox may not.
PRELOAD = ("torch._dynamo", "rlhf_helpers.lab.classroom.worker")
SELF_REPORTED = "self-reported"
BROKEN = (SyntaxError, ValueError, RecursionError, MemoryError)  # what unreadable code makes Python raise
PROGRESS = "*rlhf_progress.json"  # a leading dot hides it from the browser with which learners upload
# What a submission tried, and how the events that show it begin.
CHANGE_THE_GRADER = "change the grader"
ATTEMPTS = {
    "delete a file": ("os.remove", "os.rmdir", "os.rename", "os.truncate", "shutil."),
    "open a socket": ("socket.",),
    "start processes": ("os.fork", "os.exec", "os.posix_spawn", "os.system", "subprocess."),
    CHANGE_THE_GRADER: ("module.",),
}
_TRY = "from rlhf_helpers.lab.classroom.worker import try_out"


@dataclass(frozen=True)
class Handed:
    """One exercise or quiz of one learner.

    `attempt` is the program that defines `submitted`, or a verdict where there is none.
    """

    learner: str
    lesson: int
    name: str
    late: bool
    attempt: str | Verdict


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
        Where a progress file lies beside a notebook, also one row per quiz of the lesson, without points: its
        state is "self-reported", for anyone can edit that file, and its message is the answer.

    Raises:
        FileNotFoundError: No folder of a learner holds a notebook.
    """
    handed = list(_collect(folder, due))
    if not handed:
        raise FileNotFoundError(
            f"{folder} holds no folder of a learner with a notebook 01_... to 04_... in it"
        )
    programs = [item for item in handed if isinstance(item.attempt, str)]
    results = run_programs(
        [item.attempt for item in programs],
        calls_per_code=[[("try_out", (item.name,))] for item in programs],
        workers=workers,
        timeout=SECONDS,
        memory_mb=MEMORY_MB,
        preload=PRELOAD,
    )
    remaining = iter(results)
    rows = []
    for item in handed:
        found = item.attempt
        if isinstance(found, str):
            found = judge_result(item.name, next(remaining))
        points = None if found.state == SELF_REPORTED else int(found.state == "solved")
        learner, message = _writable(item.learner), _writable(found.message)
        rows.append((learner, item.lesson, item.name, found.state, points, message, item.late))
    columns = ["learner", "lesson", "exercise", "state", "points", "message", "late"]
    return pd.DataFrame(rows, columns=columns).astype({"points": "Int64"})


def judge_result(exercise: str, result: SandboxResult) -> Verdict:
    """Judge what came out of the sandbox, and say what the program tried there.

    The events are hints: a library may cause one, so a right function keeps its point. Only a program that
    changes the grader loses it, because the values may then be another function's.
    """
    found = _judge_values(exercise, result)
    tried = [name for name, starts in ATTEMPTS.items() if any(e.startswith(starts) for e in result.events)]
    if not tried:
        return found
    state = "wrong" if CHANGE_THE_GRADER in tried else found.state
    return Verdict(state, f"tried to {' and '.join(tried)}; {found.message}")


def _judge_values(exercise: str, result: SandboxResult) -> Verdict:
    """Judge the values; a program that was stopped is wrong, for the reason given."""
    if result.verdict != "ok":
        return Verdict("wrong", f"stopped ({result.verdict}): {result.error}")
    try:
        tried = restore(*result.values)
        if "given" in tried:
            return judge(EXERCISES[exercise], tried["given"])
        outcomes, slopes = tried["outcomes"], tried["gradients"]
        faults = [str(fault) for fault in tried["faults"]]
        probes = EXERCISES[exercise].probes
        if not len(outcomes) == len(slopes) == len(probes):
            raise ValueError("other than one outcome per input")
        with standard_settings():
            return verdict(EXERCISES[exercise], outcomes, faults, slopes.__getitem__)
    except Exception as error:  # whatever a forged outcome makes torch, numpy or the comparison raise
        return Verdict("wrong", f"stopped (forged): the sandbox returned no outcome ({error})")


def _writable(text: str) -> str:
    """Cut a text of a learner, and replace what UTF-8 cannot hold, such as half of a surrogate pair."""
    return text[:MAX_MESSAGE].encode("utf8", "replace").decode()


def _collect(folder: Path, due: datetime | None) -> Iterator[Handed]:
    """Yield every exercise of the lessons that anybody handed in, learner by learner."""
    learners = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {learner: _notebooks(learner) for learner in learners}
    lessons = sorted({lesson for notebooks in found.values() for lesson in notebooks})
    for learner, notebooks in found.items():
        for lesson in lessons:
            path = notebooks.get(lesson)
            late = bool(path and due) and _handed_in(path) > due.astimezone()
            for name, attempt in _attempts(lesson, path).items():
                yield Handed(learner.name, lesson, name, late, attempt)


def _notebooks(learner: Path) -> dict[int, Path]:
    """Return the learner's notebook for each lesson; links are not followed, checkpoints are not read."""
    return {
        int(path.name[:2]): path
        for path in sorted(learner.rglob("0[1-4]_*.ipynb"))
        if ".ipynb_checkpoints" not in path.parts and path.is_file() and not path.is_symlink()
    }


def _attempts(lesson: int, path: Path | None) -> dict[str, str | Verdict]:
    """Read the exercises of one notebook, and the quizzes that the progress file beside it reports."""
    names = NAMES[lesson]
    if path is None:
        return dict.fromkeys(names, Verdict("missing", "the notebook was not handed in."))
    quizzes = _reported_answers(lesson, path.parent)
    try:
        notebook = nbformat.reads(_text(path), as_version=4)
        sources = [str(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    except Exception as error:  # whatever a broken or hostile file makes the reader raise
        return quizzes | dict.fromkeys(names, _unreadable("the notebook", error))
    return quizzes | {name: _program_or_verdict(sources, name) for name in names}


def _program_or_verdict(sources: Sequence[str], name: str) -> str | Verdict:
    try:
        return program_of(sources, name)
    except LookupError:
        return Verdict("missing", "the notebook does not call check for this exercise.")
    except Exception as error:  # as for a notebook
        return _unreadable("the code", error)


def _unreadable(what: str, error: Exception, state: str = "wrong") -> Verdict:
    return Verdict(state, f"{what} cannot be read ({type(error).__name__}: {error})"[:300])


def _reported_answers(lesson: int, folder: Path) -> dict[str, str | Verdict]:
    """Return the answers to the quizzes of a lesson in a learner's progress file, if it was handed in."""
    for path in sorted(folder.glob(PROGRESS)):
        try:
            answers = read_states(_text(path)).get("quizzes", {})
        except Exception as error:  # as for a notebook
            return {"quizzes": _unreadable("the progress file", error, SELF_REPORTED)}
        return {
            name: Verdict(SELF_REPORTED, answers.get(name, "not answered")) for name in _quiz_names(lesson)
        }
    return {}


@functools.cache
def _quiz_names(lesson: int) -> list[str]:
    return [item.name for item in items_of(lesson) if item.kind == "quizzes"]


def _text(path: Path) -> str:
    """Read a small file of a learner; a link could lead to a file of the teacher."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"not a plain file of at most {MAX_BYTES:,} bytes")
    return path.read_text(encoding="utf8")


def _handed_in(path: Path) -> datetime:
    """Return when a notebook was handed in, by nbgrader's note beside it or by its file."""
    with contextlib.suppress(Exception):  # there is no note, or none that can be read
        note = _text(path.with_name("timestamp.txt"))
        return pd.Timestamp(note.strip()).to_pydatetime().astimezone()
    return datetime.fromtimestamp(path.stat().st_mtime).astimezone()


def program_of(sources: Sequence[str], name: str) -> str:
    """Build the program that defines `submitted`, the function that a notebook gives to check(name, ...).

    It holds what that function needs, as `stages` finds it: any statement of its own cell, and imports,
    functions, classes and assignments that call nothing of the cells above. Nothing else of the notebook
    runs, and so nothing that only prepares or shows something there.

    Raises:
        LookupError: No cell calls check for this exercise.
        SyntaxError: The cell that does is not Python.
        ValueError: There are too many statements.
    """
    above: list[Part] = []
    for source in sources:
        if "check(" in source and name in source:
            own: list[Part] = []
            for statement in _parse(source):
                if call := next((node for node in ast.walk(statement) if _is_check(node, name)), None):
                    submitted = f"submitted = {ast.unparse(call.args[1])}"
                    parts = [*above, *own, *split_cell(submitted, "submitted")]
                    if len(parts) > 3_000:  # lessons have up to 350; the time grows with the square
                        raise ValueError("too many statements")
                    needed = [part.source for part in missing_parts(parts, "submitted", {})]
                    return "\n".join([*needed, _TRY, submitted, ""])
                own.append(read_part(ast.unparse(statement), [statement], "own"))
        above += _definitions(source)
    raise LookupError(name)


@functools.cache  # each exercise of each learner reads the same cells
def _definitions(source: str) -> list[Part]:
    """Return what a cell defines, nothing if it cannot be read."""
    with contextlib.suppress(*BROKEN):
        return [
            read_part(ast.unparse(statement), [statement], "above")
            for statement in _parse(source)
            if _is_definition(statement)
        ]
    return []


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


def _is_definition(node: ast.stmt) -> bool:
    """Say whether a statement names something and runs next to nothing."""
    if isinstance(node, ast.Assign | ast.AnnAssign):
        return not any(isinstance(part, ast.Call) for part in ast.walk(node))
    return isinstance(node, ALONE)
