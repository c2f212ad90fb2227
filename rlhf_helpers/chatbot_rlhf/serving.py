"""A chatbot behind its guard as a server on this computer: chat completions over HTTP, answered in batches.

uvicorn serves, starlette routes; both speak only when spoken to. Any client of the chat-completions form
works, `openai.OpenAI(base_url=server.url, api_key="none")` among them.
"""

import asyncio
import json
import logging
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from threadpoolctl import threadpool_limits

from rlhf_helpers.core.tensors import require_number
from rlhf_helpers.core.text import is_text

MAX_BODY = 1_000_000  # bytes
MAX_WAITING = 256  # requests
HOST = "127.0.0.1"
PATIENCE = 30.0  # seconds that starting and stopping may take
# What a request may hold: what is asked, and settings that change nothing.
NEUTRAL: dict[str, tuple] = {"stream": (False, None), "n": (1, None)}
IGNORED = {"user", "metadata", "store", "safety_identifier"}
ROLES = ("system", "user", "assistant")
logger = logging.getLogger(__name__)
Conversation = list[dict[str, str]]


class ChatServer:
    """Serves a chatbot at `url` while a `with` block runs; requests that come together are answered together.

    chatbot: an `AlignedChatbot`, or anything whose answer_batch(conversations) gives each a reply: `text`,
    what is shown, and `allowed`, false where that is a fallback. What its guard withholds is never sent.

    POST /v1/chat/completions with model and messages gives choices[0].message.content, and finish_reason
    "stop", or "content_filter" where the guard put its fallback in place of the answer. Settings of sampling
    belong to the chatbot: a request that brings its own is refused, and so is stream, since a guard has to
    read an answer whole. GET /v1/models lists the one model. What cannot be read or answered gets a 4xx with
    the reason and leaves its batch unharmed: after a failure each is asked alone.

    The first request of a batch waits max_wait seconds for others, at most max_batch together; what comes
    while a batch is answered forms the next. Above MAX_WAITING requests the next one gets 503. batch_sizes:
    the requests of each batch so far. Answers come from a thread of this process: do not train meanwhile.
    threads: that it computes with, None as many as torch has. Where the steps are short, as those of a tiny
    model, several cost more in waiting for each other than they save: one answers in half the time.

    form: a page for people at http://host:port/, or None. Its page() is HTML; its receive(message) takes the
    JSON object that the page posts to /form and gives what it shows next (`lab.chat.SideBySide` has both).

    It listens to this computer alone, because it has no password, no encryption and no limit on a stranger's
    use: for others put a proxy in front that has them. Lesson 4. Raises ValueError for numbers out of range,
    OSError where the port is taken.
    """

    name = "aligned-chatbot"

    def __init__(
        self,
        chatbot: Any,
        *,
        port: int = 0,
        max_batch: int = 8,
        max_wait: float = 0.02,
        threads: int | None = None,
        form: Any = None,
    ) -> None:
        """Keep what is served and where; port 0 takes a free one. Nothing listens yet."""
        require_number("max_batch", max_batch, at_least=1)
        require_number("max_wait", max_wait, at_least=0)
        require_number("threads", 1 if threads is None else threads, whole=True, at_least=1)
        self.chatbot, self.port = chatbot, port
        self.max_batch, self.max_wait, self.threads = max_batch, max_wait, threads
        self.batch_sizes: list[int] = []
        self.form = form
        pages = [Route("/", self._page), Route("/form", self._take, methods=["POST"])]
        # A web page elsewhere must not reach the server under a name of its own (DNS rebinding).
        hosts = [HOST, "localhost"]
        self.app = Starlette(
            routes=[
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/v1/models", self._models),
                *(pages if form is not None else ()),
            ],
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={HTTPException: _refuse},
            lifespan=self._lifespan,
        )

    @property
    def url(self) -> str:
        """The base address for clients."""
        return f"http://{HOST}:{self.port}/v1"

    def __enter__(self) -> "ChatServer":
        """Listen, in a thread of this process, and return when requests are taken."""
        listener = socket.create_server((HOST, self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(PATIENCE) // 2,
        )
        self._server = uvicorn.Server(config)
        run = {"target": self._server.run, "kwargs": {"sockets": [listener]}, "name": "chat-server"}
        self._thread = threading.Thread(**run, daemon=True)
        self._thread.start()
        ends = time.monotonic() + PATIENCE
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > ends:
                listener.close()
                raise RuntimeError(f"the server did not start at {self.url}: see the log of uvicorn")
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        """Take no more requests, answer those in hand, and end the thread."""
        self._server.should_exit = True
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            raise RuntimeError(f"the chatbot is still busy after {PATIENCE:.0f} s: its thread was left alone")

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        self._queue: asyncio.Queue = asyncio.Queue()
        batching = asyncio.create_task(self._batches())
        yield
        batching.cancel()

    async def _batches(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() + 1 < self.max_batch:
                await asyncio.sleep(self.max_wait)
            while len(batch) < self.max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self.batch_sizes.append(len(batch))
            replies = await asyncio.to_thread(self._computed, [conversation for conversation, _ in batch])
            for (_, reply), found in zip(batch, replies, strict=True):
                if not reply.done():  # its client may be gone
                    reply.set_result(found)

    def _computed(self, conversations: list[Conversation]) -> list[Any]:
        """The answers, computed with `threads`, a limit for this Python thread alone."""
        # Not torch.set_num_threads: MKL then computes otherwise in all threads.
        with threadpool_limits(self.threads, user_api="openmp"):
            return self._answers(conversations)

    def _answers(self, conversations: list[Conversation]) -> list[Any]:
        """A reply for each, or the exception that it alone raises."""
        try:
            replies = list(self.chatbot.answer_batch(conversations))
            if len(replies) != len(conversations):
                raise RuntimeError(f"the chatbot gave {len(replies)} replies to {len(conversations)}")
            return replies
        except Exception as error:
            if len(conversations) == 1:
                return [error]
        return [reply for conversation in conversations for reply in self._answers([conversation])]

    async def _complete(self, request: Request) -> JSONResponse:
        conversation = _conversation(await _body(request), self.name)
        if self._queue.qsize() >= MAX_WAITING:
            raise HTTPException(503, f"{MAX_WAITING} requests wait already: ask again later")
        answered = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((conversation, answered))
        reply = await answered
        if isinstance(reply, ValueError):
            raise HTTPException(400, str(reply))
        if isinstance(reply, Exception):
            logger.error("the chatbot failed", exc_info=reply)  # the client learns no more than that
            raise HTTPException(500, "the chatbot failed on this request; its log says how")
        choice = {"index": 0, "message": {"role": "assistant", "content": reply.text}}
        choice["finish_reason"] = "stop" if reply.allowed else "content_filter"
        completion = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [choice],
        }
        return JSONResponse(completion)

    async def _page(self, _request: Request) -> HTMLResponse:
        return HTMLResponse(self.form.page())

    async def _take(self, request: Request) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(self.form.receive, await _body(request)))

    async def _models(self, _request: Request) -> JSONResponse:
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object of a request. Only application/json: a form of a web page elsewhere cannot send it."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send JSON, with content-type application/json")
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise HTTPException(413, f"a request holds at most {MAX_BODY} bytes")
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(400, f"the request must be an object with messages, got {body!r:.80}")
    return body


