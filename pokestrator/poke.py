"""What Poke's HTTP API looks like. Its facts come from the `poke` package and poke.com's developer pages:

    callback      POST {X-Poke-Callback-Url}, Bearer {token}, {"content": …, "hasMore": false}
    api_message   POST https://poke.com/api/v1/inbound/api-message, Bearer {key}, {"message": …, …}

Refusals carry `error` or `message`; 429 carries `retryAfterMs` (callback) or `Retry-After`.
"""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

CONNECT_SECONDS = 5
READ_SECONDS = 30
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
    """What came of one POST. `status` is None when there was no answer (or nothing was sent: dry run)."""

    delivered: bool
    status: int | None = None
    error: str = ""
    retry_after_seconds: float | None = None


class Poke:
    """Sends messages to Poke. Without a key the message API is not among its channels."""

    def __init__(self, message_url: str, api_key: str | None, *, dry_run: bool) -> None:
        self._message_url = message_url
        self._api_key = api_key
        self._dry_run = dry_run

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

    def _post(self, url: str, token: str, body: dict[str, Any], idempotency_key: str) -> Receipt:
        headers = {"Authorization": f"Bearer {token}", "Idempotency-Key": idempotency_key}
        try:
            with requests.Session() as session:
                session.trust_env = False  # a ~/.netrc entry would replace our Authorization
                with session.post(
                    url,
                    data=json.dumps(body).encode(),
                    headers={**headers, "Content-Type": "application/json"},
                    timeout=(CONNECT_SECONDS, READ_SECONDS),
                    allow_redirects=False,  # a followed 302 would turn the POST into a GET without its body
                    stream=True,
                ) as response:
                    return _receipt(response)
        except (requests.RequestException, UnicodeError) as error:
            # The error's own text may hold the whole URL, which can be a secret.
            return Receipt(False, None, f"{type(error).__name__} at {urlsplit(url).hostname}")


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
    """Seconds that the receiver asks us to wait; a date in Retry-After counts as not given."""
    milliseconds = answer.get("retryAfterMs")
    if isinstance(milliseconds, (int, float)) and milliseconds >= 0:
        return min(milliseconds, LONGEST_MILLISECONDS) / 1000
    header = response.headers.get("Retry-After", "")
    if header.isascii() and header.isdigit():
        return float(header)
    return RATE_LIMIT_SECONDS if response.status_code == 429 else None
