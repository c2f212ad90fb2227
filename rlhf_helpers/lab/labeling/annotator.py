"""A form for pairs, rankings and ratings, which saves each label before it shows the next item."""

import html
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_helpers.lab.labeling.store import SKIP, TIE, Item, Label, LabelStore
from rlhf_helpers.lab.widgets import ASSETS, Form, page_script

POINTS = (1, 2, 3, 4, 5)
_BOX = "flex:1;border:1px solid #767676;border-radius:4px;padding:6px;white-space:pre-wrap"


class Annotator(Form):
    """Shows items one by one and takes labels by buttons and keys.

    Keys: A, B, T (tie) for a pair; the digits for the next-best answer of a ranking or the points of a
    rating; S skips, U takes the last label back. The order of the answers is drawn at random per person and
    item, and recorded. Stored labels stand in for items without a label, so a lesson runs untouched.

    The page (assets/annotator.js) draws `shown` and sends {"key": "a", "index": 0}.
    """

    _esm = page_script("annotator.js")
    _css = ASSETS / "annotator.css"

    def __init__(
        self,
        items: Sequence[Item],
        store: LabelStore,
        *,
        annotator: str,
        guideline: str = "",
        stored: Sequence[Any] | None = None,
        references: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        """Check the items, read this person's labels from the store and show the first open item.

        Args:
            items: What is labeled.
            store: Where labels go.
            annotator: The person's name.
            guideline: The rule by which to judge, shown above each item.
            stored: One label per item to stand in until the person has given one.
            references: For pairs, by name of a judge: the first answer's score minus the second's, per item.
                The report compares the person with each of them.
        """
        if not items:
            raise ValueError("items must hold at least one item to label")
        for name, values in {"stored": stored, **(references or {})}.items():
            if values is not None and len(values) != len(items):
                raise ValueError(f"{name} has {len(values)} entries for {len(items)} items")
        self.items, self.store, self.annotator = list(items), store, annotator
        self.guideline, self.stored, self.references = guideline, stored, dict(references or {})
        self.orders = [_order(annotator, item) for item in self.items]
        self.ranked: list[int] = []  # of the ranking that is being given: indices of the data, best first
        self._read_store()
        self.index = self._next_open(0)
        super().__init__(shown=self._shown())
        self.on_msg(self._receive)

    def press(self, key: str) -> None:
        """Take one key: a label, the next-best answer of a ranking, skip or undo.

        Raises:
            ValueError: The key means nothing for this task.
        """
        if key == "u":
            self._undo()
        elif self.index < len(self.items):
            self._take(key)
        self.shown = self._shown()

    def _take(self, key: str) -> None:
        item, order = self.items[self.index], self.orders[self.index]
        keys = _keys(item)
        if key not in keys:
            raise ValueError(f"the key {key!r} means nothing here; there are {', '.join([*keys, 'u'])}")
        value = keys[key]
        if key != "s" and item.task == "pair" and value != TIE:
            value = order[value]
        elif key != "s" and item.task == "ranking":
            if order[value] in self.ranked:
                return
            self.ranked.append(order[value])
            if len(self.ranked) < len(order) - 1:
                return
            value = [*self.ranked, *(index for index in order if index not in self.ranked)]
        self.ranked = []
        self.store.add(Label(self.annotator, item, order, value))
        self.given[item.key] = value
        self.index = self._next_open(self.index + 1)

    def _undo(self) -> None:
        """Take back the last answer of a ranking, or else the last label."""
        if self.ranked:
            self.ranked.pop()
            return
        mine = {item.key: number for number, item in enumerate(self.items)}
        last = next((key for key in reversed(self.given) if key in mine), None)
        if last is not None:
            self.index = mine[last]
            self.store.remove(self.annotator, self.items[self.index])
            del self.given[last]

    def _receive(self, _widget: Any, content: Mapping[str, Any], _buffers: Any) -> None:
        """Take a key from the page; a second one for the same item (its answer was slow) is dropped."""
        key, index = content.get("key"), content.get("index", self.index)
        allowed = index < len(self.items) and key in _keys(self.items[index])
        if index == self.index and (key == "u" or allowed):
            self.press(str(key))

    def _read_store(self) -> None:
        """Read this person's labels, in the order in which they were given."""
        self.given = {label.item.key: label.value for label in self.store.labels(self.annotator)}

    def _next_open(self, start: int) -> int:
        """Return the index of the next item without a label, from `start` on and then from the top."""
        places = [*range(start, len(self.items)), *range(min(start, len(self.items)))]
        return next((i for i in places if self.items[i].key not in self.given), len(self.items))

    @property
    def values(self) -> list[Any]:
        """One label per item: the person's, or the stored one, or None."""
        stored = self.stored or [None] * len(self.items)
        return [self.given.get(item.key, stored[n]) for n, item in enumerate(self.items)]

    @property
    def rows(self) -> list[dict[str, str]]:
        """Pairs as rows: prompt, a, b, choice ("a", "b", "tie", "skip") and by ("person" or "stored")."""
        return [
            {
                "prompt": item.prompt,
                **dict(zip("ab", item.answers, strict=True)),
                "choice": "ab"[value] if isinstance(value, int) else str(value),
                "by": "person" if item.key in self.given else "stored",
            }
            for item, value in zip(self.items, self.values, strict=True)
        ]

    def report(self) -> dict[str, str]:
        """Say how many items this person has labeled and, for pairs, what the labels follow."""
        mine = {n: self.given[item.key] for n, item in enumerate(self.items) if item.key in self.given}
        lines = {"labeled": f"{len(mine)} of {len(self.items)}"}
        decided = [
            (n, value) for n, value in mine.items() if self.items[n].task == "pair" and value in (0, 1)
        ]
        for name, gaps in self.references.items():
            # Where the judge sees no difference there is nothing to agree with.
            agree = [(gaps[n] > 0) == (value == 0) for n, value in decided if gaps[n] != 0]
            lines[f"agreement with {name}"] = _share(agree)
        if decided:
            lines["chose the left answer"] = _share([self.orders[n][0] == value for n, value in decided])
            lengths = [[len(self.items[n].answers[i]) for i in (value, 1 - value)] for n, value in decided]
            lines["chose the longer answer"] = _share(
                [mine > other for mine, other in lengths if mine != other]
            )
        return lines

    def _shown(self) -> dict[str, Any]:
        """Return what the page draws: the open item in the person's order, if there is one."""
        shown: dict[str, Any] = {
            "index": self.index,
            "total": len(self.items),
            "guideline": self.guideline,
            "report": [f"{name}: {text}" for name, text in self.report().items()],
        }
        if self.index < len(self.items):
            item, order = self.items[self.index], self.orders[self.index]
            shown |= {
                "task": item.task,
                "prompt": item.prompt,
                "answers": [item.answers[index] for index in order],
                "ranked": [order.index(index) for index in self.ranked],
                "keys": list(_keys(item)),
            }
        return shown

    def __repr__(self) -> str:
        """Say how many items a person has labeled, with no address: the same text in every run."""
        given = sum(item.key in self.given for item in self.items)
        return f"Annotator: {given} of {len(self.items)} labeled by a person"

    def _static_html(self) -> str:
        item, order = self.items[0], self.orders[0]
        boxes = "".join(
            f"<div style='{_BOX}'><b>{'ABCDEFGH'[place]}</b>\n{html.escape(item.answers[index])}</div>"
            for place, index in enumerate(order)
        )
        guideline = self.guideline and f"<p>{html.escape(self.guideline)}</p>"
        return (
            f"{guideline}<p>Item 1 of {len(self.items)}. <b>{html.escape(item.prompt)}</b></p>"
            f"<div style='display:flex;flex-wrap:wrap;gap:8px'>{boxes}</div>"
        )


def _keys(item: Item) -> dict[str, Any]:
    """Return what each key means for an item: a place among the answers shown, points, tie or skip."""
    if item.task == "pair":
        return {"a": 0, "b": 1, "t": TIE, "s": SKIP}
    if item.task == "ranking":
        return {**{str(place + 1): place for place in range(len(item.answers))}, "s": SKIP}
    return {**{str(points): points for points in POINTS}, "s": SKIP}


def _order(annotator: str, item: Item) -> tuple[int, ...]:
    """Draw the order in which this person sees the answers of this item, the same each time."""
    places = list(range(len(item.answers)))
    random.Random(f"{annotator} {item.key}").shuffle(places)
    return tuple(places)


def _share(outcomes: Sequence[bool]) -> str:
    return f"{sum(outcomes)} of {len(outcomes)}" if outcomes else "nothing to compare yet"


def rate_pairs(
    pairs: Sequence[Mapping[str, str]],
    *,
    stored: Sequence[str] | None = None,
    path: str | Path | None = None,
    **options: Any,
) -> Annotator:
    """Let a person compare `pairs` (prompt, a, b).

    Args:
        pairs: The rows.
        stored: One choice per pair, "a", "b" or "tie", to stand in for a person.
        path: An SQLite file for the labels; None: they are kept in memory.
        **options: guideline and references of `Annotator`.

    Raises:
        ValueError: A pair lacks prompt, a or b, or the stored choices do not fit.
    """
    for n, pair in enumerate(pairs):
        if missing := {"prompt", "a", "b"} - set(pair):
            raise ValueError(f"pairs[{n}] lacks {sorted(missing)}: every pair has prompt, a and b")
    choices = {"a": 0, "b": 1, TIE: TIE}
    if stored is not None and not set(stored) <= set(choices):
        raise ValueError(f"stored needs one of {tuple(choices)} for each of {len(pairs)} pairs: {stored!r}")
    items = [Item("pair", pair["prompt"], (pair["a"], pair["b"])) for pair in pairs]
    values = None if stored is None else [choices[choice] for choice in stored]
    return Annotator(items, LabelStore(path), annotator="you", stored=values, **options)