def _conversation(body: dict[str, Any], name: str) -> Conversation:
    """The messages of a request, checked; HTTPException where they or a setting cannot be taken."""
    if body.get("model", name) != name:
        raise HTTPException(404, f"there is no model {body['model']!r:.80}, only {name!r}")
    for key, value in body.items():
        allowed = key in IGNORED | {"model", "messages"} or value in NEUTRAL.get(key, (None,))
        if not allowed:
            raise HTTPException(400, f"{key!r:.80} is fixed by the chatbot and cannot be set: leave it out")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise HTTPException(400, f"messages must be a list of at least one message, got {messages!r:.80}")
    for i, message in enumerate(messages):
        fields = message if isinstance(message, dict) else {}
        text = fields.get("content")
        if fields.get("role") not in ROLES or not is_text(text) or not text.strip():
            wanted = f"a role of {', '.join(ROLES)} and a content that is text"
            raise HTTPException(400, f"messages[{i}] needs {wanted}, got {message!r:.80}")
    if messages[-1]["role"] != "user":
        raise HTTPException(400, "the last message must be the user's: it is what gets answered")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


async def _refuse(_request: Request, error: Exception) -> JSONResponse:
    status = getattr(error, "status_code", 500)
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {"message": getattr(error, "detail", ""), "type": kind, "code": status}
    return JSONResponse({"error": told}, status_code=status, headers=getattr(error, "headers", None))
