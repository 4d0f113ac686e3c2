"""One POST to a receiver outside: its connection, its deadline, and what came of it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
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

from pokestrator.redaction import Redactor
from pokestrator.telemetry import one_line

CONNECT_SECONDS = 5
READ_SECONDS = 30  # for each byte of the status and the headers
MAX_ANSWER_BYTES = 16 * 1024
ANSWER_SECONDS = 5  # for the body; the status alone says what became of the message
LONGEST_MILLISECONDS = 1e12  # JSON can spell integers that no float can hold
RATE_LIMIT_SECONDS = 60.0  # what Poke means by a 429 that names no time


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
    is_refused: bool = False  # nothing was sent: the address is not one that we may send to


NOT_SENT = Receipt(False, None, "not sent: this instance is leaving", is_unsent=True)


class Inside(Exception):
    """The receiver's name leads to an address that is no receiver's: of this machine or its network."""


class Post:
    """One POST under way, which another thread can break off. `dial` makes its connection."""

    def __init__(self, dial: Callable[[str, int], socket.socket]) -> None:
        self.dial = dial
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


_post_of_thread: ContextVar[Post] = ContextVar("post")


def _dialled(host: str, port: int) -> socket.socket:
    """The connection of this thread's POST."""
    post = _post_of_thread.get()
    connection = post.dial(host, port)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    post.connected(connection)
    return connection


class _PlainConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _dialled(self.host, self.port)


class _TlsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        return _dialled(self.host, self.port)


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


def send(post: Post, url: str, token: str, body: dict[str, Any], idempotency_key: str) -> Receipt:
    """Make this POST, in the caller's thread; whatever the network or the receiver does ends in a receipt."""
    _post_of_thread.set(post)
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
                # Refusals quote what they refuse.
                return _receipt(response, Redactor([token, url]))
    except Inside as error:
        return refused(str(error))
    except (requests.RequestException, ValueError) as error:
        # The error's own text may hold the whole URL, which can be a secret.
        return Receipt(False, None, f"{type(error).__name__} at {host_name(url)}")


def refused(why: str) -> Receipt:
    return Receipt(False, None, f"not sent: {why}", is_refused=True)


def host_name(url: str) -> str:
    try:
        return urlsplit(url).hostname or "no host"
    except ValueError:
        return "no address"


def _receipt(response: requests.Response, redact: Redactor) -> Receipt:
    status = response.status_code
    answer = _answer(response)
    if 200 <= status < 300:
        if answer.get("success") is False:
            return Receipt(False, status, _complaint(status, answer, redact))
        return Receipt(True, status)
    return Receipt(False, status, _complaint(status, answer, redact), _retry_after(response, answer))


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


def _complaint(status: int, answer: dict[str, Any], redact: Redactor) -> str:
    said = answer.get("error") or answer.get("message") or ""
    return one_line(redact(f"HTTP {status} {said}".strip()))


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
