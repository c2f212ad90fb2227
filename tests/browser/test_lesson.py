"""A learner in JupyterLab: run, label, restart, answer, solve an exercise, move a slider, chat."""

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LESSON = Path(__file__).parents[2] / "notebooks" / "01_reward_modeling.ipynb"
FIRST_SECTION_LEFT_OUT = "## 4."
FORM = """\
from rlhf_helpers.lab.labeling import rate_pairs

browser_pairs = [{"prompt": f"Question {n}", "a": f"yes {n}", "b": f"no {n}"} for n in range(10)]
browser_form = rate_pairs(browser_pairs, path="browser.sqlite")
browser_form"""
COUNT = 'print("labeled:", len(browser_form.store.labels()))'
QUIZ = """\
from rlhf_helpers.lab.quizzes import quiz

quiz("why_a_reward_model")"""
EXPLORER = """\
from rlhf_helpers.lab.explorers import bradley_terry_figure, explore

explore(bradley_terry_figure)"""
CHAT = """\
from types import SimpleNamespace

from rlhf_helpers.lab.chat import SideBySide, thumb_rows
from rlhf_helpers.lab.labeling import LabelStore


class Parrot:
    def answer_batch(self, conversations):
        text = conversations[0][-1]["content"]
        return [SimpleNamespace(text=f"<b>{text}</b>", prompt=text)]


browser_chat = SideBySide({"base": Parrot(), "trained": Parrot()}, LabelStore("chat.sqlite"))
browser_chat"""
THUMBS = 'print("thumbs:", [row["label"] for row in thumb_rows(browser_chat.store)])'
END = 'print("the end " + "of the lesson")'
MINUTES = 60_000
SOURCES = "() => jupyterapp.shell.currentWidget.content.model.toJSON().cells.map((cell) => cell.source)"
WRONG = "def my_sft_labels(input_ids, response_mask):\n    return input_ids\n"
RIGHT = (
    "def my_sft_labels(input_ids, response_mask):\n    return input_ids.masked_fill(~response_mask, -100)\n"
)
CALL = '\n\nsft_labels = check("sft_labels", my_sft_labels)'


@pytest.fixture(scope="module")
def page(lab, browser):
    """Open the first three sections of lesson 1, with a form and a quiz behind them, and run all cells."""
    lesson = nbformat.read(LESSON, as_version=4)
    end = next(i for i, cell in enumerate(lesson.cells) if cell.source.startswith(FIRST_SECTION_LEFT_OUT))
    lesson.cells = [
        *lesson.cells[:end],
        *map(new_code_cell, (FORM, COUNT, QUIZ, EXPLORER, CHAT, THUMBS, END)),
    ]
    for cell in lesson.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(lesson, lab.folder / LESSON.name)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{lab.address}/lab/tree/{LESSON.name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=2 * MINUTES)
    run_all(page)
    yield page
    page.close()


def run_all(page):
    """Run every cell and wait for the last one."""
    page.wait_for_function(
        "() => jupyterapp.shell.currentWidget?.sessionContext?.isReady", timeout=2 * MINUTES
    )
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector("text=the end of the lesson", timeout=5 * MINUTES)


def run_cell_with(page, text, source=None):
    """Run the cell that holds a text, with another source if one is given; return its outputs' text."""
    return page.evaluate(
        """async ([text, source]) => {
            const panel = jupyterapp.shell.currentWidget;
            const cells = panel.content.widgets;
            const index = cells.findIndex((cell) => cell.model.sharedModel.getSource().includes(text));
            const cell = cells[index];
            if (source) cell.model.sharedModel.setSource(source);
            panel.content.activeCellIndex = index;
            await jupyterapp.commands.execute("notebook:run-cell");
            return cell.outputArea.node.innerText;
        }""",
        [text, source],
    )


