"""The verdict on a learner's function: its values, its gradient, and what it changes besides."""

import copy
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_helpers.lab.exercises.exercise import Exercise, Function, Probe
from rlhf_helpers.lab.isolation import Raised, call, standard_settings


@dataclass(frozen=True)
class Verdict:
    """State of one attempt ("solved", "wrong" or "open") and what to tell the learner."""

    state: str
    message: str


def judge(exercise: Exercise, my_fn: Any) -> Verdict:
    """Compare a function with the reference on every probe; name the mistake when it is a known one.

    "open" means not begun: the stub, which raises NotImplementedError without a text, a function that
    returns ..., or None or ... in place of a function. A function that returns None has been begun: it lacks
    a return. Whatever the function does, the settings of the notebook stay as they are (see `isolation`).
    """
    with standard_settings():
        return _judge(exercise, my_fn)


def _judge(exercise: Exercise, my_fn: Any) -> Verdict:
    if my_fn is None or my_fn is Ellipsis:
        return Verdict("open", "not attempted yet.")
    if not callable(my_fn):
        return Verdict("wrong", f"not right yet: give check the function itself, not {_show(my_fn)}.")
    outcomes, faults = attempt(exercise, my_fn)
    return verdict(
        exercise, outcomes, faults, lambda index: call(gradients, my_fn, exercise.probes[index])[0]
    )


def verdict(
    exercise: Exercise, mine: list[Any], faults: list[str], gradients_of: Callable[[int], Any]
) -> Verdict:
    """Judge what a function did, wherever it ran.

    Args:
        exercise: The exercise.
        mine: The outcome on each probe.
        faults: What the function did besides, in words.
        gradients_of: Gives `gradients` of the function at the probe of an index, or Raised; asked for right
            values only.
    """
    if _is_stub(mine[0]):
        return Verdict("open", "not attempted yet.")
    probes = exercise.probes
    expected = [_outcome(exercise.on_probes(exercise.reference), probe) for probe in probes]
    wrong_at = [i for i, (got, want) in enumerate(zip(mine, expected, strict=True)) if not same(got, want)]
    if not wrong_at:
        faults = faults + _gradient_faults(exercise, gradients_of)
        if faults:
            return Verdict("wrong", f"not right yet: the values are right, but {faults[0]}.")
        return Verdict("solved", "right. Well done!")
    for mistake in exercise.mistakes:
        wrong = exercise.on_probes(mistake.wrong)
        if all(same(got, _outcome(wrong, probe)) for got, probe in zip(mine, probes, strict=True)):
            return Verdict("wrong", f"not right yet: {mistake.message}.")
    first = wrong_at[0]
    difference = _difference(_names(exercise), probes[first], mine[first], expected[first])
    return Verdict("wrong", f"not right yet: {difference}.")


def _names(exercise: Exercise) -> list[str]:
    return list(inspect.signature(exercise.on_probes(exercise.reference)).parameters)


def _is_stub(outcome: Any) -> bool:
    if isinstance(outcome, Raised):  # compared only then: an array overloads ==
        return outcome == Raised("NotImplementedError", "")
    return outcome is Ellipsis


def attempt(exercise: Exercise, my_fn: Function) -> tuple[list[Any], list[str]]:
    """Return the outcomes of the learner's function, and faults: what it changes besides."""
    outcomes: list[Any] = []
    faults: list[str] = []
    probes, names = exercise.probes, _names(exercise)
    for probe in probes:
        args = copy.deepcopy(probe)
        outcome, settings = call(exercise.on_probes(my_fn), *args)
        outcomes.append(outcome)
        for name, arg, original in zip(names, args, probe, strict=False):
            if not same(arg, original):
                faults.append(f"your function changes its input {name}, which belongs to the caller: copy it")
        faults += [f"your function changes {name} for the rest of the notebook" for name in settings]
        if isinstance(outcome, Tensor) and outcome.is_inference():
            faults.append("your function uses torch.inference_mode(), so that training cannot use its result")
        if isinstance(outcome, Raised) and outcome.kind == "TimeoutError":  # do not wait again for each probe
            outcomes += [outcome] * (len(probes) - len(outcomes))
            break
    return outcomes, faults


