"""Exercise checks: print the verdict on a learner's function, and keep progress that survives a restart."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from rlhf_helpers.core.files import write_atomically
from rlhf_helpers.lab.exercises import EXERCISES, LESSONS
from rlhf_helpers.lab.judging import judge

# What could not be saved, by progress file; None: RLHF_PROGRESS is empty, and nothing is saved.
_unsaved: dict[Path | None, dict[str, str]] = {}


def check(name: str, my_fn: Callable[..., Any] | None) -> Callable[..., Any]:
    """Print the verdict on `my_fn`; return it when right, the package's function when open or wrong.

    Never stops the notebook: a crash of `my_fn` is reported in one line. Raises ValueError only for a name
    that no exercise has.
    """
    if name not in EXERCISES:
        raise ValueError(f"check: no exercise is named {name!r}; there are {', '.join(sorted(EXERCISES))}")
    exercise = EXERCISES[name]
    verdict = judge(exercise, my_fn)
    print(f"{name}: {verdict.message}")
    if verdict.state == "solved":
        _record(name, "solved")
        return my_fn
    if verdict.state == "wrong":
        _record(name, "tried")
    print("The lesson goes on with the package's own function; change yours and run this cell again.")
    return exercise.reference


def progress() -> pd.DataFrame:
    """Table of all exercises: lesson, exercise and its state ("solved", "tried" or "open")."""
    try:
        states = _load(_path())
    except OSError as error:
        print(f"progress: not read ({error}); set RLHF_PROGRESS to a file that can be read.")
        states = {}
    rows = [(lesson, name, states.get(name, "open")) for name, lesson in LESSONS.items()]
    return pd.DataFrame(rows, columns=["lesson", "exercise", "state"])


def _path() -> Path | None:
    """The progress file: RLHF_PROGRESS or a file in the working folder; None (memory only) when empty."""
    name = os.environ.get("RLHF_PROGRESS", ".rlhf_progress.json")
    return Path(name).absolute() if name else None


def _load(path: Path | None) -> dict[str, str]:
    """Read the states in the file, and add those that could not be saved there."""
    states = {} if path is None else _read(path)
    for name, state in _unsaved.get(path, {}).items():
        if states.get(name) != "solved":  # for good
            states[name] = state
    return states


def _read(path: Path) -> dict[str, str]:
    try:
        states = json.loads(path.read_text(encoding="utf8"))["exercises"]
        if not isinstance(states, dict) or not set(states.values()) <= {"solved", "tried"}:
            raise ValueError("states must be 'solved' or 'tried'")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError) as error:  # ValueError covers bad JSON and bad UTF-8
        aside = next(p for n in range(10**6) if not (p := path.with_name(f"{path.name}.broken-{n}")).exists())
        path.rename(aside)
        print(f"progress: {path} was broken ({error}); it is kept as {aside.name}, and a new one starts.")
        return {}
    return states


def _record(name: str, state: str) -> None:
    """Note a state; what cannot be saved stays in memory, and is saved with the next state that can."""
    path = _path()
    unsaved = _unsaved.setdefault(path, {})
    if unsaved.get(name) != "solved":
        unsaved[name] = state
    if path is None:
        return
    try:
        with FileLock(f"{path}.lock"):  # another kernel may be saving too
            states = {"exercises": _load(path)}
            write_atomically(path, json.dumps(states, indent=1, sort_keys=True).encode())
        del _unsaved[path]
    except OSError as error:
        print(f"progress: not saved ({error}); set RLHF_PROGRESS to a file that can be written.")