def axe_faults(page, selector):
    """Serious violations that axe-core finds below a selector."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    found = axe.Axe().run(page, context=selector).response["violations"]
    return [fault["id"] for fault in found if fault["impact"] in ("serious", "critical")]


def test_the_first_three_sections_run_without_an_error(page):
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_ten_pairs_are_labeled_by_keyboard_and_no_key_reaches_the_notebook(page, pictures):
    form = page.locator(".rlhf-annotator").last
    form.scroll_into_view_if_needed()
    before = page.evaluate(SOURCES)
    form.locator(".answer").first.click()  # a click on a text puts the focus into the form
    for number, key in enumerate("abtsabddab"[:10]):
        form.page.wait_for_function(
            "(text) => [...document.querySelectorAll('.rlhf-annotator .prompt')].at(-1).textContent === text",
            arg=f"Question {number}",
        )
        if key == "d":  # deletes a cell where the notebook takes keys
            page.keyboard.press("d")
            page.keyboard.press("d")
            page.keyboard.press("x")
            key = "a"
        page.keyboard.press(key)
    form.locator("text=All items are labeled").wait_for(timeout=MINUTES)
    assert page.evaluate(SOURCES) == before
    assert "labeled: 10" in run_cell_with(page, "labeled:")
    form.screenshot(path=pictures / "form.png")


def test_undo_takes_a_label_back(page):
    form = page.locator(".rlhf-annotator").last
    form.locator("text=Undo").click()
    form.locator("text=Item 10 of 10").wait_for(timeout=MINUTES)
    page.keyboard.press("b")
    form.locator("text=All items are labeled").wait_for(timeout=MINUTES)


def test_all_labels_are_found_after_a_restart(page):
    page.evaluate("() => { jupyterapp.commands.execute('notebook:clear-all-cell-outputs'); }")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    run_all(page)
    assert "labeled: 10" in run_cell_with(page, "labeled:")


def test_a_quiz_is_answered(page, pictures):
    quiz = page.locator(".rlhf-choices").last
    quiz.scroll_into_view_if_needed()
    before = page.evaluate(SOURCES)
    options = quiz.locator("button, input")
    options.nth(0).click()
    page.keyboard.press("b")
    page.keyboard.press("d")
    page.keyboard.press("d")
    assert page.evaluate(SOURCES) == before
    quiz.screenshot(path=pictures / "quiz.png")
    assert quiz.locator("[role=status]").inner_text().strip()
    assert not axe_faults(page, ".rlhf-choices")


def test_an_exercise_is_solved_wrongly_and_then_rightly(page):
    wrong = run_cell_with(page, 'check("sft_labels"', WRONG + CALL)
    assert "not right yet" in wrong
    right = run_cell_with(page, 'check("sft_labels"', RIGHT + CALL)
    assert "right. Well done!" in right


def test_a_slider_changes_the_picture_and_what_it_says(page, pictures):
    explorer = page.locator(".rlhf-explorer").last
    explorer.scroll_into_view_if_needed()
    before, said = page.evaluate(SOURCES), explorer.locator("[role=status]").text_content()
    picture = explorer.locator("img").get_attribute("src")
    explorer.locator("input[type=range]").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "(said) => [...document.querySelectorAll('.rlhf-explorer p')].at(-1).textContent !== said",
        arg=said,
        timeout=MINUTES,
    )
    assert explorer.locator("img").get_attribute("src") != picture
    assert explorer.locator("[role=status]").text_content() in explorer.locator("img").get_attribute("alt")
    assert page.evaluate(SOURCES) == before
    assert not axe_faults(page, ".rlhf-explorer")
    explorer.screenshot(path=pictures / "explorer.png")


def test_two_policies_are_asked_and_rated_by_keyboard(page, pictures):
    chat = page.locator(".rlhf-chat").last
    chat.scroll_into_view_if_needed()
    before = page.evaluate(SOURCES)
    chat.locator("input").focus()
    page.keyboard.type("add a bed")  # "a", "b" and "dd" are commands of the notebook
    page.keyboard.press("Enter")
    chat.locator("[role=log] >> text=<b>add a bed</b>").last.wait_for(timeout=MINUTES)
    assert chat.locator("input").input_value() == ""
    page.keyboard.press("Shift+Tab")  # from the message to the last thumb: down, for the second answer
    page.keyboard.press("Enter")
    chat.locator("text=✓ Thumb down").wait_for(timeout=MINUTES)
    page.keyboard.press("d")
    page.keyboard.press("d")
    assert page.evaluate(SOURCES) == before
    assert "thumbs: [False]" in run_cell_with(page, "thumbs:")
    assert not axe_faults(page, ".rlhf-chat")
    chat.screenshot(path=pictures / "chat.png")


def test_figures_have_alt_text_in_the_page(page):
    alts = page.eval_on_selector_all(".jp-OutputArea img", "(images) => images.map((image) => image.alt)")
    assert alts
    assert min(map(len, alts)) >= 40


def test_the_form_is_accessible(page):
    assert not axe_faults(page, ".rlhf-annotator")


def test_pages_are_readable_in_a_dark_theme_and_on_a_narrow_screen(page, pictures):
    assert page.evaluate("() => document.body.dataset.jpThemeLight") == "false"
    page.screenshot(path=pictures / "dark.png")
    page.set_viewport_size({"width": 420, "height": 900})
    page.evaluate("() => { jupyterapp.shell.collapseLeft(); jupyterapp.shell.collapseRight(); }")
    form = page.locator(".rlhf-annotator").last
    form.scroll_into_view_if_needed()
    page.screenshot(path=pictures / "narrow.png")
    page.set_viewport_size({"width": 1280, "height": 900})
