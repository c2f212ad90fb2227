"""Estimate how long a lesson takes to work through, section by section.

    python tests/notebooks/hours.py

110 words and 12 lines of code per minute; a minute for each figure and each table, whether it is shown as
HTML, written in Markdown or printed; 8, 15 or 25 minutes for an easy, medium or hard exercise. Folded text
and hidden cells count half. A core ends where a heading of the first level says "Going deeper". The waits for
training (at most 3 minutes per lesson) come on top.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS_PER_MINUTE, LINES_PER_MINUTE, MINUTES_PER_PICTURE = 110, 12, 1.0
EXERCISE_MINUTES = {"easy": 8.0, "medium": 15.0, "hard": 25.0}
MARKDOWN_TABLE = re.compile(r"^\|[ :|-]*-{3}[ :|-]*\|$", re.MULTILINE)  # the line below the head
WAITS = 3.0  # minutes for one run of a lesson on two cores
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def text_minutes(source: str) -> float:
    """Reading time of Markdown, its tables included; what stands in <details> counts half."""
    folded = re.findall(r"<details>.*?</details>", source, flags=re.DOTALL)
    open_text = re.sub(r"<details>.*?</details>", "", source, flags=re.DOTALL)
    minutes = []
    for text in (open_text, *folded):
        words = len(re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text).split())  # an address of a link is not read
        tables = len(MARKDOWN_TABLE.findall(text))
        minutes.append(words / WORDS_PER_MINUTE + tables * MINUTES_PER_PICTURE)
    return minutes[0] + sum(minutes[1:]) / 2


def exercise_minutes(source: str) -> float:
    """Minutes of the exercise that a Markdown cell states, 0 where it states none."""
    found = re.search(r"^### Exercise .*?Difficulty: (\w+)", source, flags=re.DOTALL | re.MULTILINE)
    return EXERCISE_MINUTES[found[1]] if found else 0.0


def holds_table(text: str) -> bool:
    """Tell whether a text output shows a table: of Markdown, a Series, or a frame.

    Above the rows of a frame stand the names of its columns: a line as long as the next, which begins with
    the space of the index.
    """
    lines = text.splitlines()
    frames = [
        head.startswith("  ") and head.strip() and len(head) == len(row) and not row.startswith(" ")
        for head, row in itertools.pairwise(lines)
    ]
    return any(frames) or bool(MARKDOWN_TABLE.search(text) or re.search(r"dtype: \w+$", text, re.MULTILINE))


def picture_minutes(cell: dict[str, Any]) -> float:
    """A minute for each figure and each table among a cell's outputs; a verdict is none."""
    count = 0
    for output in cell["outputs"]:
        data = output.get("data", {})
        page = "".join(data.get("text/html", ""))
        if page or "image/png" in data:
            count += "rlhf-verdict" not in page
        else:
            text = "".join(output.get("text") or data.get("text/markdown") or data.get("text/plain") or "")
            # A Series printed by to_string has no line that tells it from other text.
            count += holds_table(text) or ".to_string(" in "".join(cell["source"])
    return MINUTES_PER_PICTURE * count


def cell_minutes(cell: dict[str, Any]) -> float:
    """Minutes that a learner needs for one cell, without the wait for its result."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return text_minutes(source) + exercise_minutes(source)
    lines = sum(bool(line.strip()) for line in source.splitlines())
    hidden = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
    return lines / LINES_PER_MINUTE / (2 if hidden else 1) + picture_minutes(cell)


def sections(notebook: dict[str, Any]) -> Iterator[tuple[str, bool, int, float]]:
    """Yield each section's title, whether it is core, how many cells it has, and its minutes."""
    title, core, count, minutes = "(opening)", True, 0, 0.0
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        heading = re.match(r"(#{1,2}) (.*)", source) if cell["cell_type"] == "markdown" else None
        if heading and count:
            yield title, core, count, minutes
            count, minutes = 0, 0.0
        if heading:
            title = heading[2]
            core = core and not title.startswith("Going deeper")
        count += 1
        minutes += cell_minutes(cell)
    yield title, core, count, minutes


def core_hours(notebook: dict[str, Any]) -> float:
    """Hours for the core of a lesson, waits included."""
    return (WAITS + sum(minutes for _, core, _, minutes in sections(notebook) if core)) / 60


def main() -> None:
    """Print the table of each lesson."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")) if len(sys.argv) < 2 else map(Path, sys.argv[1:]):
        notebook = json.loads(path.read_text(encoding="utf8"))
        print(f"\n{path.name}: core {core_hours(notebook):.1f} h")
        for title, core, count, minutes in sections(notebook):
            print(f"  {minutes:5.0f} min  {count:3} cells  {'core  ' if core else 'deeper'}  {title}")


if __name__ == "__main__":
    main()
