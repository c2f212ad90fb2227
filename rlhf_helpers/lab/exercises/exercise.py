"""What an exercise is: the right answer, inputs to try it on, and the mistakes that beginners make."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Any]
Probe = tuple[Any, ...]


@dataclass(frozen=True)
class Mistake:
    """A known wrong answer: a learner's function that does the same on every probe has made this mistake."""

    message: str  # names the mistake and says where to look; never the finished solution
    wrong: Function


@dataclass(frozen=True)
class Exercise:
    """One exercise of a lesson; the probes must tell every mistake from the reference (a test holds that)."""

    reference: Function  # what `check` hands back when the learner's function is not right
    probes: list[Probe]  # positional arguments, which nothing may change
    mistakes: list[Mistake]
    trial: Function | None = None  # where an answer is judged by its effects: trial(answer, *probe)

    def on_probes(self, answer: Function) -> Function:
        """Turn an answer into a function of a probe: itself, or its trial (a run of training, say)."""
        return answer if self.trial is None else partial(self.trial, answer)


def exercise(
    reference: Function,
    probes: list[Probe],
    *parts: str | Function | tuple[str, ...],
    trial: Function | None = None,
    **quantities: Function,
) -> Exercise:
    """Make an exercise from a flat list of its mistakes: each message, then the wrong functions it is for.

    A wrong function names what it needs, as a test of pytest does: arguments of the reference, `right` (the
    right answer), or one of `quantities`, which are functions that name what they need in the same way. It
    is called with these alone, and only what is named is computed. A tuple (old, new, ...) stands for the
    reference with some of its source text replaced: see `edited`.
    """
    mistakes: list[Mistake] = []
    message = ""
    for part in parts:
        if isinstance(part, str):
            message = part
        else:
            wrong = edited(reference, *part) if isinstance(part, tuple) else part
            mistakes.append(Mistake(message, partial(_call, wrong, reference, quantities)))
    return Exercise(reference, probes, mistakes, trial)


def edited(function: Function, *texts: str) -> Function:
    """Make a wrong function from a right one: its source, each old text replaced by the new one after it."""
    function = inspect.unwrap(function)
    source = inspect.getsource(function)
    for old, new in zip(texts[::2], texts[1::2], strict=True):
        if old not in source:
            raise ValueError(f"{old!r} does not occur in {function.__name__}, so no mistake comes of it")
        source = source.replace(old, new)
    namespace = dict(function.__globals__)
    exec(source, namespace)
    return namespace[function.__name__]


def _call(function: Function, reference: Function, quantities: dict[str, Function], *probe: Any) -> Any:
    """Call a function with what its parameters name."""
    known = dict(zip(inspect.signature(reference).parameters, probe, strict=False))
    needed = inspect.signature(function).parameters
    for name in needed:
        if name == "right":
            known[name] = reference(*probe)
        elif name in quantities:
            known[name] = _call(quantities[name], reference, quantities, *probe)
    return function(**{name: known[name] for name in needed})


def table(*rows: Probe) -> list[Probe]:
    """Make probes of rows whose lists stand for tensors."""
    return [tuple(torch.tensor(cell) if isinstance(cell, list) else cell for cell in row) for row in rows]


def as_asked(function: Function, *trained: str) -> Function:
    """Let a function of the package be called by position alone, with a gradient by `trained` only."""
    names = inspect.signature(function).parameters

    @wraps(function)
    def reference(*args: Any, **settings: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | settings
        for name, value in given.items():
            if isinstance(value, Tensor) and name not in trained:
                given[name] = value.detach()
        return function(**given)

    return reference


def each(wrong: Function, *values: Any) -> list[Function]:
    """Give one wrong function for each value of the first parameter."""
    return [partial(wrong, value) for value in values]


def negated(right: Tensor) -> Tensor:
    """Flip the sign."""
    return -right


# Of a loss -logsigmoid(gap), where an exercise says what gap, chosen and rejected are.
LOG_LOSS_MISTAKES = (
    "the minus is missing: this is the log-likelihood, and a loss is its negative",
    negated,
    "there is no log-sigmoid: the bare difference never levels off, so rewards drift apart without limit",
    lambda gap: -gap,
    lambda gap: gap,
    "this is a sigmoid without its logarithm: -sigmoid(difference) is not a log-likelihood",
    lambda gap: -gap.sigmoid(),
    "this is the probability that the chosen answer wins, not a loss: take -log of it",
    lambda gap: gap.sigmoid(),
    "1 - probability is not a log-likelihood: take -log of the probability instead",
    lambda gap: (-gap).sigmoid(),
    "log(sigmoid(x)) underflows, log(1 + exp(-x)) overflows: large gaps give inf; use "
    "torch.nn.functional.logsigmoid(x)",
    lambda gap: -gap.sigmoid().log(),
    "a small constant inside the log hides the underflow: the loss is capped where it should grow, and "
    "the gradient is 0 there; use torch.nn.functional.logsigmoid",
    *each(lambda eps, gap: -(gap.sigmoid() + eps).log(), 1e-12, 1e-10, 1e-8, 1e-6),
    "this is the hinge loss: it is exactly zero once the difference reaches 1",
    lambda gap: F.relu(1 - gap),
    "each answer was judged alone, as in two classifications: this loss compares the two",
    lambda chosen, rejected: -F.logsigmoid(chosen) - F.logsigmoid(-rejected),
    "the rejected answer never enters the loss: a pair is a comparison",
    lambda chosen: -F.logsigmoid(chosen),
)
