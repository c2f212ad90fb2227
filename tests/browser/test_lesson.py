"""A learner in JupyterLab: run, label, restart, answer, solve an exercise, move a slider, chat."""

from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell

from rlhf_helpers.lab.quizzes import questions

pytestmark = [pytest.mark.browser, pytest.mark.slow]

LESSON = Path(__file__).parents[2] / "notebooks" / "01_reward_modeling.ipynb"
FIRST_SECTION_LEFT_OUT = "## 4."
PAIRS = """\
from rlhf_helpers.lab.labeling import rate_pairs

browser_pairs = [{"prompt": f"Question {n}", "a": f"yes {n}", "b": f"no {n}"} for n in range(10)]
browser_form = rate_pairs(browser_pairs, path="browser.sqlite", guideline="Compare two answers.")
browser_form"""
COUNT = 'print("labeled:", len(browser_form.store.labels()))'
RANKING = """\
from rlhf_helpers.lab.labeling import Annotator, Item, LabelStore

browser_items = [
    Item("ranking", "Name a city", ("Paris", "Rome", "Oslo")),
    Item("rating", "Name a river", ("The Seine",)),
]
browser_ranking = Annotator(
    browser_items, LabelStore("ranking.sqlite"), annotator="you", guideline="Rank or rate answers."
)
browser_ranking"""
RANKED = """\
browser_rows = browser_ranking.store.preferences()
print("ranked and rated:", [row.get("responses", row.get("rating")) for row in browser_rows])"""
QUIZ = """\
from rlhf_helpers.lab.quizzes import quiz

quiz("why_a_reward_model")"""
CHECKLIST = """\
from rlhf_helpers.lab.progress import progress

progress()"""
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
CELLS = """() => jupyterapp.shell.currentWidget.content.model.toJSON().cells.map(
    (cell) => [cell.cell_type, cell.source]
)"""
# To JupyterLab, "m", "y" and "1" change the type of a cell, "x" and "dd" remove one.
COMMANDS = "my1xdd"
FORMS = {
    "pairs": ".rlhf-annotator:has-text('Compare two answers')",
    "ranking": ".rlhf-annotator:has-text('Rank or rate')",
    "quiz": f".rlhf-choices:has-text('{questions()['why_a_reward_model']['question']}')",
    "checklist": ".rlhf-choices:has-text('Tick what you can do')",
    "explorer": ".rlhf-explorer",
    "chat": ".rlhf-chat",
}
MOST_STOPS = 200  # of Tab: on the progress page, the links to all exercises come before the checklist
HAS_FOCUS = "(node) => node === document.activeElement"
OUTLINE = """(node) => {
    const style = getComputedStyle(node);
    return [style.outlineStyle, style.outlineWidth, style.boxShadow];
}"""
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
    added = (PAIRS, COUNT, RANKING, RANKED, QUIZ, CHECKLIST, EXPLORER, CHAT, THUMBS, END)
    lesson.cells = [*lesson.cells[:end], *map(new_code_cell, added)]
    for cell in lesson.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(lesson, lab.folder / LESSON.name)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(2 * MINUTES)
    page.goto(f"{lab.address}/lab/tree/{LESSON.name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    run_from(page, lesson.cells[0].source)
    yield page
    page.close()


def run_from(page, source):
    """Run the cell with this source and all below it, and wait for the last one."""
    page.wait_for_function("() => jupyterapp.shell.currentWidget?.sessionContext?.isReady")
    page.evaluate(
        """(source) => {
            const notebook = jupyterapp.shell.currentWidget.content;
            const sources = notebook.widgets.map((cell) => cell.model.sharedModel.getSource());
            notebook.activeCellIndex = sources.indexOf(source);
            jupyterapp.commands.execute("notebook:run-all-below");
        }""",
        source,
    )
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


def form_in(page, name):
    """Scroll to the last form of this name."""
    form = page.locator(FORMS[name]).last
    form.scroll_into_view_if_needed()
    return form


@contextmanager
def no_key_reaches_the_notebook(page):
    """Check that neither the keys of the block nor commands, typed at its end, change a cell."""
    before = page.evaluate(CELLS)
    yield
    page.keyboard.type(COMMANDS)
    assert page.evaluate(CELLS) == before


def axe_faults(page, selector):
    """Serious violations that axe-core finds below a selector."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    # In a body without a height, such as JupyterLab's, axe takes all text for hidden and reads no contrast.
    page.add_style_tag(content="body { height: 100vh; }")
    found = axe.Axe().run(page, context=selector).response["violations"]
    return [fault["id"] for fault in found if fault["impact"] in ("serious", "critical")]


def test_the_first_three_sections_run_without_an_error(page):
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0


def test_an_exercise_is_solved_wrongly_and_then_rightly(page):
    wrong = run_cell_with(page, 'check("sft_labels"', WRONG + CALL)
    assert "not right yet" in wrong
    right = run_cell_with(page, 'check("sft_labels"', RIGHT + CALL)
    assert "right. Well done!" in right


def test_ten_pairs_are_labeled_by_keyboard(page):
    form = form_in(page, "pairs")
    with no_key_reaches_the_notebook(page):
        form.locator(".answer").first.click()  # a click on a text puts the focus into the form
        page.keyboard.type(COMMANDS)
        for number, key in enumerate("abtsabaabb"):
            form.locator(f".prompt:text-is('Question {number}')").wait_for()
            page.keyboard.press(key)
        form.locator("text=All items are labeled").wait_for()
    assert "labeled: 10" in run_cell_with(page, "labeled:")


def test_answers_are_ranked_and_rated_by_digits(page):
    form = form_in(page, "ranking")
    shown = form.locator(".answer span").all_inner_texts()
    with no_key_reaches_the_notebook(page):
        form.locator(".answer").first.click()
        page.keyboard.press("2")
        form.locator("text=B (rank 1)").wait_for()
        page.keyboard.press("1")
        form.locator("text=Name a river").wait_for()
        page.keyboard.press("4")
        form.locator("text=All items are labeled").wait_for()
    ranking = [shown[1], shown[0], shown[2]]
    assert f"ranked and rated: {[ranking, 4.0]}" in run_cell_with(page, "ranked and rated:")


def test_all_labels_are_found_after_a_restart(page):
    page.evaluate("() => { jupyterapp.commands.execute('notebook:clear-all-cell-outputs'); }")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    run_from(page, PAIRS)
    assert "labeled: 10" in run_cell_with(page, "labeled:")


def test_undo_takes_a_label_back(page):
    form = form_in(page, "pairs")
    form.locator("text=Undo").click()
    form.locator("text=Item 10 of 10").wait_for()
    page.keyboard.press("b")
    form.locator("text=All items are labeled").wait_for()
    page.keyboard.press("u")
    form.locator("text=Item 10 of 10").wait_for()


@pytest.mark.parametrize(
    "name, key, answer",
    [
        ("pairs", "Enter", "All items are labeled"),
        ("quiz", "Enter", "ight."),
        ("checklist", "Space", "☑"),
    ],
)
def test_tab_leads_from_a_cell_to_its_form_which_shows_the_focus(page, name, key, answer):
    form = form_in(page, name)
    button = form.locator("button").first
    before = button.evaluate(OUTLINE)
    page.locator(".jp-Cell").filter(has=form).focus()
    with no_key_reaches_the_notebook(page):
        for _ in range(MOST_STOPS):
            page.keyboard.press("Tab")
            if button.evaluate(HAS_FOCUS):
                break
        style, *rest = button.evaluate(OUTLINE)
        assert style != "none"
        assert [style, *rest] != before
        page.keyboard.press(key)
        form.locator(f"text={answer}").first.wait_for()


def test_a_slider_changes_the_picture_and_what_it_says(page):
    explorer = form_in(page, "explorer")
    said = explorer.locator("[role=status]").text_content()
    picture = explorer.locator("img").get_attribute("src")
    with no_key_reaches_the_notebook(page):
        explorer.locator("input[type=range]").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "(said) => [...document.querySelectorAll('.rlhf-explorer p')].at(-1).textContent !== said",
            arg=said,
        )
    assert explorer.locator("img").get_attribute("src") != picture
    assert explorer.locator("[role=status]").text_content() in explorer.locator("img").get_attribute("alt")


def test_two_policies_are_asked_and_rated_by_keyboard(page):
    chat = form_in(page, "chat")
    with no_key_reaches_the_notebook(page):
        chat.locator("input").focus()
        page.keyboard.type("add a bed")  # "a", "b" and "dd" are commands of the notebook
        page.keyboard.press("Enter")
        chat.locator("[role=log] >> text=<b>add a bed</b>").last.wait_for()
        assert chat.locator("input").input_value() == ""
        page.keyboard.press("Shift+Tab")  # from the message to the last thumb: down, for the second answer
        page.keyboard.press("Enter")
        chat.locator("text=✓ Thumb down").wait_for()
    assert "thumbs: [False]" in run_cell_with(page, "thumbs:")


def test_figures_have_alt_text_in_the_page(page):
    alts = page.eval_on_selector_all(".jp-OutputArea img", "(images) => images.map((image) => image.alt)")
    assert alts
    assert min(map(len, alts)) >= 40


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_the_forms_are_accessible(page, pictures, theme):
    page.evaluate(
        "(theme) => jupyterapp.commands.execute('apputils:change-theme', {theme})", f"JupyterLab {theme}"
    )
    page.wait_for_selector(f"body[data-jp-theme-light={str(theme == 'Light').lower()}]", state="attached")
    for name in ("pairs", "ranking"):  # with an open item
        form_in(page, name).locator("text=Undo").click()
        form_in(page, name).locator("text=/Item \\d/").wait_for()
    for name in FORMS:
        # Contrast is read of what is on the screen alone.
        form_in(page, name).screenshot(path=pictures / f"{name}-{theme.lower()}.png")
        assert not axe_faults(page, "[class^=rlhf]"), name


def test_the_forms_fit_a_narrow_screen(page, pictures):
    page.screenshot(path=pictures / "dark.png")
    page.set_viewport_size({"width": 420, "height": 900})
    page.evaluate("() => { jupyterapp.shell.collapseLeft(); jupyterapp.shell.collapseRight(); }")
    for name in FORMS:
        assert form_in(page, name).evaluate("(node) => node.scrollWidth <= node.clientWidth"), name
    form_in(page, "pairs")
    page.screenshot(path=pictures / "narrow.png")
    page.set_viewport_size({"width": 1280, "height": 900})
