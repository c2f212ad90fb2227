"""What a learner has done: one file for exercises, quizzes and checklists, and one page over all lessons."""

import html
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from filelock import FileLock
from IPython.display import display

from rlhf_helpers.core.files import write_atomically
from rlhf_helpers.lab.exercises import LESSONS, NAMES
from rlhf_helpers.lab.stages import code_cells, find_lesson
from rlhf_helpers.lab.widgets import Choices

NOTEBOOKS = {
    1: "01_reward_modeling",
    2: "02_policy_optimization",
    3: "03_alignment_and_safety",
    4: "04_applications",
}
States = dict[str, dict[str, str]]  # kind -> name -> state
STATES = {
    "exercises": {"solved", "tried"},
    "quizzes": {"right at once", "right later", "tried"},
    "checklists": {"ticked", "not ticked"},
}
FINAL = {"solved", "right at once", "right later"}  # a later attempt does not take these back
MARKS = {
    "solved": "✓",
    "right at once": "✓",
    "right later": "✓",
    "tried": "✗",
    "ticked": "☑",
    "not ticked": "☐",
}
OPEN = "○"
_CHECKLISTS = Path(__file__).parents[1] / "assets" / "checklists.json"
_CALL = re.compile(r'\b(check|quiz)\("(\w+)"')

# What could not be saved, by progress file; None: RLHF_PROGRESS is empty, and nothing is saved.
_unsaved: dict[Path | None, States] = {}


@dataclass(frozen=True)
class Message:
    """A text for a page and the same for a terminal."""

    page: str
    plain: str

    def _repr_html_(self) -> str:
        return self.page

    def __repr__(self) -> str:
        """Return the text for a terminal."""
        return self.plain


def load_states() -> States:
    """Return the states of this learner by kind and name; say so if the file cannot be read."""
    try:
        return _load(_path())
    except OSError as error:
        print(f"progress: not read ({error}); set RLHF_PROGRESS to a file that can be read.")
        return {kind: {} for kind in STATES}


def record(kind: str, name: str, state: str) -> None:
    """Note a state; what cannot be saved stays in memory, and is saved with the next state that can."""
    path = _path()
    unsaved = _unsaved.setdefault(path, {}).setdefault(kind, {})
    if unsaved.get(name) not in FINAL:
        unsaved[name] = state
    if path is None:
        return
    try:
        with FileLock(f"{path}.lock"):  # another kernel may be saving too
            states = {kind: names for kind, names in _load(path).items() if names or kind == "exercises"}
            write_atomically(path, json.dumps(states, indent=1, sort_keys=True).encode())
        del _unsaved[path]
    except OSError as error:
        print(f"progress: not saved ({error}); set RLHF_PROGRESS to a file that can be written.")


def _path() -> Path | None:
    """The progress file: RLHF_PROGRESS or a file in the working folder; None (memory only) when empty."""
    name = os.environ.get("RLHF_PROGRESS", ".rlhf_progress.json")
    return Path(name).absolute() if name else None


def _load(path: Path | None) -> States:
    """Read the states in the file, and add those that could not be saved there."""
    states = {kind: {} for kind in STATES} | ({} if path is None else _read(path))
    for kind, names in _unsaved.get(path, {}).items():
        for name, state in names.items():
            if states[kind].get(name) not in FINAL:
                states[kind][name] = state
    return states


def read_states(text: str) -> States:
    """Read the text of a progress file.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: It is not one.
    """
    states = json.loads(text)
    for kind, names in ({"exercises": states["exercises"]} | states).items():
        if not set(names.values()) <= STATES[kind]:
            raise ValueError(f"the states of {kind} must be among {sorted(STATES[kind])}")
    return states


