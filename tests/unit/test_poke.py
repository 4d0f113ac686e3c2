"""Poke's HTTP API, spoken to a real server on loopback that plays it well and badly."""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pokestrator import poke
from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.poke import Message, Poke, Receipt

KEY = "poke-api-key-of-the-owner"
TOKEN = "token-of-the-callback"
REQUEST_ID = uuid.uuid4()
CONTENT = "Zählung: 🐑 3\n“done”"


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=KEY) as started:
        yield started


def by_message_api(inbox: Inbox, content: str = CONTENT) -> Receipt:
    return Poke(inbox.message_url, KEY, dry_run=False).send(message(content=content))


def by_callback(url: str, token: str = TOKEN) -> Receipt:
    return Poke("https://poke.invalid/", KEY, dry_run=False).send(message(CallbackTarget(url, token)))


def message(target: CallbackTarget | None = None, task: str = "count\n my sheep", content: str = CONTENT) -> Message:
    channel = Channel.CALLBACK if target else Channel.API_MESSAGE
    return Message(REQUEST_ID, task, content, channel, target, "key-of-this-callback")


# What is sent ----------------------------------------------------------------------------------------------------


def test_the_message_api_gets_the_text_with_its_request_and_task(inbox: Inbox) -> None:
    assert by_message_api(inbox) == Receipt(delivered=True, status=200)
    (received,) = inbox.received
    assert received.channel == "api_message"
    assert received.body == {"message": CONTENT, "request_id": str(REQUEST_ID), "task": "count my sheep"}
    assert received.headers["authorization"] == f"Bearer {KEY}"
    assert received.headers["content-type"] == "application/json"


def test_a_callback_gets_the_text_and_the_end_of_the_turn(inbox: Inbox) -> None:
    assert by_callback(inbox.callback_url(TOKEN)) == Receipt(delivered=True, status=200)
    (received,) = inbox.received
    assert received.channel == "callback"
    assert received.body == {"content": CONTENT, "hasMore": False}
    assert received.headers["authorization"] == f"Bearer {TOKEN}"
    assert KEY not in str(received.headers)


def test_every_try_of_one_callback_carries_one_idempotency_key(inbox: Inbox) -> None:
    inbox.answer_with([{"status": 500}])
    assert [by_message_api(inbox).delivered, by_message_api(inbox).delivered] == [False, True]
    assert [received.headers["idempotency-key"] for received in inbox.received] == ["key-of-this-callback"] * 2


def test_a_dry_run_sends_nothing_on_any_channel(inbox: Inbox) -> None:
    dry = Poke(inbox.message_url, KEY, dry_run=True)
    assert dry.send(message()) == Receipt(delivered=True, status=None)
    assert dry.send(message(CallbackTarget(inbox.callback_url(TOKEN), TOKEN))).delivered
    assert inbox.received == []


def test_without_a_key_the_message_api_is_no_channel() -> None:
    url = "https://poke.invalid/"
    assert Poke(url, None, dry_run=False).channels == (Channel.CALLBACK,)
    assert Poke(url, KEY, dry_run=False).channels == (Channel.CALLBACK, Channel.API_MESSAGE)
    assert Poke(url, None, dry_run=True).channels == (Channel.CALLBACK, Channel.API_MESSAGE)


