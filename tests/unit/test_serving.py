"""A chatbot over loopback: batches, blocked answers, bad requests, and an end that leaves nothing behind."""

import logging
import socket
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest
import torch

from rlhf_helpers.chatbot_rlhf import AlignedChatbot
from rlhf_helpers.chatbot_rlhf.serving import ChatServer

Reply = namedtuple("Reply", "text allowed")
FALLBACK = "No."


class Echo:
    """Says what was asked, while its gate is open; blocks "bad", cannot read "long", breaks on "boom"."""

    def __init__(self):
        self.seen, self.gate = [], threading.Event()
        self.gate.set()

    def answer_batch(self, conversations):
        self.seen.append([talk[-1]["content"] for talk in conversations])
        assert self.gate.wait(60)
        if any("long" in text for text in self.seen[-1]):
            raise ValueError("a message does not fit into the context")
        if any("boom" in text for text in self.seen[-1]):
            raise RuntimeError("a secret path")
        return [
            Reply(FALLBACK, False) if "bad" in text else Reply(f"you: {text}", True) for text in self.seen[-1]
        ]


@pytest.fixture(scope="module")
def served():
    with ChatServer(Echo(), max_batch=4) as server:
        yield server


def user(text):
    return [{"role": "user", "content": text}]


def ask_all(server, texts):
    """One thread and one call of the openai client a text; the answers in order, or the errors."""
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id

        def ask(text):
            try:
                return client.chat.completions.create(model=model, messages=user(text)).choices[0]
            except openai.APIStatusError as error:
                return error

        with ThreadPoolExecutor(len(texts)) as pool:
            return list(pool.map(ask, texts))


def wait_for(holds):
    ends = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.005)


@contextmanager
def busy(server):
    """The chatbot is held at a request of its own, so that all others have to wait, until the block ends."""
    server.chatbot.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, server, {"messages": user("first")})
        wait_for(lambda: server.chatbot.seen)
        try:
            yield first
        finally:
            server.chatbot.gate.set()


def ask_together(server, texts):
    """Ask all while the chatbot is busy with another request: they wait and form batches."""
    with ThreadPoolExecutor(1) as pool, busy(server):
        answers = pool.submit(ask_all, server, texts)
        wait_for(lambda: server._queue.qsize() == len(texts))
    return answers.result()


def post(server, body=None, **options):
    options = {"json": body} if body is not None else options
    return httpx.post(f"{server.url}/chat/completions", trust_env=False, **options)


# ---- answers


def test_eight_at_once_are_answered_in_one_batch():
    texts = [f"question {i}" for i in range(8)]
    with ChatServer(Echo(), max_batch=8) as server:
        choices = ask_together(server, texts)
    assert [choice.message.content for choice in choices] == [f"you: {text}" for text in texts]
    assert {choice.finish_reason for choice in choices} == {"stop"}
    assert server.batch_sizes == [1, 8]
    assert sorted(server.chatbot.seen[1]) == texts


def test_no_batch_is_larger_than_asked_for():
    with ChatServer(Echo(), max_batch=4) as server:
        ask_together(server, [f"{i}" for i in range(9)])
    assert server.batch_sizes == [1, 4, 4, 1]


@pytest.mark.slow
def test_the_first_waits_for_others():
    with ChatServer(Echo(), max_wait=2.0) as server:
        ask_all(server, ["one", "two", "three"])
    assert server.batch_sizes == [3]


def test_a_blocked_answer_is_the_fallback_and_says_so(served):
    (choice,) = ask_all(served, ["a bad one"])
    assert choice.message.content == FALLBACK
    assert choice.finish_reason == "content_filter"


@pytest.mark.parametrize("word, status", [("long", 400), ("boom", 500)])
def test_one_failure_leaves_its_batch_unharmed(word, status, caplog):
    with ChatServer(Echo()) as server, caplog.at_level(logging.ERROR):
        answers = ask_together(server, ["one", f"two {word}", "three", "four"])
    assert server.batch_sizes == [1, 4]
    assert [getattr(a, "status_code", 200) for a in answers] == [200, status, 200, 200]
    assert answers[2].message.content == "you: three"
    assert ("does not fit" in str(answers[1])) == (word == "long")
    assert "secret" not in str(answers[1])  # what broke is for the log
    assert ("secret" in caplog.text) == (word == "boom")


def test_the_real_chatbot_answers_through_it_as_it_does_directly(tiny):
    model, _ = tiny
    texts = ["Hello", "What is the capital of France?", "I feel sad today."]
    judge = lambda prompts, responses, **_: torch.tensor([float("sad" not in p) for p in prompts])  # noqa: E731
    bots = [AlignedChatbot(model, safety_fn=judge, n=2, max_new_tokens=8) for _ in range(2)]
    with ChatServer(bots[0]) as server:
        served = [ask_all(server, [text])[0] for text in texts]
    direct = [bots[1].answer_batch([user(text)])[0] for text in texts]
    assert [choice.message.content for choice in served] == [reply.text for reply in direct]
    assert served[2].finish_reason == "content_filter"
    assert served[2].message.content == bots[0].fallback


