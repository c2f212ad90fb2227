"""Values as they cross between parent and child: exact builtin types, JSON, never pickle. Lesson 4."""

import math
from typing import Any

MAX_DEPTH, MAX_PARTS = 50, 20_000
SCALARS = (type(None), bool, int, float, str)
TAGS = {"list": list, "tuple": tuple, "dict": lambda parts: dict(zip(parts[::2], parts[1::2], strict=True))}


def encode(value: Any, budget: list[int] | None = None, depth: int = 0) -> Any:
    """A value as JSON: None, bool, int, float and str as they are; list, tuple and dict as [tag, *parts].

    Types are compared with `is`: an int's subclass with an __eq__ of its own is refused, and no method of a
    value is ever called. Raises TypeError for any other type, over 50 levels or 20,000 parts. Lesson 4.
    """
    budget, kind = budget or [MAX_PARTS], type(value)
    budget[0] -= 1
    if not budget[0] or depth > MAX_DEPTH:
        raise TypeError(f"a value deeper than {MAX_DEPTH} levels or of more than {MAX_PARTS} parts")
    if any(kind is scalar for scalar in SCALARS):
        return value
    if kind is dict:
        parts = [part for pair in value.items() for part in pair]
    elif kind is list or kind is tuple:
        parts = value
    else:
        raise TypeError(f"a value of type {type.__getattribute__(kind, '__name__')[:80]}")
    return [kind.__name__, *(encode(part, budget, depth + 1) for part in parts)]


def decode(value: Any, depth: int = 0) -> Any:
    """The value that encode wrote; raises TypeError, KeyError or ValueError for anything else. Lesson 4."""
    if type(value) is list and depth <= MAX_DEPTH:
        return TAGS[value[0]]([decode(part, depth + 1) for part in value[1:]])
    if type(value) not in SCALARS:
        raise TypeError(f"not written by encode: {type(value).__name__}")
    return value


def same(value: Any, expected: Any) -> bool:
    """Whether two values are alike in type and content: True is not 1, 2 is not 2.0, (1,) is not [1].

    Floats may differ by 1e-9 relatively; nan equals nan. What a test compares with, in the parent. Lesson 4.
    """
    if type(value) is not type(expected):
        return False
    if type(value) in (list, tuple):
        return len(value) == len(expected) and all(map(same, value, expected))
    if type(value) is dict:
        mine, theirs = ({(type(key), key): part for key, part in d.items()} for d in (value, expected))
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if type(value) is float:
        return math.isclose(value, expected) or (math.isnan(value) and math.isnan(expected))
    return value == expected
