"""Small forms of the lessons: rating pairs of answers, and a quiz; both work in a page that nobody clicks."""

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import HTML

CHOICES = ("a", "b", "tie")
_CELL = "flex:1;border:1px solid #767676;border-radius:4px;padding:6px;white-space:pre-wrap"


class PairRater(widgets.VBox):
    """Shows pairs side by side and collects clicks; `.rows` always holds one choice per pair.

    Stored choices stand in until a person clicks, so a lesson runs top to bottom untouched. Each click is
    appended to `path` as one JSON line and flushed, so that a lost kernel loses nothing.
    """

    def __init__(
        self, pairs: Sequence[Mapping[str, str]], *, stored: Sequence[str], path: Path | None
    ) -> None:
        """Check the pairs and stored choices, take up earlier clicks of `path`, and draw the first pair."""
        self.pairs = [dict(pair) for pair in pairs]
        for n, pair in enumerate(self.pairs):
            if missing := {"prompt", "a", "b"} - set(pair):
                raise ValueError(f"pairs[{n}] lacks {sorted(missing)}: every pair has prompt, a and b")
        if len(stored) != len(self.pairs) or not self.pairs or not set(stored) <= set(CHOICES):
            raise ValueError(f"stored needs one of {CHOICES} for each of {len(self.pairs)} pairs: {stored!r}")
        self.path, self.index = path, 0
        self.choices = [(choice, "stored") for choice in stored]
        self._take_up()
        self.view = widgets.HTML()
        buttons = []
        for choice, label in zip(CHOICES, ("A is better", "B is better", "no difference"), strict=True):
            button = widgets.Button(description=label, tooltip=f"{label} (pair shown above)")
            button.on_click(lambda _button, choice=choice: self.click(choice))
            buttons.append(button)
        super().__init__([self.view, widgets.HBox(buttons)])
        self._draw()

    @property
    def rows(self) -> list[dict[str, str]]:
        """One row a pair: prompt, a, b, choice ("a", "b" or "tie") and by ("person" or "stored")."""
        both = zip(self.pairs, self.choices, strict=True)
        return [{**pair, "choice": choice, "by": by} for pair, (choice, by) in both]

    def click(self, choice: str) -> None:
        """Note a person's choice for the pair shown, save it, and show the next one, if one is left."""
        if choice not in CHOICES:
            raise ValueError(f"choice must be one of {CHOICES}, got {choice!r}")
        if self.index >= len(self.pairs):
            return
        if self.path is not None:
            line = json.dumps({**self.pairs[self.index], "choice": choice}, ensure_ascii=False)
            with self.path.open("a", encoding="utf8") as file:
                file.write(f"{line}\n")
                file.flush()
                os.fsync(file.fileno())
        self.choices[self.index] = (choice, "person")
        self.index += 1
        self._draw()

    def _take_up(self) -> None:
        """Earlier clicks count for the same pair; the first pair without one is shown next."""
        if self.path is None or not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text(encoding="utf8").splitlines(), 1):
            try:
                row = json.loads(line)
                pair, choice = {key: row[key] for key in ("prompt", "a", "b")}, row["choice"]
            except (ValueError, KeyError, TypeError) as error:
                place = f"{self.path}, line {number}"
                raise ValueError(f"{place} is no rated pair ({error}): mend or move it") from error
            for n, known in enumerate(self.pairs):
                if choice in CHOICES and pair == {key: known[key] for key in pair}:
                    self.choices[n] = (choice, "person")
        self.index = next((n for n, (_, by) in enumerate(self.choices) if by == "stored"), len(self.pairs))

    def _draw(self) -> None:
        done = self.index >= len(self.pairs)
        self.view.value = "<p>All pairs are rated. Thank you!</p>" if done else self._pair_html(self.index)

    def _pair_html(self, n: int) -> str:
        pair = {key: html.escape(str(text)) for key, text in self.pairs[n].items()}
        return (
            f"<p>Pair {n + 1} of {len(self.pairs)}. <b>{pair['prompt']}</b></p>"
            "<div style='display:flex;gap:8px'>"
            f"<div style='{_CELL}'><b>A</b>\n{pair['a']}</div>"
            f"<div style='{_CELL}'><b>B</b>\n{pair['b']}</div></div>"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any] | None:
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is not None:  # what a page without a kernel shows: the first pair, and who chose
            choice, by = self.choices[0]
            bundle["text/html"] = f"{self._pair_html(0)}<p>Choice: {choice} ({by}).</p>"
        return bundle


def rate_pairs(
    pairs: Sequence[Mapping[str, str]], *, stored: Sequence[str], path: str | Path | None = None
) -> PairRater:
    """Make a side-by-side comparison of `pairs` (prompt, a, b); `stored` choices stand in for a person.

    Clicks are appended to `path` (JSON lines; None: kept in memory) and read again next time. Raises
    ValueError for a pair without prompt, a and b, for stored choices that do not fit, and for a broken line.
    """
    return PairRater(pairs, stored=stored, path=Path(path) if path else None)


def quiz(question: str, options: Sequence[str], *, answer: int, explanation: str) -> HTML:
    """Give a question with numbered options; `answer` (from 0) and its explanation are folded away."""
    if not 0 <= answer < len(options):
        raise ValueError(f"answer must be an index of the {len(options)} options, got {answer}")
    items = "".join(f"<li>{html.escape(option)}</li>" for option in options)
    solution = f"<b>{answer + 1}. {html.escape(options[answer])}</b> {html.escape(explanation)}"
    folded = f"<details><summary>Answer</summary>{solution}</details>"
    return HTML(f"<p><b>{html.escape(question)}</b></p><ol>{items}</ol>{folded}")