# ---- bad requests


@pytest.mark.slow
@pytest.mark.parametrize(
    "body, status, said",
    [
        ({}, 400, "messages must be a list"),
        ([1], 400, "must be an object"),
        ({"messages": "hello"}, 400, "messages must be a list"),
        ({"messages": [{"role": "judge", "content": "x"}]}, 400, r"messages[0] needs a role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 400, r"messages[0] needs a role"),
        ({"messages": ["x"]}, 400, r"messages[0] needs a role"),
        ({"messages": user(" ")}, 400, "content that is text"),
        ({"messages": user([{"type": "text", "text": "x"}])}, 400, "content that is text"),
        ({"messages": [*user("x"), {"role": "assistant", "content": "y"}]}, 400, "the last message"),
        ({"messages": user("x"), "model": "other"}, 404, "no model 'other'"),
        ({"messages": user("x"), "temperature": 0.1}, 400, "'temperature' is fixed by the chatbot"),
        ({"messages": user("x"), "stream": True}, 400, "'stream' is fixed by the chatbot"),
        ({"messages": user("x" * 1_000_000)}, 413, "at most 1000000 bytes"),
    ],
)
def test_a_bad_request_gets_a_reason(served, body, status, said):
    before = len(served.batch_sizes)
    answer = post(served, body)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert len(served.batch_sizes) == before, "the chatbot was asked all the same"


def test_what_is_no_json_or_comes_from_a_page_elsewhere_is_refused(served):
    headers = {"content-type": "application/json"}
    assert post(served, content=b"{", headers=headers).status_code == 400
    assert post(served, content=b"\xff", headers=headers).status_code == 400
    assert post(served, content=b"[" * 100_000, headers=headers).status_code == 400
    half = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    assert post(served, content=half, headers=headers).status_code == 400
    # What a form of another page may send without asking, and a name that leads here from outside.
    good = b'{"messages": [{"role": "user", "content": "x"}]}'
    assert post(served, content=good, headers=headers).status_code == 200
    assert post(served, content=good, headers={"content-type": "text/plain"}).status_code == 415
    assert post(served, content=good, headers=headers | {"host": "evil.example"}).status_code == 400
    assert "access-control-allow-origin" not in post(served, {"messages": user("x")}).headers
    assert httpx.get(f"{served.url}/nothing", trust_env=False).status_code == 404
    assert httpx.get(f"{served.url}/chat/completions", trust_env=False).status_code == 405


def test_neutral_settings_are_taken(served):
    body = {"messages": user("x"), "model": served.name, "stream": False, "n": 1, "user": "me"}
    assert post(served, body).status_code == 200


def test_too_many_waiting_are_turned_away(monkeypatch):
    monkeypatch.setattr("rlhf_helpers.chatbot_rlhf.serving.MAX_WAITING", 2)
    with ChatServer(Echo()) as server:
        with ThreadPoolExecutor(1) as pool, busy(server):
            waiting = pool.submit(ask_all, server, ["two", "three"])
            wait_for(lambda: server._queue.qsize() == 2)
            refused = post(server, {"messages": user("one too many")})
        assert refused.status_code == 503
        assert "2 requests wait already" in refused.json()["error"]["message"]
        assert [choice.finish_reason for choice in waiting.result()] == ["stop", "stop"]


# ---- beginning and end


def test_nothing_is_left_when_the_block_ends():
    threads = set(threading.enumerate())
    with ChatServer(Echo()) as server, busy(server) as last:
        threading.Timer(0.3, server.chatbot.gate.set).start()
        server.__exit__()  # while a request is in hand
        assert last.result().json()["choices"][0]["message"]["content"] == "you: first"
    assert set(threading.enumerate()) <= threads
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


def test_it_listens_to_this_computer_alone(served):
    assert served.url.startswith("http://127.0.0.1:")
    (listener,) = served._server.servers[0].sockets
    assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.slow
def test_an_end_that_does_not_come_is_told(monkeypatch):
    monkeypatch.setattr("rlhf_helpers.chatbot_rlhf.serving.PATIENCE", 2.0)
    server = ChatServer(Echo()).__enter__()
    with busy(server), pytest.raises(RuntimeError, match="still busy after 2 s"):
        server.__exit__()
    server._thread.join(10)
    assert not server._thread.is_alive()


def test_answers_are_computed_with_the_threads_asked_for_and_the_callers_stay_as_they_are():
    seen, before = [], torch.get_num_threads()

    class Counts(Echo):
        def answer_batch(self, conversations):
            seen.append(torch.get_num_threads())
            return super().answer_batch(conversations)

    for threads in (1, None):
        with ChatServer(Counts(), threads=threads) as server:
            ask_all(server, ["hello"])
    assert seen == [1, before]
    assert torch.get_num_threads() == before


def test_a_taken_port_and_bad_numbers_raise(served):
    with pytest.raises(OSError, match="in use"), ChatServer(Echo(), port=served.port):
        pass
    for setting in ({"max_batch": 0}, {"max_wait": -1}, {"threads": 0}, {"threads": 1.5}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            ChatServer(Echo(), **setting)
