"""Runs inside the sandbox: try a submitted function on the inputs of its exercise and describe what it did.

Only descriptions leave the sandbox, as JSON; the parent compares them, for it alone judges.
"""

import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.isolation import Raised, call
from rlhf_helpers.lab.judging import attempt, gradients, is_floating

for _name in EXERCISES:
    EXERCISES[_name]  # imports its lesson, before programs are forked


class _WatchedModule(ModuleType):
    """A module of the grader: the sandbox notes when a program replaces something in it."""

    def __setattr__(self, name: str, value: Any) -> None:
        sys.audit("module.__setattr__", name)
        super().__setattr__(name, value)


for _name in ("exercises", "isolation", "judging", "classroom.worker"):
    sys.modules[f"rlhf_helpers.lab.{_name}"].__class__ = _WatchedModule


def try_out(name: str) -> str:
    """Try `submitted` of the program on every input of an exercise.

    Returns:
        `outcomes`, `faults` and `gradients` (one entry per input, None where there is nothing to
        differentiate), as `judging.verdict` takes them, or `given` if no function was submitted; encoded by
        `describe`.
    """
    function = sys.modules["program"].submitted
    if not callable(function):
        return describe({"given": function})
    exercise = EXERCISES[name]
    outcomes, faults = attempt(exercise, function)
    slopes = [
        call(gradients, function, probe)[0] if any(map(is_floating, probe)) else None
        for probe in exercise.probes
    ]
    return describe({"outcomes": outcomes, "faults": faults, "gradients": slopes})


def describe(value: Any) -> str:
    """Encode a value as JSON; what JSON cannot hold becomes a dict of its parts, or Raised.

    Keys of dicts must be text.
    """
    return json.dumps(value, default=_parts)


def _parts(value: Any) -> Any:
    """Take apart what JSON cannot hold."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_complex():
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": value.tolist(), "dtype": dtype, "shape": list(value.shape)}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if value is Ellipsis:
        return {"ellipsis": True}
    if not isinstance(value, Raised):
        value = Raised("TypeError", f"a result of type {type(value).__name__} cannot be graded")
    return {"raised": [str(value.kind), str(value.text)]}


def restore(described: str) -> Any:
    """Decode what `describe` encoded; a tuple comes back as a list, which is judged alike.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError: `describe` did not
            make it.
    """
    return json.loads(described, object_hook=_whole)


def _whole(parts: dict[str, Any]) -> Any:
    """Put together what `_parts` took apart."""
    if "tensor" in parts:
        return torch.tensor(parts["tensor"], dtype=getattr(torch, parts["dtype"])).reshape(parts["shape"])
    if "array" in parts:
        return np.array(parts["array"])
    if "raised" in parts:
        return Raised(*parts["raised"])
    return Ellipsis if "ellipsis" in parts else parts
