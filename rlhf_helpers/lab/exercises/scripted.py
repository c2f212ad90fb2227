"""Stand-ins for models in the probes of an exercise: each answers by a script, and refuses a wrong call."""

from dataclasses import dataclass
from typing import Any

from rlhf_helpers.lab.exercises.exercise import Function


class WrongCall(BaseException):
    """Raised by a script that is called in a wrong way; `except Exception` does not swallow it."""


@dataclass(frozen=True, repr=False)
class Scripted:
    """A function with a name to show in a verdict."""

    name: str
    script: Function

    def __call__(self, *args: Any) -> Any:
        """Answer by the script."""
        return self.script(*args)

    def __repr__(self) -> str:
        """Show the name alone."""
        return self.name
