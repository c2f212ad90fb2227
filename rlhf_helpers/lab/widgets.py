"""Forms of the lessons: rate pairs of answers. A page that nobody clicks shows the stored choices."""

import html
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

TEXTS = ("prompt", "a", "b")
CHOICES = ("a", "b", "tie")
_BOX = "flex:1;border:1px solid #767676;border-radius:4px;padding:6px;white-space:pre-wrap"


class Form(anywidget.AnyWidget):
    """A form whose stored output is `_static_html()`: what a reader without a kernel sees."""

    _css = (
        "[class^=rlhf] :is(button, input, select):focus-visible "
        "{ outline: 2px solid currentColor; outline-offset: 1px }"
    )
    shown = traitlets.Dict().tag(sync=True)

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

    _esm = Path(__file__).parents[1] / "assets" / "choices.js"

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

    def __repr__(self) -> str:
        """Name the form by its title, with no address: a lesson stores the same text in every run."""
        return f"{type(self).__name__}: {self.shown['title']}"


class PairRater(Form):
    """Shows pairs side by side and collects clicks; `.rows` always holds one choice per pair.

    A row has prompt, a, b, choice ("a", "b" or "tie") and by ("person" or "stored").

    Stored choices stand in until a person clicks, so a lesson runs from top to bottom untouched. Each click
    is appended to `path` as one JSON line and flushed to the disk, so a killed kernel loses no click.

    The page (assets/pair_rater.js) draws `shown` and sends {"choice": "a", "index": 0}.
    """

    _esm = Path(__file__).parents[1] / "assets" / "pair_rater.js"

    def __init__(
        self, pairs: Sequence[Mapping[str, str]], *, stored: Sequence[str], path: Path | None
    ) -> None:
        """Check pairs and stored choices, read earlier clicks from `path`, and show the first open pair."""
        for n, pair in enumerate(pairs):
            if missing := set(TEXTS) - set(pair):
                raise ValueError(f"pairs[{n}] lacks {sorted(missing)}: every pair has prompt, a and b")
        if len(stored) != len(pairs) or not pairs or not set(stored) <= set(CHOICES):
            raise ValueError(f"stored needs one of {CHOICES} for each of {len(pairs)} pairs: {stored!r}")
        self.path = path
        self.rows = [
            {**pair, "choice": choice, "by": "stored"} for pair, choice in zip(pairs, stored, strict=True)
        ]
        if path is not None and path.exists():
            self._take_earlier_clicks(path)
        by = [row["by"] for row in self.rows]
        self.index = by.index("stored") if "stored" in by else len(by)
        super().__init__(shown=self._shown())
        self.on_msg(self._receive)

    def click(self, choice: str) -> None:
        """Record a person's choice for the pair shown, save it, and show the next pair, if one is left."""
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {CHOICES}, got {choice!r}")
        if self.index >= len(self.rows):
            return
        row = {**self.rows[self.index], "choice": choice, "by": "person"}
        if self.path is not None:
            _append_row(self.path, {name: row[name] for name in row if name != "by"})
        self.rows[self.index] = row
        self.index += 1
        self.shown = self._shown()

    def _receive(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        """Take a click from the page; a second click on the same pair (its answer was slow) is dropped."""
        if content.get("index", self.index) == self.index:
            self.click(content.get("choice", ""))

    def _take_earlier_clicks(self, path: Path) -> None:
        """Count earlier clicks for the same pair."""
        for click in _read_rows(path):
            for row in self.rows:
                if all(row[key] == click[key] for key in TEXTS):
                    row |= {"choice": click["choice"], "by": "person"}

    def _shown(self) -> dict[str, Any]:
        """Return what the page draws: the open pair, or empty texts when all pairs are rated."""
        total = len(self.rows)
        row = self.rows[self.index] if self.index < total else dict.fromkeys(TEXTS, "")
        return {"index": self.index, "total": total, **{key: str(row[key]) for key in TEXTS}}

    def __repr__(self) -> str:
        """Say how many pairs are rated, with no address: a lesson stores the same text in every run."""
        rated = sum(row["by"] == "person" for row in self.rows)
        return f"PairRater: {rated} of {len(self.rows)} pairs rated by a person"

    def _static_html(self) -> str:
        """Show the first pair, and who chose."""
        pair = {key: html.escape(str(text)) for key, text in self.rows[0].items()}
        return (
            f"<p>Pair 1 of {len(self.rows)}. <b>{pair['prompt']}</b></p>"
            "<div style='display:flex;gap:8px'>"
            f"<div style='{_BOX}'><b>A</b>\n{pair['a']}</div>"
            f"<div style='{_BOX}'><b>B</b>\n{pair['b']}</div></div>"
            f"<p>Choice: {pair['choice']} ({pair['by']}).</p>"
        )


def _append_row(path: Path, row: Mapping[str, str]) -> None:
    """Append one JSON line and flush it to the disk; never continue a line that was left incomplete."""
    with path.open("ab") as file:  # "a": every write goes to the end, whoever else writes to the file
        # ASCII: no program takes a character of a text (U+2028, U+0085) for the end of a line.
        file.write((b"\n" if file.tell() else b"") + json.dumps(row).encode("ascii"))
        file.flush()
        os.fsync(file.fileno())


def _read_rows(path: Path) -> list[dict[str, str]]:
    """Read the rated pairs; warn of each line that is none: a killed kernel may leave half a line."""
    rows = []
    # Not splitlines(): a text may hold U+2028 or U+0085.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rated = {key: row[key] for key in (*TEXTS, "choice")}
            if rated["choice"] not in CHOICES:
                raise ValueError(f"choice must be one of {CHOICES}: {rated['choice']!r}")
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"{path}, line {number} is not a rated pair and does not count ({error!r}): fix it or rate "
                "its pair again",
                stacklevel=5,  # the cell that calls rate_pairs
            )
        else:
            rows.append(rated)
    return rows


def rate_pairs(
    pairs: Sequence[Mapping[str, str]], *, stored: Sequence[str], path: str | Path | None = None
) -> PairRater:
    """Make a side-by-side comparison of `pairs` (prompt, a, b); `stored` choices stand in for a person.

    Clicks are appended to `path` (JSON lines; None: kept in memory) and read again next time.

    Raises:
        ValueError: a pair lacks prompt, a or b, or the stored choices do not fit.
    """
    return PairRater(pairs, stored=stored, path=Path(path) if path else None)
