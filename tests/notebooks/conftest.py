"""Runs the lessons with nbval (lax), minus its blind spots.

nbval 0.11 lets five faults pass: a failed magic (the status of the reply is never read), a check-output cell
with nothing stored to check against, a raises-exception cell that raises nothing, a dead kernel (noticed at
the time-out of the cell only), and a flood of failures that follow from the first. The classes below close
them. The lessons hang under this folder, so no command can run them without the guards.
"""

import time
from pathlib import Path
from queue import Empty

import pytest
from nbval.plugin import IPyNbCell, IPyNbFile

LESSONS = Path(__file__).parents[2] / "notebooks"
CELL_TIMEOUT_S = 300
ALIVE_EVERY_S = 2
# no network, the lesson's own model and data, a learner's progress neither read nor written
LESSON_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "RLHF_PROGRESS": ""}
UNSET = ("RLHF_MODEL", "RLHF_DATA")


def guarded_await_reply(kernel, msg_id, timeout=None):
    """Waits for the reply of one request, asks every 2 s whether the kernel lives, returns the reply."""
    deadline = time.monotonic() + (timeout or CELL_TIMEOUT_S)
    while True:
        try:
            message = kernel.get_message("shell", timeout=min(ALIVE_EVERY_S, deadline - time.monotonic()))
        except Empty:
            if not kernel.is_alive():
                kernel.kc.stop_channels()
                raise RuntimeError("the kernel died while it ran this cell") from None
            if time.monotonic() >= deadline:
                raise
            continue
        if message["parent_header"].get("msg_id") == msg_id:
            kernel.last_reply = message["content"]
            return


class GuardedCell(IPyNbCell):
    def runtest(self):
        if self.parent.failed_at is not None:
            pytest.skip(f"cell {self.parent.failed_at} of this notebook failed")
        try:
            if self.options["check"] and not (self.cell.execution_count and self.cell.outputs):
                self.raise_cell_error("This cell asks for an output check, but the notebook stores no output")
            self.parent.kernel.last_reply = {"status": "none"}
            super().runtest()
            status = self.parent.kernel.last_reply["status"]
            if self.options["check_exception"] and status != "error":
                self.raise_cell_error("This cell is marked as raising an exception, but it raised none")
            if not self.options["check_exception"] and status != "ok":
                self.raise_cell_error(f"The kernel reported status {status!r} (a failed magic?)")
        except pytest.skip.Exception:
            raise
        except BaseException:
            self.parent.failed_at = self.cell_num
            raise


class GuardedNotebook(IPyNbFile):
    failed_at = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.compare_outputs = False  # lax: only the cells that ask for it

    def setup(self):
        self.config.option.nbval_current_env = True  # the interpreter that runs pytest, not a kernel spec
        self.config.option.nbval_cell_timeout = CELL_TIMEOUT_S
        with pytest.MonkeyPatch.context() as environment:
            for name, value in LESSON_ENVIRONMENT.items():
                environment.setenv(name, value)
            for name in UNSET:
                environment.delenv(name, raising=False)
            super().setup()
        self.kernel.await_reply = lambda msg_id, timeout=None: guarded_await_reply(
            self.kernel, msg_id, timeout
        )

    def collect(self):
        for cell in super().collect():
            guarded = GuardedCell.from_parent(
                self, name=cell.name, cell_num=cell.cell_num, cell=cell.cell, options=cell.options
            )
            guarded.add_marker(pytest.mark.slow)
            yield guarded


class Lessons(pytest.File):
    def collect(self):
        for path in sorted(LESSONS.glob("*.ipynb")):
            yield GuardedNotebook.from_parent(self, path=path)


def pytest_collect_file(file_path, parent):
    """The lessons run, guarded, when this folder is tested, since they stand where this file stands."""
    return Lessons.from_parent(parent, path=file_path) if file_path == Path(__file__) else None