def test_an_entry_in_netrc_does_not_replace_our_key(
    inbox: Inbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login stranger password theirs\ndefault login stranger password theirs\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    assert by_message_api(inbox).delivered
    assert inbox.received[0].headers["authorization"] == f"Bearer {KEY}"


# What is answered ------------------------------------------------------------------------------------------------


def test_a_redirect_is_not_followed(inbox: Inbox) -> None:
    for status in (301, 302, 303, 307, 308):
        inbox.answer_with([{"redirect": "/elsewhere", "status": status}])
        receipt = by_message_api(inbox)
        assert (receipt.delivered, receipt.status) == (False, status)
    assert {received.channel for received in inbox.received} == {"api_message"}


def test_a_success_that_says_it_is_none_is_not_delivered(inbox: Inbox) -> None:
    inbox.answer_with([{"body": {"success": False, "message": "no such user"}}])
    receipt = by_message_api(inbox)
    assert (receipt.delivered, receipt.status, receipt.error) == (False, 200, "HTTP 200 no such user")


def test_any_other_success_is_delivered(inbox: Inbox) -> None:
    inbox.answer_with([{"status": 202}, {"status": 200, "body": {"success": True}}, {"body": {"nextToken": "x"}}])
    assert [by_message_api(inbox).delivered for _ in range(3)] == [True] * 3


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ({"body": {"retryAfterMs": 1_500}}, 1.5),
        ({"body": {"retryAfterMs": 0}}, 0),
        ({"headers": {"Retry-After": "7"}}, 7),
        ({"body": {"retryAfterMs": 1_500}, "headers": {"Retry-After": "7"}}, 1.5),
        ({}, 60),
        ({"body": {"retryAfterMs": -5}}, 60),
        ({"body": {"retryAfterMs": "soon"}}, 60),
        ({"body": {"retryAfterMs": float("nan")}}, 60),
        ({"headers": {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}}, 60),
        ({"headers": {"Retry-After": "-3"}}, 60),
    ],
)
def test_a_rate_limit_says_how_long_to_wait_or_means_a_minute(
    inbox: Inbox, answer: dict[str, Any], seconds: float
) -> None:
    inbox.answer_with([{"status": 429, **answer}])
    receipt = by_message_api(inbox)
    assert (receipt.delivered, receipt.status, receipt.retry_after_seconds) == (False, 429, seconds)


def test_an_absurd_wait_is_a_long_wait_and_no_error(inbox: Inbox) -> None:
    inbox.answer_with(
        [{"status": 429, "body": {"retryAfterMs": 10**400}}, {"status": 503, "headers": {"Retry-After": "9" * 400}}]
    )
    for _ in range(2):
        assert (by_message_api(inbox).retry_after_seconds or 0) > 1e6


def test_another_refusal_names_no_wait_unless_it_does(inbox: Inbox) -> None:
    inbox.answer_with([{"status": 503}, {"status": 503, "headers": {"Retry-After": "120"}}])
    assert [by_message_api(inbox).retry_after_seconds, by_message_api(inbox).retry_after_seconds] == [None, 120]


def test_a_refusal_is_kept_with_its_status_and_what_it_says_on_one_short_line(inbox: Inbox) -> None:
    inbox.answer_with(
        [
            {"status": 403, "body": {"error": "missing\n scope"}},
            {"status": 400, "body": {"message": "x" * 5_000}},
            {"status": 500, "body": {"error": {"nested": True}}},
        ]
    )
    assert by_message_api(inbox).error == "HTTP 403 missing scope"
    assert len(by_message_api(inbox).error) == 200
    assert by_message_api(inbox).error.startswith("HTTP 500")


def test_a_used_up_token_is_a_401(inbox: Inbox) -> None:
    url = inbox.callback_url(TOKEN)
    assert by_callback(url).delivered
    again = by_callback(url)
    assert (again.delivered, again.status) == (False, 401)
    assert TOKEN not in again.error


# What goes wrong -------------------------------------------------------------------------------------------------


def test_a_refused_connection_is_told_without_token_or_address(inbox: Inbox) -> None:
    url = inbox.callback_url(TOKEN)
    inbox.stop()
    receipt = by_callback(url)
    assert (receipt.delivered, receipt.status) == (False, None)
    assert receipt.error == "ConnectionError at 127.0.0.1"


def test_a_connection_closed_without_an_answer_is_no_answer(inbox: Inbox) -> None:
    inbox.answer_with([{"close": True}])
    receipt = by_message_api(inbox)
    assert (receipt.delivered, receipt.status, receipt.error) == (False, None, "ConnectionError at 127.0.0.1")


