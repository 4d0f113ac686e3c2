"""What Poke's HTTP API looks like. Its facts come from the `poke` package and poke.com's developer pages:

    callback      POST {X-Poke-Callback-Url}, Bearer {token}, {"content": …, "hasMore": false}
    api_message   POST https://poke.com/api/v1/inbound/api-message, Bearer {key}, {"message": …, …}

Refusals carry `error` or `message`; 429 carries `retryAfterMs` (callback) or `Retry-After`.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError

from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

CONNECT_SECONDS = 5
READ_SECONDS = 30  # for each byte of the status and the headers
POST_SECONDS = 45.0  # in all, where cut_overdue() is called: a receiver that drips is never late with a byte
MAX_ANSWER_BYTES = 16 * 1024
ANSWER_SECONDS = 5  # for the body; the status alone says what became of the message
LONGEST_MILLISECONDS = 1e12  # JSON can spell integers that no float can hold
RATE_LIMIT_SECONDS = 60.0  # what Poke means by a 429 that names no time


@dataclass(frozen=True)
class Message:
    """One text for the person who sent the task."""

    request_id: uuid.UUID
    task: str
    content: str
    channel: Channel
    target: CallbackTarget | None  # for Channel.CALLBACK
    idempotency_key: str  # the same for every try of one callback


@dataclass(frozen=True)
class Receipt:
    """What came of one POST. `status` is None when there was no answer (or nothing was sent: dry run).

    `is_unsent`: certainly not a byte of it was sent, because this Poke was closed.
    """

    delivered: bool
    status: int | None = None
    error: str = ""
    retry_after_seconds: float | None = None
    is_unsent: bool = False


NOT_SENT = Receipt(False, None, "not sent: this instance is leaving", is_unsent=True)


class Poke:
    """Sends messages to Poke, from any number of threads. Without a key the message API is not among its channels."""

    def __init__(self, message_url: str, api_key: str | None, *, dry_run: bool) -> None:
        self._message_url = message_url
        self._api_key = api_key
        self._dry_run = dry_run
        self._lock = threading.Lock()
        self._posts: set[_Post] = set()
        self._is_closed = False

    @property
    def channels(self) -> tuple[Channel, ...]:
        """The channels that can be used now."""
        if self._api_key or self._dry_run:
            return (Channel.CALLBACK, Channel.API_MESSAGE)
        return (Channel.CALLBACK,)

    def send(self, message: Message) -> Receipt:
        """POST one message; never raises for what the network or Poke does."""
        if self._dry_run:
            log.info("callback_dry_run", request_id=str(message.request_id), content=one_line(message.content))
            return Receipt(delivered=True)
        if message.channel is Channel.CALLBACK and message.target is not None:
            body: dict[str, Any] = {"content": message.content, "hasMore": False}
            return self._post(message.target.url, message.target.token, body, message.idempotency_key)
        body = {"message": message.content, "request_id": str(message.request_id), "task": one_line(message.task)}
        return self._post(self._message_url, self._api_key or "", body, message.idempotency_key)

    def cut_overdue(self) -> None:
        """Break off the POSTs that have taken longer than POST_SECONDS: they fail at once."""
        with self._lock:
            overdue = [post for post in self._posts if time.monotonic() - post.began > POST_SECONDS]
        for post in overdue:
            post.cut()

    def close(self) -> None:
        """Break off all POSTs; later ones fail without having been sent."""
        with self._lock:
            self._is_closed = True
            posts = list(self._posts)
        for post in posts:
            post.cut()

    def _post(self, url: str, token: str, body: dict[str, Any], idempotency_key: str) -> Receipt:
        post = _Post()
        with self._lock:
            if self._is_closed:
                return NOT_SENT
            self._posts.add(post)
        _post_of_thread.set(post)
        try:
            receipt = _send(url, token, body, idempotency_key)
        finally:
            with self._lock:
                self._posts.discard(post)
            post.forget()
        if post.is_cut_unconnected and self._is_closed:
            return NOT_SENT
        if post.is_cut and receipt.status is None:
            seconds = round(time.monotonic() - post.began)
            return Receipt(False, None, f"broken off after {seconds} s at {_host_name(url)}")
        return receipt


class _Post:
    """One POST under way, which another thread can break off."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.is_cut = False
        self.is_cut_unconnected = False  # then nothing is sent: its connection is shut before anything is
        self._is_over = False
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None

    def connected(self, connection: socket.socket) -> None:
        # A copy, which nobody else closes: the number of a closed one may be somebody else's by the time of a cut.
        with self._lock:
            self._socket = socket.fromfd(connection.fileno(), connection.family, connection.type)
            if self.is_cut:
                self._shut_down(self._socket)

    def cut(self) -> None:
        with self._lock:
            if self._is_over:
                return
            if self._socket is not None:
                self._shut_down(self._socket)
            else:
                self.is_cut_unconnected = True
            self.is_cut = True

    def forget(self) -> None:
        with self._lock:
            self._is_over = True
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _shut_down(self, connection: socket.socket) -> None:
        with suppress(OSError):  # the receiver may just have hung up
            connection.shutdown(socket.SHUT_RDWR)


