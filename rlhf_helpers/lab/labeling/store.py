"""Labels of any number of people in one SQLite file, on the disk before the next item is shown."""

import contextlib
import json
import sqlite3
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from rlhf_helpers.core.stats import krippendorff_alpha

TIE, SKIP = "tie", "skip"
_TABLE = """
CREATE TABLE IF NOT EXISTS labels (
    annotator TEXT NOT NULL,
    item TEXT NOT NULL,     -- JSON: task, prompt, answers in the order of the data
    shown TEXT NOT NULL,    -- JSON: the answers' indices in the order in which this person saw them
    label TEXT NOT NULL,    -- JSON
    PRIMARY KEY (annotator, item)
)
"""
_WAIT_S = 30.0  # for another kernel that is writing


@dataclass(frozen=True)
class Item:
    """What is labeled: `pair` (two answers), `ranking` (several), `rating` or `thumb` (one)."""

    task: str
    prompt: str
    answers: tuple[str, ...]

    @property
    def key(self) -> str:
        """The text by which the store knows this item."""
        return json.dumps([self.task, self.prompt, list(self.answers)])


@dataclass(frozen=True)
class Label:
    """One person's label of one item.

    `value` is, for a pair, the index of the better answer or "tie"; for a ranking, the indices, best first;
    for a rating, the points; for a thumb, 1 (up) or 0; for any of them "skip". Indices are those of the data,
    whatever order was shown.
    """

    annotator: str
    item: Item
    shown: tuple[int, ...]
    value: Any


class LabelStore:
    """Labels in one SQLite file (None: in memory); what `add` has returned from is on the disk.

    Several kernels and annotators can write at once. A second label of the same person for the same item
    replaces the first.

    Raises:
        ValueError: The file is not a store of labels, such as one of an earlier format (.jsonl); the message
            names it.
    """

    def __init__(self, path: str | Path | None) -> None:
        """Open or create the store."""
        self.path = None if path is None else Path(path)
        if self.path is not None and self.path.suffix == ".jsonl":
            raise ValueError(
                f"{self.path}: labels are kept in SQLite, and those of an earlier format are not read; "
                f"name a file such as {self.path.stem}.sqlite"
            )
        # A form on a server takes its messages in other threads, one at a time.
        self._memory = sqlite3.connect(":memory:", check_same_thread=False) if self.path is None else None
        if self._memory is not None:
            weakref.finalize(self, self._memory.close)
        try:
            with self._database() as database:
                database.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{self.path} is not a store of labels ({error}); name another file") from error

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """Give a connection; commit at the end. A file is opened anew each time, so nothing stays locked."""
        database = self._memory or sqlite3.connect(self.path, timeout=_WAIT_S)
        try:
            with database:
                yield database
        finally:
            if database is not self._memory:
                database.close()

    def add(self, label: Label) -> None:
        """Save a label; it is on the disk when this returns."""
        row = (label.annotator, label.item.key, json.dumps(label.shown), json.dumps(label.value))
        with self._database() as database:
            database.execute("INSERT OR REPLACE INTO labels VALUES (?, ?, ?, ?)", row)

    def remove(self, annotator: str, item: Item) -> None:
        """Take back a person's label of an item, if there is one."""
        with self._database() as database:
            database.execute("DELETE FROM labels WHERE annotator = ? AND item = ?", (annotator, item.key))

    def labels(self, annotator: str | None = None) -> list[Label]:
        """Return all labels, or those of one annotator, in the order in which they were given."""
        query = "SELECT * FROM labels WHERE annotator = coalesce(?, annotator) ORDER BY rowid"
        with self._database() as database:
            rows = database.execute(query, (annotator,)).fetchall()
        labels = []
        for name, *texts in rows:
            (task, prompt, answers), shown, value = map(json.loads, texts)
            labels.append(Label(name, Item(task, prompt, tuple(answers)), tuple(shown), value))
        return labels

    def merge(self, stores: Mapping[str, str | Path]) -> None:
        """Add the labels of other files, each under a person's name: a class becomes a panel."""
        for name, path in stores.items():
            if not Path(path).is_file():
                raise FileNotFoundError(f"no store of labels: {path}")
            others = LabelStore(path).labels()
            several = len({label.annotator for label in others}) > 1
            for label in others:
                annotator = f"{name}: {label.annotator}" if several else name
                self.add(Label(annotator, label.item, label.shown, label.value))

    def preferences(self) -> list[dict[str, Any]]:
        """Return the labels as rows that `read_preferences` reads, each kind as its unit.

        Ties and skipped items are left out. Rows: prompt, chosen, rejected for a pair; prompt, responses
        (best first) for a ranking; prompt, response, rating for a rating or a thumb (1 or 0;
        `lab.chat.thumb_rows` gives rows for KTO); each with its annotator.
        """
        rows: list[dict[str, Any]] = []
        for label in self.labels():
            answers, value = label.item.answers, label.value
            row: dict[str, Any] = {"prompt": label.item.prompt, "annotator": label.annotator}
            if value in (TIE, SKIP):
                continue
            if label.item.task == "pair":
                row |= {"chosen": answers[value], "rejected": answers[1 - value]}
            elif label.item.task == "ranking":
                row["responses"] = [answers[index] for index in value]
            else:
                row |= {"response": answers[0], "rating": float(value)}
            rows.append(row)
        return rows

    def agreement(self) -> float:
        """Return Krippendorff's alpha of all annotators on the pairs: 1 is perfect, 0 is chance.

        A tie or a skipped pair counts as not labeled.

        Raises:
            ValueError: Fewer than two people have labeled the same pair.
        """
        votes = [
            (label.item.key, label.annotator, float(label.value))
            for label in self.labels()
            if label.item.task == "pair" and label.value not in (TIE, SKIP)
        ]
        table = pd.DataFrame(votes, columns=["item", "person", "value"])
        shared = table.pivot(index="item", columns="person", values="value").dropna(thresh=2)
        if shared.empty:
            raise ValueError("agreement needs a pair that two people have labeled")
        return krippendorff_alpha(shared)
