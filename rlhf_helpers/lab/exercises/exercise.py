"""What an exercise is: the right answer, inputs to try it on, and the mistakes that beginners make."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer: a learner's function that does the same on every probe has made this mistake."""

    message: str  # names the mistake and says where to look; never the finished solution
    wrong: Callable[..., Any]


def named(*parts: str | Callable[..., Any]) -> tuple[Mistake, ...]:
    """Mistakes from a flat list: each message, then the wrong functions that deserve it."""
    found: list[Mistake] = []
    for part in parts:
        if isinstance(part, str):
            message = part
        else:
            found.append(Mistake(message, part))
    return tuple(found)


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson; the probes must tell every mistake from the reference (a test holds that)."""

    name: str
    lesson: int
    reference: Callable[..., Any]  # what `check` hands back when the learner's function is not right
    probes: Callable[[], list[tuple[Any, ...]]]  # fresh positional arguments, one tuple per probe
    mistakes: tuple[Mistake, ...]
