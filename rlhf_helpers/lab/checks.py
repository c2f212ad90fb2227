"""Exercise checks: the verdict on a learner's function, named mistakes, progress that survives a restart."""

import contextlib
import copy
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rlhf_helpers.lab.exercises import EXERCISES, Exercise

_session: dict[str, str] = {}  # the record of this kernel, used alone where RLHF_PROGRESS is empty


@dataclass(frozen=True)
class Verdict:
    """State of one attempt ("solved", "wrong" or "open") and what to tell the learner."""

    state: str
    message: str


@dataclass(frozen=True)
class _Raised:
    """Stands for the outcome of a probe on which the function raised."""

    kind: str
    text: str


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


def judge(exercise: Exercise, my_fn: Callable[..., Any] | None) -> Verdict:
    """Compare a function with the reference on every probe; name the mistake when it is a known one."""
    probes = exercise.probes()
    mine = _outcomes(my_fn, probes) if my_fn is not None else []
    if not mine or _is_stub(mine[0]):
        return Verdict("open", "not attempted yet.")
    expected = _outcomes(exercise.reference, probes)
    wrong_at = [i for i, (got, want) in enumerate(zip(mine, expected, strict=True)) if not _same(got, want)]
    if not wrong_at:
        lost = _lost_gradient(exercise, my_fn, probes)
        return Verdict("wrong", f"not right yet: {lost}") if lost else Verdict("solved", "right. Well done!")
    for mistake in exercise.mistakes:
        if all(map(_same, mine, _outcomes(mistake.wrong, probes))):
            return Verdict("wrong", f"not right yet: {mistake.message}.")
    return Verdict(
        "wrong", _first_failure(exercise, probes[wrong_at[0]], mine[wrong_at[0]], expected[wrong_at[0]])
    )


def progress() -> pd.DataFrame:
    """Table of all exercises: lesson, exercise and its state ("solved", "tried" or "open")."""
    states = _load()
    rows = [(e.lesson, e.name, states.get(e.name, "open")) for e in EXERCISES.values()]
    return pd.DataFrame(rows, columns=["lesson", "exercise", "state"])


def _outcomes(fn: Callable[..., Any], probes: Iterable[tuple[Any, ...]]) -> list[Any]:
    outcomes = []
    for probe in probes:
        try:  # copies: a function that works in place must not spoil the next comparison
            outcomes.append(fn(*copy.deepcopy(probe)))
        except Exception as error:  # whatever the learner's code raises is a verdict, not a stop
            outcomes.append(_Raised(type(error).__name__, " ".join(str(error).split())[:200]))
    return outcomes


def _is_stub(outcome: Any) -> bool:
    if isinstance(outcome, _Raised):  # compared only then: an array overloads ==
        return outcome == _Raised("NotImplementedError", "")
    return outcome is None or outcome is Ellipsis


def _same(got: Any, want: Any) -> bool:
    """Equality of two outcomes; tensors by shape, kind of number and a tolerance relative to the value."""
    if isinstance(got, _Raised) or isinstance(want, _Raised):
        return isinstance(got, _Raised) and isinstance(want, _Raised) and got.kind == want.kind
    if isinstance(want, Tensor):
        if not isinstance(got, Tensor) or got.shape != want.shape:
            return False
        if got.dtype.is_floating_point != want.dtype.is_floating_point:
            return False
        if (got.dtype == torch.bool) != (want.dtype == torch.bool):  # a 0/1 tensor picks rows 0 and 1
            return False
        return torch.allclose(got.double(), want.double(), rtol=1e-4, atol=1e-7, equal_nan=True)
    if isinstance(want, list | tuple):
        return isinstance(got, list | tuple) and len(got) == len(want) and all(map(_same, got, want))
    if isinstance(want, float):
        return isinstance(got, int | float) and _same(torch.tensor(float(got)), torch.tensor(want))
    return type(got) is type(want) and got == want


