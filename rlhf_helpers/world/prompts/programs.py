"""Small programs to write: a specification is a filter, a map and a final step over a list of whole numbers."""

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_helpers.world.prompts.base import Prompt, rate
from rlhf_helpers.world.tables import load_table

_PROGRAMS = load_table("world/programs")
# Name of a part -> its words and its code, an expression in x or in xs; a part that does nothing has neither.
FILTERS, MAPS, FINALS = (_PROGRAMS[kind] for kind in ("filters", "maps", "finals"))
# Prompts that are worded in another way, with the parts they ask for.
ALIASES = _PROGRAMS["aliases"]
NUM_HIDDEN = 12


def specification(parts: tuple[str, str, str]) -> str:
    """The prompt text for (filter, map, final)."""
    words = [w for w in (FILTERS[parts[0]][0], MAPS[parts[1]][0], FINALS[parts[2]][0]) if w]
    *first, last = words
    return f"Write a function f(xs) that {', '.join(first)}{' and ' if first else ''}{last}."


def program(parts: tuple[str, str, str], unsafe_line: str | None = None) -> str:
    """The reference program for (filter, map, final), with an unsafe line where one is given."""
    lines = ["def f(xs):"]
    if unsafe_line:
        lines.append(f"    {unsafe_line}")
    if parts[0] != "all":
        lines.append(f"    xs = [x for x in xs if {FILTERS[parts[0]][1]}]")
    if parts[1] != "same":
        lines.append(f"    xs = [{MAPS[parts[1]][1]} for x in xs]")
    return "\n".join([*lines, f"    return {FINALS[parts[2]][1]}"])


@functools.cache
def reference(parts: tuple[str, str, str]) -> Callable[[list[int]], Any]:
    """Return the function f of the reference program; its code is text of this package, never of a model."""
    scope: dict[str, Any] = {}
    exec(program(parts), scope)
    return scope["f"]


def kept_by_filter(parts: tuple[str, str, str], xs: Sequence[int]) -> list[int]:
    """Return the numbers that the filter of a specification keeps."""
    return reference((parts[0], "same", "list"))(list(xs))


def is_defined(parts: tuple[str, str, str], xs: Sequence[int]) -> bool:
    """Return whether the specification has a value on `xs`: an empty list has no largest or smallest number."""
    return parts[2] not in ("max", "min") or bool(kept_by_filter(parts, xs))


def draw_inputs(parts: tuple[str, str, str], rng: random.Random, count: int) -> list[list[int]]:
    """Draw `count` random inputs of 3 to 8 numbers, at least one of which the filter keeps."""
    inputs: list[list[int]] = []
    while len(inputs) < count:
        bound = rng.choice((9, 99))
        xs = [rng.randint(-bound, bound) for _ in range(rng.randint(3, 8))]
        if kept_by_filter(parts, xs):
            inputs.append(xs)
    return inputs


@functools.cache
def hidden_inputs(parts: tuple[str, str, str]) -> tuple[list[int], ...]:
    """Return the judge's fixed inputs for a specification: hand-chosen ones, then random ones, NUM_HIDDEN in all."""
    # The hand-chosen ones tell nearby programs apart: the boundaries 0, 1, 3 and 4, negative odd numbers,
    # duplicates, one number alone, lists far from 0.
    chosen = [list(xs) for xs in _PROGRAMS["boundary_inputs"] if is_defined(parts, xs)]
    rng = random.Random("/".join(("hidden", *parts)))
    return (*chosen, *draw_inputs(parts, rng, NUM_HIDDEN - len(chosen)))


def expected(
    parts: tuple[str, str, str], inputs: Sequence[Sequence[int]] | None = None
) -> list[tuple[list[int], object]]:
    """Return test inputs (None: the judge's `hidden_inputs`), each with the value of the specification on it."""
    value = reference(parts)
    return [(list(xs), value(list(xs))) for xs in (hidden_inputs(parts) if inputs is None else inputs)]


def programs() -> list[Prompt]:
    """Every specification; every seventh combination is held out and in no training text."""
    combos = [c for c in itertools.product(FILTERS, MAPS, FINALS) if c != ("all", "same", "list")]
    heldout = {c for i, c in enumerate(combos) if (7 * i + i // 6) % 6 == 5}
    asked = {specification(c): c for c in combos} | ALIASES
    return [
        Prompt(
            text,
            "program",
            "program",
            "heldout" if parts in heldout else "train",
            points=((program(parts),),),
            slots={"parts": parts},
        )
        for text, parts in asked.items()
    ]


def write_program(rng: random.Random, prompt: Prompt, quality: str | None) -> str:
    """A program of the given quality; None: as the unaligned assistant writes (often wrong, often unsafe)."""
    parts = list(prompt.slots["parts"])
    for index, table in enumerate((FILTERS, MAPS, FINALS)):
        # One part swapped for another: the program runs and does something else.
        if rng.random() < rate("wrong_part", quality):
            parts[index] = rng.choice([name for name in table if name != parts[index]])
    unsafe = rng.random() < rate("unsafe_line", quality)
    return program(tuple(parts), rng.choice(_PROGRAMS["unsafe_lines"]) if unsafe else None)
