"""Call a learner's function so that it cannot change the notebook, end the kernel or run for ever."""

import builtins
import contextlib
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch

SECONDS = 30.0  # far more than any right answer needs, even one that tries every subset


def _set_default_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


# What a function could leave changed for the rest of the notebook: how to read it, as something that ==
# compares, and how to set it.
SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the gradient mode (use `with torch.no_grad():`)": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "the default device": (torch.get_default_device, _set_default_device),
    "the deterministic mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "the number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's random numbers": (
        lambda: torch.get_rng_state().tolist(),
        lambda state: torch.set_rng_state(torch.tensor(state, dtype=torch.uint8)),
    ),
    "numpy's random numbers": (
        lambda: [np.asarray(part).tolist() for part in np.random.get_state()],
        np.random.set_state,
    ),
    "Python's random numbers": (random.getstate, random.setstate),
    "numpy's error handling": (np.geterr, lambda errors: np.seterr(**errors)),
}


@dataclass(frozen=True)
class Raised:
    """Stands for the outcome of a call that raised."""

    kind: str
    text: str


class _TimeIsUp(BaseException):
    """Not an Exception, so that `except Exception` in a loop does not swallow it."""


class _Interrupted(BaseException):
    """A person's interrupt, told apart from a KeyboardInterrupt that the function raises itself."""


def read_settings() -> dict[str, Any]:
    """Read all SETTINGS."""
    return {name: read() for name, (read, _) in SETTINGS.items()}


def restore_settings(before: dict[str, Any]) -> list[str]:
    """Put back the settings that differ from `before`; return their names."""
    changed = [name for name, value in read_settings().items() if value != before[name]]
    for name in changed:
        _, put = SETTINGS[name]
        put(before[name])
    return changed


@contextlib.contextmanager
def standard_settings() -> Iterator[None]:
    """Compute gradients, in float32, on the CPU, and leave every setting as it was."""
    before = read_settings()
    try:
        with warnings.catch_warnings(), torch.inference_mode(False):
            torch.set_grad_enabled(True)
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
            yield
    finally:
        restore_settings(before)


def call(function: Callable[..., Any], *args: Any) -> tuple[Any, list[str]]:
    """Return function(*args), or `Raised`, and the names of the settings that it left changed.

    The settings are put back. Everything that the function raises is an outcome, SystemExit too; only a
    person's interrupt goes through. It stops after SECONDS in the main thread of a system with SIGALRM; a
    single long call into C is not stopped. What ends the process from outside Python (a crash in C, kill)
    cannot be caught here.
    """
    with warnings.catch_warnings(), torch.inference_mode(False):
        before = read_settings()
        try:
            with _signals(), _no_way_out():
                outcome = function(*args)
        except _Interrupted:
            raise KeyboardInterrupt from None
        except _TimeIsUp:
            outcome = Raised("TimeoutError", f"it was stopped after {SECONDS:g} s: does a loop never end?")
        except BaseException as error:
            outcome = Raised(type(error).__name__, " ".join(str(error).split())[:200])
        finally:
            changed = restore_settings(before)
    return outcome, changed


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Raise _TimeIsUp after SECONDS, and _Interrupted for Ctrl-C; signals reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with contextlib.ExitStack() as stack:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, _raise(_Interrupted)))
        if hasattr(signal, "setitimer"):
            stack.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, _raise(_TimeIsUp)))
            stack.callback(
                signal.setitimer, signal.ITIMER_REAL, *signal.setitimer(signal.ITIMER_REAL, SECONDS)
            )
        yield


def _raise(error: type[BaseException]) -> Callable[[int, FrameType | None], None]:
    def handler(number: int, frame: FrameType | None) -> None:
        raise error

    return handler


@contextlib.contextmanager
def _no_way_out() -> Iterator[None]:
    """Raise SystemExit where the function would end the process at once."""
    ways: list[tuple[Any, str]] = [(os, "_exit"), (os, "abort"), (builtins, "exit"), (builtins, "quit")]
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()) is not None:
        ways.append((shell, "ask_exit"))  # what exit() does in a notebook
    with contextlib.ExitStack() as stack:
        for owner, name in ways:
            stay = _stay(getattr(owner, name, None), os.getpid())
            stack.enter_context(mock.patch.object(owner, name, stay, create=True))
        yield


def _stay(leave: Callable[..., Any] | None, pid: int) -> Callable[..., Any]:
    def stay(*args: Any, **kwargs: Any) -> Any:
        if leave is not None and os.getpid() != pid:
            return leave(*args, **kwargs)  # a child process may end
        raise SystemExit("it would end the kernel")

    return stay
