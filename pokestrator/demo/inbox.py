"""A loopback inbox that plays Poke: its message API and its callbacks, in the wire format its developer pages give.

Every request is kept, refused ones too, with the status it was answered with.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from pokestrator.demo.loopback import Handler, LoopbackServer

MESSAGE_PATH = "/api/v1/inbound/api-message"
CALLBACK_PATH = "/api/v1/callback/"

Channel = Literal["api_message", "callback", "other"]


@dataclass(frozen=True)
class Received:
    """One request as it came. `at` is time.time(); header names are in lower case; `status` is what it was answered
    with, 0 when the connection was closed instead."""

    at: float
    channel: Channel
    path: str
    headers: Mapping[str, str] = field(repr=False)
    body: dict[str, Any]
    status: int


@dataclass(frozen=True)
class _Answer:
    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0  # seconds


class Inbox(LoopbackServer):
    """The server.

    With `api_key` the message API lets only that key in; without, any. `on_received` is called with each Received
    before it is answered, in the request's own thread.
    """

    def __init__(self, api_key: str | None = None, on_received: Callable[[Received], None] | None = None) -> None:
        super().__init__()
        self.on_received = on_received
        self._api_key = api_key
        self._news = threading.Condition()
        self._received: list[Received] = []
        self._tokens: dict[str, str | None] = {}  # callback path -> the one token it takes now
        self._scripted: deque[Mapping[str, Any]] = deque()

    @property
    def message_url(self) -> str:
        """The message API, for POKE_WEBHOOK_URL."""
        return self.url + MESSAGE_PATH

    def callback_url(self, token: str) -> str:
        """A new conversation that takes `token` first, for X-Poke-Callback-Url."""
        path = CALLBACK_PATH + secrets.token_hex(8)
        with self._news:
            self._tokens[path] = token
        return self.url + path

    @property
    def received(self) -> list[Received]:
        with self._news:
            return list(self._received)

    def wait_for(self, n: int, timeout: float) -> list[Received]:
        """What has come once there are `n` requests, or after `timeout` seconds."""
        with self._news:
            self._news.wait_for(lambda: len(self._received) >= n, timeout)
            return list(self._received)

    def answer_with(self, answers: Iterable[Mapping[str, Any]]) -> None:
        """Script the answers to the next requests, in order; after them all is normal again.

        `{"status": 429, "headers": {…}, "body": {…}}`, `{"redirect": "/elsewhere"}` (302, or its "status"),
        `{"close": true}` (no answer at all); with `"delay": seconds`, which alone delays the normal answer. A scripted
        success uses a callback's token up, and gives the next one only if its body does.
        """
        with self._news:
            self._scripted.extend(answers)

    def receive(self, path: str, headers: Mapping[str, str], body: dict[str, Any] | None) -> _Answer:
        """Keep a request and decide its answer; `body` is None when it was not a JSON object."""
        token = headers.get("authorization", "").removeprefix("Bearer ")
        with self._news:
            channel: Channel = "other"
            if path == MESSAGE_PATH:
                channel = "api_message"
            elif path in self._tokens:
                channel = "callback"
            answer = self._answer(channel, path, token, body)
            received = Received(time.time(), channel, path, headers, body or {}, answer.status)
            self._received.append(received)
            self._news.notify_all()
        if self.on_received is not None:
            self.on_received(received)
        return answer

    def _answer(self, channel: Channel, path: str, token: str, body: dict[str, Any] | None) -> _Answer:
        scripted = self._scripted.popleft() if self._scripted else {}
        delay = scripted.get("delay", 0)
        if scripted.get("close"):
            return _Answer(0, {}, delay=delay)
        if "redirect" in scripted:
            return _Answer(scripted.get("status", 302), {}, {"location": scripted["redirect"]}, delay)
        if "status" in scripted or "body" in scripted or "headers" in scripted:
            answer = _Answer(scripted.get("status", 200), scripted.get("body", {}), scripted.get("headers", {}), delay)
            if channel == "callback" and answer.status < 300:
                self._tokens[path] = answer.body.get("nextToken")
            return answer
        status, value = self._normal(channel, path, token, body)
        return _Answer(status, value, delay=delay)

    def _normal(
        self, channel: Channel, path: str, token: str, body: dict[str, Any] | None
    ) -> tuple[int, dict[str, Any]]:
        if channel == "other":
            return 404, {"error": "not found"}
        wanted = self._api_key or token if channel == "api_message" else self._tokens[path]
        if not token or token != wanted:
            return 401, {"error": "unauthorized"}
        if body is None:
            return 400, {"error": "the body must be a JSON object"}
        if channel == "api_message":
            return 200, {"success": True, "message": "Message sent"}
        if not isinstance(body.get("content"), str) or not isinstance(body.get("hasMore"), bool):
            return 400, {"error": "content must be text and hasMore a boolean"}
        self._tokens[path] = secrets.token_hex(8) if body["hasMore"] else None
        return 200, {"nextToken": self._tokens[path]} if body["hasMore"] else {}


class _Handler(Handler):
    def do_GET(self) -> None:
        self._handle(None)

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length") or 0))
        try:
            body = json.loads(raw)
        except ValueError:
            body = None
        self._handle(body if isinstance(body, dict) else None)

    def _handle(self, body: dict[str, Any] | None) -> None:
        self.close_connection = True
        inbox: Inbox = self.server.owner
        if self.server.stopping.is_set():
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = inbox.receive(urlsplit(self.path).path, headers, body)
        if self.server.stopping.wait(answer.delay) or not answer.status:
            return
        data = json.dumps(answer.body).encode()
        fixed = {"content-type": "application/json", "content-length": str(len(data)), "connection": "close"}
        self.send_response(answer.status)
        for name, value in {**fixed, **answer.headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)


Inbox.handler = _Handler
