"""Pages the course writes, in both themes, wide and narrow: exported lesson, class report, comparison."""

import itertools
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from rlhf_helpers.lab.classroom.report import class_report
from rlhf_helpers.lab.comparison import write_comparison
from rlhf_helpers.lab.export import convert, export_notebooks
from rlhf_helpers.lab.quizzes import questions
from tests.browser.test_lesson import LESSON, axe_faults

pytestmark = [pytest.mark.browser, pytest.mark.slow]

# Serious rules of axe that only nbconvert's own template breaks, and why we leave them.
KNOWN_OF_NBCONVERT: dict[str, str] = {}
CODE_HOST_PX, PHONE_PX = 880, 420
PAPER_PX = 718  # A4 between margins of 1 cm
VIEWS = [("light", CODE_HOST_PX), ("dark", PHONE_PX)]
HEADING_LEVELS = (
    """() => [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map((h) => +h.tagName[1])"""
)
UNREACHABLE = """() => [...document.querySelectorAll("table")].filter(
    (table) => table.scrollWidth > table.clientWidth && table.tabIndex !== 0
).length"""
# Paper does not scroll: what a box hides is lost.
CLIPPED = """() => [...document.querySelectorAll("main *")].filter(
    (node) => node.scrollWidth > node.clientWidth + 1 && node.clientWidth > 0
        && getComputedStyle(node).overflowX !== "visible"
).map((node) => node.textContent.trim().slice(0, 60))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write one page of each kind; exporting runs nothing."""
    folder = tmp_path_factory.mktemp("pages")
    lesson = folder / "lesson.html"
    lesson.write_text(convert(nbformat.read(LESSON, as_version=4), kind="html"), encoding="utf8")
    printed = convert(nbformat.read(LESSON, as_version=4), kind="pdf")
    Path(folder, "print.html").write_text(printed, encoding="utf8")
    report = folder / "report.html"
    report.write_text(class_report(grades()), encoding="utf8")
    answers = {name: [f"{name} says: " + "a long answer " * 20, "**"] for name in ("base", "SFT", "RL")}
    scores = {"RL": [0.5, 1.0]}
    write_comparison(folder / "comparison.html", ["What is " + "x" * 90, "No?"], answers, scores=scores)
    return folder


def grades():
    """A class of two with a mistake, a late and a missing notebook, and a wrong answer to a quiz."""
    message = "not right yet: your function raised ValueError: " + "no_place_to_break_" * 8
    rows = [
        ("ada", 1, "bradley_terry", "wrong", 0, message, True),
        ("bob", 1, "bradley_terry", "missing", 0, "", False),
        ("ada", 1, next(iter(questions())), "self-reported", 0, "tried", False),
    ]
    return pd.DataFrame(rows, columns=["learner", "lesson", "exercise", "state", "points", "message", "late"])


@pytest.mark.parametrize("theme, width", VIEWS)
@pytest.mark.parametrize("name", ["lesson", "report", "comparison"])
def test_a_page_is_accessible_and_fits_its_window(browser, pages, pictures, name, theme, width):
    page = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 900})
    page.route("http*://**", lambda route: route.abort())  # formulas stay as they are written
    page.goto(Path(pages, f"{name}.html").as_uri())
    page.screenshot(path=pictures / f"{name}-{theme}-{width}.png")
    levels = page.evaluate(HEADING_LEVELS)
    assert levels[0] == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert page.evaluate(UNREACHABLE) == 0, "a table that scrolls must take the focus"
    for each in (PHONE_PX, CODE_HOST_PX):
        page.set_viewport_size({"width": each, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= each
    page.set_viewport_size({"width": width, "height": 900})
    assert set(axe_faults(page, "html")) - set(KNOWN_OF_NBCONVERT) == set()
    page.close()


def test_a_printed_lesson_hides_nothing(browser, pages):
    page = browser.new_page(viewport={"width": PAPER_PX, "height": 1000})
    page.route("http*://**", lambda route: route.abort())
    page.emulate_media(media="print")
    page.goto(Path(pages, "print.html").as_uri())
    assert page.locator("details[open]").count() > 0
    assert page.locator("details:not([open])").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER_PX
    assert page.evaluate(CLIPPED) == []
    page.close()


def test_a_lesson_is_printed_to_a_pdf(tmp_path):
    (pdf,) = export_notebooks([LESSON], kind="pdf", out=tmp_path)
    printed = pdf.read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 40
