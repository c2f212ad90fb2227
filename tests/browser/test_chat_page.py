"""The chat as a page of the loopback server: a blind comparison by keyboard, in both themes and narrow."""

import pytest

from rlhf_helpers.chatbot_rlhf.serving import ChatServer
from rlhf_helpers.lab.chat import SideBySide
from rlhf_helpers.lab.labeling import LabelStore
from tests.browser.test_lesson import axe_faults
from tests.unit.test_chat import MARKUP, Bot

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize("theme, width", [("light", 1000), ("dark", 420)])
def test_a_blind_comparison_by_keyboard(browser, pictures, theme, width):
    bots = {"base": Bot("base"), "trained": Bot(MARKUP)}
    form = SideBySide(bots, LabelStore(None), blind=True)
    page = browser.new_page(color_scheme=theme, viewport={"width": width, "height": 800})
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    with ChatServer(bots["base"], form=form) as server:
        page.goto(server.url.removesuffix("v1"))
        page.locator("input").focus()
        second = []  # the policy whose answer stands on the right
        for number in range(2):
            page.keyboard.type(f"message {number}")
            page.keyboard.press("Enter")
            page.locator("text=A is better").wait_for()
            assert not axe_faults(page, "main")
            second.append(form.order[1])
            page.keyboard.press("Shift+Tab")  # from the message to "Tie", and on to "B is better"
            page.keyboard.press("Shift+Tab")
            page.keyboard.press("Enter")  # the focus goes back to the message
            page.locator(f"text=n = {number + 1}").wait_for()
        page.screenshot(path=pictures / f"page-{theme}-{width}.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [label.value for label in form.store.labels()] == second
    assert page.locator("[role=log] img").count() == 0, "what a model says stays text"
    assert faults == []
    page.close()
