"""Progress of runs and of other long work: bars that leave nothing behind, on screen or in a notebook.

A notebook may show more of a run: it puts another class into `view_class` (`rlhf_helpers.lab.live` does).
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")
DELAY_S = 3.0  # work that takes less shows no bar


class _VanishingBar(tqdm):
    """A notebook bar; tqdm's own stays in the saved notebook as text, and on screen after an interrupt."""

    container: Any  # the widget, of tqdm_notebook

    def __init__(self, **arguments: Any) -> None:
        from IPython.display import display

        super().__init__(display=False, **arguments)
        if not self.disable:
            self.handle: Any = display(self.container, display_id=True)

    def close(self) -> None:
        if not self.disable:
            super().close()
            self.container.close()
            self.handle.update({}, raw=True)


IN_NOTEBOOK = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
ProgressBar = _VanishingBar if IN_NOTEBOOK else tqdm


def bars_are_off() -> bool:
    """Tell whether TQDM_DISABLE is set, as it is where lessons are executed for storing."""
    return "TQDM_DISABLE" in os.environ


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield the items; if that takes longer than 3 s, draw a bar from then on, gone at the end.

    Short work costs two readings of the clock per item and shows nothing.
    """
    begin, bar = time.monotonic(), None
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - begin > DELAY_S and not bars_are_off():
                bar = ProgressBar(total=len(items), initial=done, desc=what, leave=False)
            yield item
            if bar is not None:
                bar.update()
    finally:  # a loop that breaks off closes its bar as well
        if bar is not None:
            bar.close()


class BarView:
    """How a run shows itself: one bar, with the newest loss and gradient norm."""

    def __init__(self, run: Any, *, hidden: bool) -> None:
        """Draw the bar, unless hidden.

        Args:
            run: an Engine; the view reads its step, total_steps, settings and history, and changes nothing.
            hidden: show nothing (settings.progress is false, TQDM_DISABLE, another process than the first).
        """
        self.run = run
        self.hidden = hidden
        self.bar = ProgressBar(total=run.total_steps, initial=run.step, leave=False, disable=hidden)

    def advance(self) -> None:
        """Show that one more step is done; its row, if the loop logged one, is the last of the history."""
        row = self.run.history[-1] if self.run.history else {}
        self.bar.set_postfix({k: row[k] for k in ("loss", "grad_norm") if k in row}, refresh=False)
        self.bar.update()

    def close(self) -> None:
        """Take the bar away; a second call does nothing."""
        self.bar.close()


view_class: type[BarView] = BarView  # of the runs that start from now on


@contextmanager
def watched(total_steps: int) -> Iterator[Callable[..., None]]:
    """Show a search as runs are shown; yields a function to call with the metrics of each finished step."""
    run = SimpleNamespace(step=0, total_steps=total_steps, settings=None, history=[], example=None)
    view = view_class(run, hidden=bars_are_off())

    def advance(**metrics: float) -> None:
        run.history.append({"step": run.step, **metrics})
        run.step += 1
        view.advance()

    try:
        yield advance
    finally:
        view.close()


# (prompts, responses) that `generate` wrote last, or a search found: a view shows one, since it sees no text.
latest_samples: tuple[Sequence[str], Sequence[str]] | None = None