def test_an_answer_that_does_not_come_in_time_is_no_answer(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poke, "READ_SECONDS", 0.2)
    inbox.answer_with([{"delay": 30}])
    started = time.monotonic()
    receipt = by_message_api(inbox)
    assert (receipt.status, receipt.error) == (None, "ReadTimeout at 127.0.0.1")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("token", ["日本", "line\nbreak", "Bearer\r\nX-Evil: 1", "\ud800"])
def test_a_token_that_no_header_can_carry_is_an_error_and_sends_no_other_header(inbox: Inbox, token: str) -> None:
    receipt = by_callback(inbox.callback_url(token), token)
    assert not receipt.delivered
    assert token not in receipt.error
    assert all("x-evil" not in received.headers for received in inbox.received)


@pytest.mark.parametrize("content", ["", "\x00", "\ud800 half a pair", "🦓" * 4_000])
def test_any_text_arrives(inbox: Inbox, content: str) -> None:
    assert by_message_api(inbox, content).delivered
    assert inbox.received[0].body["message"] == content


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads one request and then does as `answer` says with the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as connection:
                received = b""
                while b'"message"' not in received:  # the body has come
                    received += connection.recv(65_536)
                answer(connection)

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    server.join(timeout=10)
    assert not server.is_alive(), "the sender has hung up"


def send_to(url: str) -> Receipt:
    return Poke(url, KEY, dry_run=False).send(message())


def head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "\r\n"]).encode()


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (["Content-Length: 1000"], b'{"cut": '),
        (["Content-Length: 4", "Content-Encoding: gzip"], b"abcd"),
        (["Transfer-Encoding: chunked"], b"no chunk\r\n"),
        (["Content-Length: 3"], b"<p>"),
        (["Content-Length: 2"], b"[]"),
        (["Content-Length: 4"], b"\xff\xfe\xfd\xfc"),
        (["Content-Length: 10000"], b"[" * 10_000),
        (["Content-Length: 0"], b""),
    ],
    ids=["cut short", "no gzip", "no chunk", "HTML", "a list", "no UTF-8", "nested", "empty"],
)
@pytest.mark.parametrize("status", [200, 500])
def test_where_the_body_makes_no_sense_the_status_counts(headers: list[str], body: bytes, status: int) -> None:
    with answering(lambda connection: connection.sendall(head(status, *headers) + body)) as url:
        receipt = send_to(url)
    assert (receipt.delivered, receipt.status) == (status == 200, status)


def test_what_is_no_http_is_no_answer() -> None:
    with answering(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as url:
        receipt = send_to(url)
    assert (receipt.delivered, receipt.status) == (False, None)


def test_an_endless_answer_is_cut_off() -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(head(200, "Transfer-Encoding: chunked"))
        chunk = b"%x\r\n%s\r\n" % (65_536, b" " * 65_536)
        while True:  # until the sender hangs up
            connection.sendall(chunk)

    started = time.monotonic()
    with answering(endless) as url:
        assert send_to(url) == Receipt(delivered=True, status=200)
    assert time.monotonic() - started < 5


def test_an_answer_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poke, "ANSWER_SECONDS", 0.3)
    drop = threading.Event()

    def dripping(connection: socket.socket) -> None:
        connection.sendall(head(500, "Content-Length: 10000"))
        while not drop.wait(0.05):
            connection.sendall(b" ")

    started = time.monotonic()
    with answering(dripping) as url:
        receipt = send_to(url)
    assert (receipt.delivered, receipt.status) == (False, 500)
    assert time.monotonic() - started < 5


def test_the_complaint_of_a_long_answer_is_still_read() -> None:
    body = json.dumps({"error": "quota", "padding": "x" * 10_000}).encode()

    def in_pieces(connection: socket.socket) -> None:
        connection.sendall(head(402, f"Content-Length: {len(body)}") + body[:5])
        connection.sendall(body[5:9_000])
        connection.sendall(body[9_000:])

    with answering(in_pieces) as url:
        assert send_to(url).error == "HTTP 402 quota"
