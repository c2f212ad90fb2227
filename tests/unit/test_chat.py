"""The chat with several policies: conversations, thumbs, blind choices, the store, and the page."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from rlhf_helpers.chatbot_rlhf.serving import ChatServer
from rlhf_helpers.core.models import to_text
from rlhf_helpers.core.stats import wilson_interval
from rlhf_helpers.lab.chat import SideBySide, pair_rows, thumb_rows
from rlhf_helpers.lab.labeling import LabelStore
from rlhf_helpers.preference_data import read_preferences

MARKUP = "<img src=x onerror=alert(1)>"


class Bot:
    """Says its name and how many messages it has read; cannot take "long"."""

    def __init__(self, name):
        self.name = name

    def answer_batch(self, conversations):
        talk = conversations[0]
        if talk[-1]["content"] == "long":
            raise ValueError("the last message does not fit: shorten it")
        return [SimpleNamespace(text=f"{self.name} {len(talk)}", prompt=to_text(talk), allowed=True)]


def form_of(*names, **options):
    options = {"store": LabelStore(None), **options}
    return SideBySide({name: Bot(name) for name in names}, **options)


def texts_of(form, turn=-1):
    return [answer["text"] for answer in form.shown["turns"][turn]["answers"]]


def place_of(form, name):
    """The place at which the last answers show a policy's."""
    return next(place for place, text in enumerate(texts_of(form)) if text.startswith(name))


def test_each_policy_remembers_its_own_conversation():
    form = form_of("base", "trained", "guarded")
    form.send("hello")
    form.send("again")
    assert texts_of(form, 0) == ["base 1", "trained 1", "guarded 1"]
    assert texts_of(form) == ["base 3", "trained 3", "guarded 3"]
    assert [history[1]["content"] for history in form.histories] == ["base 1", "trained 1", "guarded 1"]
    assert [answer["label"] for answer in form.shown["turns"][0]["answers"]] == ["base", "trained", "guarded"]
    form.restart()
    form.send("hello")
    assert texts_of(form) == ["base 1", "trained 1", "guarded 1"]


def test_a_thumb_is_on_the_disk_before_the_page_changes(tmp_path):
    path = tmp_path / "chat.sqlite"
    form = form_of("base", "trained", store=LabelStore(path))
    form.send("hello")
    seen = []
    form.observe(lambda change: seen.append(thumb_rows(LabelStore(path))), names="shown")
    form.thumb(True, 1)
    assert seen == [[{"prompt": "hello", "completion": "trained 1", "label": True}]]
    assert [answer["thumb"] for answer in form.shown["turns"][0]["answers"]] == [None, True]


def test_a_thumb_replaces_the_one_before_and_an_older_turn_can_get_one():
    form = form_of("base", "trained")
    form.send("hello")
    form.send("again")
    form.thumb(True, 0)
    form.thumb(False, 0)
    form.thumb(True, 1, turn=0)
    assert thumb_rows(form.store) == [
        {"prompt": "User: hello\n\nAssistant: base 1\n\nUser: again", "completion": "base 3", "label": False},
        {"prompt": "hello", "completion": "trained 1", "label": True},
    ]


def test_thumbs_that_differ_make_pairs():
    form = form_of("a", "b", "c")
    form.send("hello")
    for place, up in enumerate((True, False, True)):
        form.thumb(up, place)
    form.send("again")  # here the conversations differ: nothing to compare
    form.thumb(True, 0)
    form.thumb(False, 1)
    assert pair_rows(form.store) == [
        {"prompt": "hello", "chosen": chosen, "rejected": "b 1"} for chosen in ("a 1", "c 1")
    ]
    assert len(read_preferences(pair_rows(form.store))) == 2


class TestBlind:
    def test_no_name_is_shown_and_the_order_is_drawn_and_recorded(self, tmp_path):
        form = form_of("first", "second", blind=True, store=LabelStore(tmp_path / "chat.sqlite"))
        orders = []
        for number in range(40):
            form.send(f"message {number}")
            labels = [answer["label"] for answer in form.shown["turns"][-1]["answers"]]
            assert labels == ["Answer A", "Answer B"]
            orders.append(tuple(form.order))
            form.choose("tie")
        assert 10 <= orders.count((0, 1)) <= 30
        assert [label.shown for label in form.store.labels()] == orders

    def test_both_continue_from_the_chosen_answer(self):
        form = form_of("first", "second", blind=True)
        form.send("hello")
        form.choose(place_of(form, "second"))
        form.send("again")
        prompts = {answer["prompt"] for answer in form.shown["turns"][-1]["answers"]}
        assert prompts == {"User: hello\n\nAssistant: second 1\n\nUser: again"}

    def test_a_choice_is_a_pair_and_the_win_rate_follows_with_wilsons_interval(self, tmp_path):
        path = tmp_path / "chat.sqlite"
        form = form_of("first", "second", blind=True, store=LabelStore(path))
        for number, better in enumerate(("first", "first", "second", None)):
            form.send(f"message {number}")
            form.choose("tie" if better is None else place_of(form, better))
        low, high = wilson_interval(2.5, 4)
        expected = (0.625, low, high, 4)
        assert tuple(vars(form.win_rate()).values()) == pytest.approx(expected)
        assert "first over second: 0.625 [" in form.shown["message"]
        rows = LabelStore(path).preferences()
        assert [row["chosen"].split()[0] for row in rows] == ["first", "first", "second"]
        again = form_of("first", "second", blind=True, store=LabelStore(path))  # after a restart
        assert again.win_rate() == form.win_rate()

    def test_equal_answers_are_a_tie_whatever_is_pressed(self):
        form = SideBySide({"first": Bot("x"), "second": Bot("x")}, LabelStore(None), blind=True)
        form.send("hello")
        form.choose(0)
        assert form.win_rate().value == 0.5
        assert form.store.preferences() == []

    def test_a_choice_comes_before_the_next_message_and_only_once(self):
        form = form_of("first", "second", blind=True)
        with pytest.raises(ValueError, match="then choose"):
            form.choose(0)
        form.send("hello")
        with pytest.raises(ValueError, match="before the next message"):
            form.send("again")
        form.choose(0)
        with pytest.raises(ValueError, match="then choose"):
            form.choose(1)
        with pytest.raises(ValueError, match="exactly two"):
            form_of("a", "b", "c", blind=True)