def _read(path: Path) -> States:
    try:
        return read_states(path.read_text(encoding="utf8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # ValueError: bad JSON, bad UTF-8
        aside = next(p for n in range(10**6) if not (p := path.with_name(f"{path.name}.broken-{n}")).exists())
        path.rename(aside)
        print(f"progress: {path} was broken ({error}); it is kept as {aside.name}, and a new one starts.")
        return {}


class Progress(pd.DataFrame):
    """Table of all exercises; at the end of a cell it is shown as the page over all lessons."""

    def _ipython_display_(self) -> None:
        display(Message(progress_page(), self.to_string(index=False)))
        display(Checklists())


def progress() -> Progress:
    """Return all exercises: lesson, exercise and state ("solved", "tried" or "open"); shown as a page."""
    states = load_states()["exercises"]
    rows = [(lesson, name, states.get(name, "open")) for name, lesson in LESSONS.items()]
    return Progress(rows, columns=["lesson", "exercise", "state"])


def solved_so_far(lesson: int) -> str:
    """Say how many exercises of a lesson are solved."""
    states = load_states()["exercises"]
    solved = sum(states.get(name) == "solved" for name in NAMES[lesson])
    return f"{solved} of {len(NAMES[lesson])} solved in lesson {lesson}."


@dataclass(frozen=True)
class Item:
    """An exercise or a quiz, and where it stands."""

    kind: str
    name: str
    link: str
    section: str


def items_of(lesson: int) -> Iterator[Item]:
    """Yield the exercises and quizzes in the order of the notebook; without one, only the exercises."""
    try:
        sections, cells = code_cells(find_lesson(NOTEBOOKS[lesson]))
    except FileNotFoundError:
        yield from (Item("exercises", name, "", "") for name in NAMES[lesson])
        return
    anchors = {title: anchor for anchor, title in sections.items()}
    for title, source in cells:
        for call, name in _CALL.findall(source):
            link = f"{NOTEBOOKS[lesson]}.ipynb#{anchors.get(title, '')}"
            yield Item("exercises" if call == "check" else "quizzes", name, link, title)


def progress_page() -> str:
    """Write the page: what to do next, and for each lesson its exercises, quizzes and statements."""
    states = load_states()
    items = {lesson: list(items_of(lesson)) for lesson in NOTEBOOKS}
    page = "".join(_lesson_html(lesson, items[lesson], states) for lesson in NOTEBOOKS)
    todo = ((lesson, item) for lesson in NOTEBOOKS for item in items[lesson] if not _is_done(states, item))
    lesson, item = next(todo, (0, None))
    if not item:
        return f"<p><b>Every exercise is solved, and every quiz is answered.</b></p>{page}"
    where = f"lesson {lesson}, {html.escape(item.section)}".rstrip(", ")
    return f"<p><b>Next: {_link(item)}</b> ({where})</p>{page}"


def _lesson_html(lesson: int, items: list[Item], states: States) -> str:
    counts, lines = [], []
    for kind, done in (("exercises", "solved"), ("quizzes", "right")):
        of_kind = [item for item in items if item.kind == kind]
        final = sum(_is_done(states, item) for item in of_kind)
        counts.append(f"{final} of {len(of_kind)} {kind} {done}")
        marked = [f"{_mark(states, item)} {_link(item)}" for item in of_kind]
        lines.append(f"<p>{kind}: {', '.join(marked)}</p>")
    title = f"<a href='{NOTEBOOKS[lesson]}.ipynb'>Lesson {lesson}</a>"
    return f"<h3>{title}: {', '.join(counts)}</h3>{''.join(lines)}"


def _is_done(states: States, item: Item) -> bool:
    return states[item.kind].get(item.name) in FINAL


def _mark(states: States, item: Item) -> str:
    state = states[item.kind].get(item.name, "open")
    return f"<span title='{state}'>{MARKS.get(state, OPEN)}</span>"


def _link(item: Item) -> str:
    return f"<a href='{item.link}'>{item.name}</a>" if item.link else item.name


class Checklists(Choices):
    """Statements of the four lessons that a learner ticks."""

    def __init__(self) -> None:
        """Show every statement as it was left."""
        self.statements = json.loads(_CHECKLISTS.read_text(encoding="utf8"))
        texts = [f"Lesson {s['lesson']}: {s['text']}" for s in self.statements.values()]
        super().__init__("Tick what you can do without looking it up.", texts, self._marks())

    def _marks(self) -> list[str]:
        states = load_states()["checklists"]
        return [MARKS[states.get(name, "not ticked")] for name in self.statements]

    def click(self, index: int) -> None:
        """Tick a statement, or take its tick away."""
        ticked = self.shown["marks"][index] == MARKS["ticked"]
        record("checklists", list(self.statements)[index], "not ticked" if ticked else "ticked")
        marks = self._marks()
        self.show(marks, f"{marks.count(MARKS['ticked'])} of {len(marks)} ticked.")

    def _static_html(self) -> str:
        rows = zip(self.shown["marks"], self.shown["labels"], self.statements.values(), strict=True)
        links = [
            f"<li>{mark} {label} <a href='{NOTEBOOKS[s['lesson']]}.ipynb#{s['section']}'>section</a></li>"
            for mark, label, s in rows
        ]
        return f"<p><b>{self.shown['title']}</b></p><ul>{''.join(links)}</ul>"
