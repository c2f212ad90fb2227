"""Ctrl-C and SIGTERM during a run: the step is finished and saved before the run stops."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class RunInterrupted(KeyboardInterrupt):
    """Raised by `Engine.steps` after a signal, when the step is finished and its checkpoint is written."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list within the block; a second signal acts as it did before, at once.

    Outside the main thread, where Python allows no handlers, the list stays empty.
    """
    received = []
    handlers = {}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # Not print: the signal may have come while Python was writing to the same stream.
        os.write(2, b"\nstopping at the end of this step, with a checkpoint\n")
        restore()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