def test_what_a_policy_cannot_take_is_told_and_not_remembered():
    form = form_of("base", "trained")
    before = form.shown["update"]
    for _ in range(2):
        assert "shorten it" in form.receive({"send": "long"})["message"]
    assert form.shown["update"] == before + 2, "the page waits for a change each time"
    assert form.turns == []
    for nonsense in ({}, {"send": 3}, {"thumb": True, "turn": 0, "place": 0}, {"choice": 7}):
        form.receive(nonsense)
    assert form.store.labels() == []


def test_messages_of_the_page():
    form = form_of("base", "trained")
    form._handle_msg({"content": {"data": {"method": "custom", "content": {"send": "hi"}}}, "buffers": []})
    form.receive({"thumb": False, "turn": 0, "place": 1})
    assert thumb_rows(form.store) == [{"prompt": "hi", "completion": "trained 1", "label": False}]
    assert form.receive({"restart": True})["turns"] == []


def test_without_a_kernel_the_text_is_escaped_and_the_same_in_every_run():
    bundles = []
    for _ in range(2):
        form = form_of("base", MARKUP)
        assert "Chat side by side" in form._repr_mimebundle_()[0]["text/html"]
        form.send(MARKUP)
        bundles.append(form._repr_mimebundle_()[0])
    assert MARKUP not in bundles[0]["text/html"]
    assert "&lt;img" in bundles[0]["text/html"]
    assert bundles[0]["text/html"] == bundles[1]["text/html"]
    assert bundles[0]["text/plain"] == f"SideBySide: base, {MARKUP}"


def test_no_thumb_is_lost_where_the_kernel_is_killed(tmp_path):
    program = """
        import os, signal
        from tests.unit.test_chat import form_of
        from rlhf_helpers.lab.labeling import LabelStore
        form = form_of("base", "trained", store=LabelStore("chat.sqlite"))
        for number in range(3):
            form.send(f"message {number}")
            form.thumb(number % 2 == 0, 1)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env=environment)
    assert done.returncode == -9
    rows = thumb_rows(LabelStore(tmp_path / "chat.sqlite"))
    assert [row["label"] for row in rows] == [True, False, True]


# ---- the page on the server


@pytest.fixture
def served():
    form = form_of("base", MARKUP)
    with ChatServer(Bot("base"), form=form) as server:
        yield form, server.url.removesuffix("/v1")


def post(address, content, **options):
    return httpx.post(f"{address}/form", json=content, trust_env=False, **options)


def test_the_page_talks_to_the_server_that_it_is_from(served):
    form, address = served
    page = httpx.get(f"{address}/", trust_env=False)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.text
    assert "connect-src 'self'" in page.text
    assert "://" not in page.text, "it loads nothing"
    assert MARKUP not in page.text
    shown = post(address, {"send": "hello"}).json()
    assert [answer["text"] for answer in shown["turns"][0]["answers"]] == ["base 1", f"{MARKUP} 1"]
    post(address, {"thumb": True, "turn": 0, "place": 0})
    assert thumb_rows(form.store) == [{"prompt": "hello", "completion": "base 1", "label": True}]
    assert post(address, {}).json()["turns"][0]["answers"][0]["thumb"] is True  # after a reload


def test_other_pages_cannot_press_thumbs(served):
    form, address = served
    form.send("hello")
    body = json.dumps({"thumb": True, "turn": 0, "place": 0})
    for headers in ({"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
        reply = httpx.post(f"{address}/form", content=body, headers=headers, trust_env=False)
        assert reply.status_code == 415
    assert post(address, {"send": "x"}, headers={"host": "evil.example"}).status_code == 400
    assert form.store.labels() == []


def test_a_server_without_a_form_has_no_page():
    with ChatServer(Bot("base")) as server:
        address = server.url.removesuffix("/v1")
        assert httpx.get(f"{address}/", trust_env=False).status_code == 404
        assert post(address, {}).status_code == 404
