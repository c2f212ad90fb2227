"""A progress bar for terminals and notebooks that leaves nothing behind, on screen or in a saved notebook."""

from typing import Any

from tqdm.auto import tqdm


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
