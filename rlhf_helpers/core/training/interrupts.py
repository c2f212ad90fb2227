"""Ctrl-C and SIGTERM during a run: the step is finished, and saved if checkpoints are on, before it ends."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_helpers.core.training.history import History


class RunInterrupted(KeyboardInterrupt):
    """Raised by `Engine.steps` after a signal, when the step is finished and its checkpoint is written.

    The rows of the finished steps are its `history`. In a notebook, where it is not caught, they are
    `sys.last_value.history` (after `import sys`), and the model keeps the weights it has reached.
    """

    def __init__(self, message: str, history: History) -> None:
        """Keep the history beside the message."""
        super().__init__(message)
        self.history = history

    def _render_traceback_(self) -> list[str]:
        """Show the message alone in a notebook: a run that a person stopped has no error to look for."""
        return [str(self)]


@contextmanager
def stop_signals(*, saves: bool) -> Iterator[list[int]]:
    """Collect signals in a list within the block; a second signal acts as it did before, at once.

    SIGINT (Ctrl-C, or "interrupt" in Jupyter) always; SIGTERM only where the run saves: without a checkpoint
    there is nothing to wait for. The list stays empty outside the main thread, where Python allows no
    handlers, and in a run within a step of another run, whose handlers stay.
    """
    received = []
    handlers = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Not print: the signal may have come while Python was writing to the same stream.
        os.write(2, b"\nstopping at the end of this step%s\n" % (b", with a checkpoint" if saves else b""))
        restore()

    outer = getattr(signal.getsignal(signal.SIGINT), "__qualname__", None)
    if threading.current_thread() is threading.main_thread() and outer != note.__qualname__:
        for number in (signal.SIGINT, signal.SIGTERM) if saves else (signal.SIGINT,):
            handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
