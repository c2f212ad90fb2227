"""Runs inside the sandbox: try a submitted function on the inputs of its exercise and describe what it did.

Only descriptions leave the sandbox, as nested lists; the parent compares them, for it alone judges.
"""

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf_helpers.lab.exercises import EXERCISES
from rlhf_helpers.lab.isolation import Raised, call
from rlhf_helpers.lab.judging import attempt, gradients, is_floating

for _name in EXERCISES:
    EXERCISES[_name]  # imports its lesson, before programs are forked


def try_out(name: str) -> dict[str, Any]:
    """Try `submitted` of the program on every input of an exercise.

    Returns:
        `outcomes`, `faults` and `gradients` (one entry per input, None where there is nothing to
        differentiate), as `judging.verdict` takes them, encoded by `describe`; `{"given": ...}` in place of
        them if no function was submitted.
    """
    function = sys.modules["program"].submitted
    if not callable(function):
        return {"given": "open" if function is None or function is Ellipsis else repr(function)[:200]}
    exercise = EXERCISES[name]
    outcomes, faults = attempt(exercise, function)
    slopes = [
        call(gradients, function, probe)[0] if any(map(is_floating, probe)) else None
        for probe in exercise.probes
    ]
    return {
        "outcomes": [describe(outcome) for outcome in outcomes],
        "faults": faults,
        "gradients": [describe(slope) for slope in slopes],
    }


def describe(value: Any) -> list[Any]:
    """Encode a value as [kind, ...] of plain lists, numbers and strings; what cannot be encoded is Raised."""
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return ["tensor", str(value.dtype).removeprefix("torch."), list(value.shape), value.tolist()]
    if isinstance(value, np.ndarray):
        return ["array", value.tolist()]
    if isinstance(value, Raised):
        return ["raised", str(value.kind), str(value.text)]
    if value is Ellipsis:
        return ["ellipsis"]
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) in (list, tuple):
        return [type(value).__name__, [describe(part) for part in value]]
    if type(value) is dict:
        return ["dict", [[describe(key), describe(part)] for key, part in value.items()]]
    if value is None or type(value) in (bool, int, float, str):
        return ["plain", value]
    return ["raised", "TypeError", f"a result of type {type(value).__name__} cannot be graded"]


def restore(described: list[Any]) -> Any:
    """Decode what `describe` encoded.

    Raises:
        ValueError: This is no such description.
    """
    kind, *parts = described
    if kind == "tensor":
        dtype, shape, data = parts
        return torch.tensor(data, dtype=getattr(torch, dtype)).reshape(shape)
    if kind == "array":
        return np.array(parts[0])
    if kind == "raised":
        return Raised(*parts)
    if kind == "ellipsis":
        return Ellipsis
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(restore(part) for part in parts[0])
    if kind == "dict":
        return {restore(key): restore(part) for key, part in parts[0]}
    if kind == "plain":
        return parts[0]
    raise ValueError(f"not a description of a value: {kind!r}")
