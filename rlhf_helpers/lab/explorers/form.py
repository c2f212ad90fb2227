"""The form of all explorers: sliders and lists over one picture, which is drawn again for every move."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from rlhf_helpers.lab.plots import image_html
from rlhf_helpers.lab.widgets import ASSETS, Form, page_script


class Explorer(Form):
    """A picture with its controls; `move` sets them, and `shown["message"]` is what the figure then says.

    The page (assets/explorer.js) draws `shown` and sends {"indices": [0, 3]}, the position of each control.
    """

    _esm = page_script("explorer.js")

    def __init__(self, figure_fn: Callable[..., Figure], form: Mapping[str, Any]) -> None:
        """Draw the picture for the defaults of a form of assets/explorers.json."""
        self.figure_fn = figure_fn
        self.form = form
        super().__init__()
        self.move([control["values"].index(control["default"]) for control in form["controls"]])
        self.on_msg(lambda _widget, content, _buffers: self.move(content["indices"]))

    def move(self, indices: Sequence[int]) -> None:
        """Put each control at one of its values, by position, and draw again.

        Raises:
            ValueError: there are more or fewer controls.
            IndexError: a control has no such position.
        """
        controls = list(zip(self.form["controls"], indices, strict=True))
        figure = self.figure_fn(**{control["name"]: control["values"][index] for control, index in controls})
        message = " ".join(figure.get_suptitle().split())
        self.shown = {
            **self.form,
            "indices": list(indices),
            "message": message,
            "picture": image_html(figure, alt=f"{self.form['drawing']} {message}."),
        }

    def _static_html(self) -> str:
        """Show the picture for the defaults; its title says what they are."""
        return f"<p><b>{self.form['title']}</b></p>{self.shown['picture']}"


def explore(figure_fn: Callable[..., Figure], **data: Any) -> Explorer:
    """Put sliders on a figure of `rlhf_helpers.lab.explorers`, as the last line of a cell.

    A page without a kernel keeps the picture for the default settings.

    Args:
        figure_fn: The figure.
        **data: What it draws, where it needs results of the lesson.

    Raises:
        KeyError: assets/explorers.json has no form for the function.
    """
    forms = json.loads((ASSETS / "explorers.json").read_text(encoding="utf8"))
    return Explorer(partial(figure_fn, **data), forms[figure_fn.__name__])