def _gradients(fn: Callable[..., Any], probe: tuple[Any, ...]) -> list[Tensor | None]:
    """Gradient of the summed result by each floating-point argument; None where none arrives."""
    leaves = [
        a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in probe
    ]
    with torch.enable_grad():
        out = fn(*leaves)
    inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not (isinstance(out, Tensor) and out.requires_grad):
        return [None] * len(inputs)
    return list(torch.autograd.grad(out.sum(), inputs, allow_unused=True))


def _lost_gradient(exercise: Exercise, fn: Callable[..., Any], probes: list[tuple[Any, ...]]) -> str:
    """Say what is wrong with the gradient of a function whose values are right; empty when nothing is."""
    names = list(inspect.signature(exercise.reference).parameters)
    for probe in probes:
        if not any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in probe):
            continue  # nothing to differentiate by; the reference may even refuse this probe
        wanted = _gradients(exercise.reference, probe)
        if all(want is None for want in wanted):
            continue  # a measure, not a loss: nothing is trained through it
        try:
            got = _gradients(fn, probe)
        except Exception as error:  # .numpy() of a tensor that requires a gradient raises here
            return f"the values are right, but with gradients on it raised {type(error).__name__}: {error}"
        floating = [
            n for n, a in zip(names, probe, strict=False) if isinstance(a, Tensor) and a.is_floating_point()
        ]
        for name, mine, want in zip(floating, got, wanted, strict=True):
            if want is not None and mine is None:
                return (
                    f"the values are right, but no gradient reaches {name}, so training would not learn "
                    "(detach, .item(), .numpy() or torch.tensor(...) cut it off)."
                )
            if want is not None and not torch.allclose(mine, want, rtol=1e-3, atol=1e-6):
                return (
                    f"the values are right, but by {name} the gradient is {_show(mine)}, not {_show(want)}."
                )
    return ""


def _first_failure(exercise: Exercise, probe: tuple[Any, ...], got: Any, want: Any) -> str:
    names = inspect.signature(exercise.reference).parameters
    given = ", ".join(f"{name} = {_show(arg)}" for name, arg in zip(names, probe, strict=False))
    if isinstance(got, _Raised):
        return f"not right yet: your function raised {got.kind}: {got.text} (with {given})."
    return f"not right yet: with {given} expected {_show(want)}, got {_show(got)}."


def _show(value: Any) -> str:
    if isinstance(value, _Raised):
        return f"an error ({value.kind})"
    if not isinstance(value, Tensor):
        text = " ".join(repr(value).split())[:200]  # one line, whatever it is
        return f"{value!r} ({type(value).__name__})" if isinstance(value, str | bytes) else text
    if value.numel() > 24:
        return f"a tensor of shape {tuple(value.shape)}"
    rounded = value.detach().double().mul(1e4).round().div(1e4) if value.is_floating_point() else value
    return f"{rounded.tolist()} (shape {tuple(value.shape)})"


def _path() -> Path | None:
    """The progress file: RLHF_PROGRESS or a file in the working folder; None (memory only) when empty."""
    name = os.environ.get("RLHF_PROGRESS", ".rlhf_progress.json")
    return Path(name) if name else None


def _load() -> dict[str, str]:
    path = _path()
    if path is None or not path.exists():
        return dict(_session)
    try:
        states = json.loads(path.read_text(encoding="utf8"))["exercises"]
        if not isinstance(states, dict) or not set(states.values()) <= {"solved", "tried"}:
            raise ValueError("states must be 'solved' or 'tried'")
    except (ValueError, KeyError, TypeError) as error:  # ValueError covers bad JSON and bad UTF-8
        aside = next(p for n in range(10**6) if not (p := path.with_name(f"{path.name}.broken-{n}")).exists())
        path.rename(aside)
        print(
            f"progress: {path} was not readable ({error}); it is kept as {aside.name}, and a new one starts."
        )
        return dict(_session)
    return states


def _record(name: str, state: str) -> None:
    """Note a state, "solved" for good; the file is written beside and moved over, so never half written."""
    try:
        states = _load()
        if states.get(name) != "solved":
            states[name] = state
        _session.update(states)
        if (path := _path()) is None:
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf8") as file:
                json.dump({"exercises": states}, file, indent=1, sort_keys=True)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        print(f"progress: not saved ({error}); set RLHF_PROGRESS to a file that can be written.")
