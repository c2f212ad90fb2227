"""A progress bar for terminals and notebooks that leaves nothing behind, on screen or in a saved notebook."""

import os
from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int, *, start: int = 0, shown: bool = True) -> tqdm:
    """Return a tqdm bar that vanishes on `close`; TQDM_DISABLE in the environment hides it altogether."""
    shown = shown and "TQDM_DISABLE" not in os.environ
    in_notebook = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
    kind = _VanishingBar if shown and in_notebook else tqdm
    return kind(total=total, initial=start, leave=False, disable=not shown)


class _VanishingBar(tqdm):
    """A notebook bar; tqdm's own stays in the saved notebook as text, and on screen after an interrupt."""

    container: Any  # the widget, of tqdm_notebook

    def __init__(self, **arguments: Any) -> None:
        from IPython.display import display

        super().__init__(display=False, **arguments)
        self.handle: Any = display(self.container, display_id=True)

    def close(self) -> None:
        if not self.disable:
            super().close()
            self.container.close()
            self.handle.update({}, raw=True)
