"""What the lessons' forms have in common: on a page without a kernel they are static text."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

ASSETS = Path(__file__).parents[1] / "assets"


def page_script(name: str) -> str:
    """Return the script of a form, with what the scripts of all forms begin with in front of it."""
    return "".join((ASSETS / part).read_text(encoding="utf8") for part in ("form.js", name))


class Form(anywidget.AnyWidget):
    """A form whose stored output is `_static_html()`: what a reader without a kernel sees."""

    _css = (
        "[class^=rlhf] :is(button, input, select):focus-visible "
        "{ outline: 2px solid currentColor; outline-offset: 1px }"
    )
    shown = traitlets.Dict().tag(sync=True)

    def __repr__(self) -> str:
        """Name the form by its title, with no address: a lesson stores the same text in every run."""
        return f"{type(self).__name__}: {self.shown['title']}"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:
            bundle[0]["text/html"] = self._static_html()
        return bundle


class Choices(Form):
    """A title over a list of buttons; what a click means is up to `click` of the class below.

    The page (assets/choices.js) draws `shown`: the title, a label and a mark for each button, and a message
    that a screen reader reads out. It sends {"index": 0}.
    """

    _esm = page_script("choices.js")

    def __init__(self, title: str, labels: Sequence[str], marks: Sequence[str]) -> None:
        """Show the buttons with their first marks and no message."""
        shown = {"title": title, "labels": list(labels), "marks": list(marks), "message": ""}
        super().__init__(shown=shown)
        self.on_msg(self._receive)

    def show(self, marks: Sequence[str], message: str) -> None:
        """Replace the marks and the message on the page."""
        self.shown = {**self.shown, "marks": list(marks), "message": message}

    def _receive(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        if content.get("index") in range(len(self.shown["labels"])):
            self.click(content["index"])
