"""Ctrl-C and SIGTERM during a run: the step is finished and saved before the run stops."""

import os
import signal
import threading
from types import FrameType


class RunInterrupted(KeyboardInterrupt):
    """Raised by `Engine.steps` after a signal, when the step is finished and its checkpoint is written."""


class StopSignals:
    """Notes SIGINT and SIGTERM until `close`; outside the main thread, where Python forbids it, none."""

    def __init__(self, *, once: bool) -> None:
        """Replace the handlers of both signals.

        Args:
            once: a second signal acts as before, at once. Not for several processes: a launcher passes
                Ctrl-C on to a process that has already received it from the terminal.
        """
        self.received = 0
        self._once = once
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = 1
        # Not print: the signal may have come while Python was writing to the same stream.
        os.write(2, b"\nstopping at the end of this step, with a checkpoint\n")
        if self._once:
            self.close()

    def close(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