def _outcome(function: Function, probe: Probe) -> Any:
    """Call one of our own functions, the reference or a known mistake; these leave the probe as it is."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return function(*probe)
    except Exception as error:  # some references refuse a probe, and so should the learner
        return Raised(type(error).__name__, str(error))


def same(got: Any, want: Any) -> bool:
    """Compare two outcomes; floating-point numbers up to a tolerance relative to their size."""
    if isinstance(got, Raised) or isinstance(want, Raised):
        return isinstance(got, Raised) and isinstance(want, Raised) and got.kind == want.kind
    if isinstance(want, Tensor):
        return isinstance(got, Tensor) and _same_tensor(got, want)
    if isinstance(want, list | tuple):
        return isinstance(got, list | tuple) and len(got) == len(want) and all(map(same, got, want))
    if isinstance(got, np.generic):
        got = got.item()  # a number of numpy's is a number
    if isinstance(want, float) and isinstance(got, int) and abs(got) < 2**53:
        got = float(got)
    if isinstance(want, float) and isinstance(got, float):
        return _same_tensor(torch.tensor(got), torch.tensor(want))
    return type(got) is type(want) and got == want


def _same_tensor(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.layout != want.layout or got.device != want.device:
        return False
    return _same_kind(got, want) and torch.allclose(
        got.double(), want.double(), rtol=1e-4, atol=1e-7, equal_nan=True
    )


def _same_kind(got: Tensor, want: Tensor) -> bool:
    """Say whether one dtype can stand for the other: any float for a float, otherwise only the same.

    A mask of 0 and 1 would pick rows 0 and 1, and cross-entropy takes no int32 labels.
    """
    return got.dtype == want.dtype or (got.is_floating_point() and want.is_floating_point())


def gradients(function: Function, probe: Probe) -> list[Tensor | None]:
    """Differentiate the summed result by each floating-point argument; None where no gradient arrives."""
    args = copy.deepcopy(probe)
    inputs = [arg.requires_grad_() for arg in args if is_floating(arg)]
    out = function(*args)
    if not (isinstance(out, Tensor) and out.requires_grad):
        return [None] * len(inputs)
    return list(torch.autograd.grad(out.sum(), inputs, allow_unused=True))


def is_floating(arg: Any) -> bool:
    """Say whether a gradient with respect to this argument can be asked for."""
    return isinstance(arg, Tensor) and arg.is_floating_point()


def _gradient_faults(exercise: Exercise, gradients_of: Callable[[int], Any]) -> list[str]:
    """Say what is wrong with the gradient of a function whose values are right."""
    faults: list[str] = []
    for index, probe in enumerate(exercise.probes):
        if exercise.trial or not any(map(is_floating, probe)):
            continue  # nothing to differentiate by; the reference may even refuse this probe
        wanted = gradients(exercise.reference, probe)
        if all(want is None for want in wanted):
            continue  # a measure, not a loss: nothing is trained through it
        got = gradients_of(index)
        if isinstance(got, Raised):  # .numpy() of a tensor that requires a gradient raises here
            faults.append(f"with gradients on it raised {got.kind}: {got.text}")
            continue
        names = [name for name, arg in zip(_names(exercise), probe, strict=False) if is_floating(arg)]
        for name, mine, want in zip(names, got, wanted, strict=True):
            if want is not None and mine is None:
                faults.append(
                    f"no gradient reaches {name}, so training would not learn "
                    "(detach, .item(), .numpy() or torch.tensor(...) cut it off)"
                )
            elif want is not None and not torch.allclose(mine, want, rtol=1e-3, atol=1e-6):
                faults.append(
                    f"the gradient with respect to {name} is {_show(mine)}, and should be {_show(want)}"
                )
    return faults


def _difference(names: list[str], probe: Probe, got: Any, want: Any) -> str:
    given = ", ".join(f"{name} = {_show(arg)}" for name, arg in zip(names, probe, strict=False))
    if isinstance(got, Raised):
        return f"your function raised {got.kind}: {got.text} (with {given})"
    return f"with {given} expected {_show(want)}, got {_show(got)}{_hint(got, want)}"


def _hint(got: Any, want: Any) -> str:
    """Name the kind of thing that came back where it is not the kind that was asked for."""
    if got is None:
        return ": is a return missing? (A body of only ... or pass returns None, too)"
    if isinstance(got, np.ndarray):
        return ": this is a numpy array; torch.from_numpy makes a tensor of it, .item() a number"
    if isinstance(got, Tensor) and isinstance(want, int | float):
        return ": this is a tensor; .item() makes a Python number of it"
    if isinstance(got, Tensor) and isinstance(want, Tensor):
        if got.numel() < want.numel():
            return f": its shape is {tuple(got.shape)}, not {tuple(want.shape)}, as if averaged or summed"
        if not _same_kind(got, want):
            return f": its dtype is {got.dtype}, not {want.dtype}"
    return ""


def _show(value: Any) -> str:
    if isinstance(value, Raised):
        return f"an error ({value.kind})"
    if not isinstance(value, Tensor):
        text = " ".join(repr(value).split())[:200]  # one line, whatever it is
        return f"{text} ({type(value).__name__})" if isinstance(value, str | bytes) else text
    if value.numel() > 24 or value.layout != torch.strided or value.device.type == "meta":
        return f"a tensor of shape {tuple(value.shape)}"
    rounded = value.detach().double().mul(1e4).round().div(1e4) if value.is_floating_point() else value
    return f"{rounded.tolist()} (shape {tuple(value.shape)})"