_post_of_thread: ContextVar[_Post] = ContextVar("post")


class _PlainConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        connection = super()._new_conn()
        _post_of_thread.get().connected(connection)
        return connection


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        connection = super()._new_conn()
        _post_of_thread.get().connected(connection)
        return connection


class _PlainPool(HTTPConnectionPool):
    ConnectionCls = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class _Adapter(HTTPAdapter):
    """Tells each POST of its connection."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _PlainPool, "https": _TlsPool}


class _Session(requests.Session):
    """Takes a redirect as the answer. requests parses it, and reads all of its body, even where it must not follow."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


def _send(url: str, token: str, body: dict[str, Any], idempotency_key: str) -> Receipt:
    headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": idempotency_key}
    try:
        with _Session() as session:
            session.trust_env = False  # a ~/.netrc entry would replace our Authorization
            for scheme in ("http://", "https://"):
                session.mount(scheme, _Adapter())
            with session.post(
                url,
                data=json.dumps(body).encode(),
                headers={**headers, "Content-Type": "application/json"},
                timeout=(CONNECT_SECONDS, READ_SECONDS),
                allow_redirects=False,  # a followed 302 would turn the POST into a GET without its body
                stream=True,
            ) as response:
                return _receipt(response)
    except (requests.RequestException, ValueError) as error:
        # The error's own text may hold the whole URL, which can be a secret.
        return Receipt(False, None, f"{type(error).__name__} at {_host_name(url)}")


def _host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or "no host"
    except ValueError:
        return "no address"


def _receipt(response: requests.Response) -> Receipt:
    status = response.status_code
    answer = _answer(response)
    if 200 <= status < 300:
        if answer.get("success") is False:
            return Receipt(False, status, _complaint(status, answer))
        return Receipt(True, status)
    return Receipt(False, status, _complaint(status, answer), _retry_after(response, answer))


def _answer(response: requests.Response) -> dict[str, Any]:
    """The JSON object that came with a status; empty when it is none, broke off, or does not end."""
    try:
        answer = json.loads(_body(response) or b"{}")
    except (ValueError, RecursionError, OSError, HTTPError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _body(response: requests.Response) -> bytes:
    body, deadline = b"", time.monotonic() + ANSWER_SECONDS
    while len(body) < MAX_ANSWER_BYTES and time.monotonic() < deadline:
        part: bytes = response.raw.read1(MAX_ANSWER_BYTES - len(body), decode_content=True)
        if not part:
            break
        body += part
    return body


def _complaint(status: int, answer: dict[str, Any]) -> str:
    said = answer.get("error") or answer.get("message") or ""
    return one_line(f"HTTP {status} {said}".strip())


def _retry_after(response: requests.Response, answer: dict[str, Any]) -> float | None:
    """Seconds that the receiver asks us to wait, if it does."""
    milliseconds = answer.get("retryAfterMs")
    if isinstance(milliseconds, (int, float)) and milliseconds >= 0:
        return min(milliseconds, LONGEST_MILLISECONDS) / 1000
    header = response.headers.get("Retry-After", "")
    if header.isascii() and header.isdigit():
        return float(header)
    until_date = _seconds_until(header)
    if until_date > 0:  # one that has passed is a clock's error more likely than a wish
        return until_date
    return RATE_LIMIT_SECONDS if response.status_code == 429 else None


def _seconds_until(date: str) -> float:
    """From now to an HTTP date, by our clock; 0 when it is none."""
    try:
        at = parsedate_to_datetime(date)
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
