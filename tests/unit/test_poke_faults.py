"""Receivers that are slow, cut off, talk nonsense or never end, as Poke's HTTP API meets them."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pokestrator.demo.inbox import Inbox
from pokestrator.poke import api, post
from pokestrator.poke.api import Poke
from pokestrator.poke.post import NOT_SENT, Receipt
from tests.unit.poke_calls import HERE, KEY, TOKEN, answering, by_callback, by_message_api, head, message, send_to


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=KEY) as started:
        yield started


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
    monkeypatch.setattr(post, "READ_SECONDS", 0.2)
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


@pytest.mark.parametrize("location", ["http://[", "//[", "http://h:port/", "\xff\xfe", "", "/elsewhere"])
def test_a_redirect_is_not_even_read(location: str) -> None:
    answer = head(302, f"Location: {location}", "Content-Length: 20").replace("ÿþ".encode(), b"\xff\xfe")
    with answering(lambda connection: connection.sendall(answer + b'{"error": "moved"}  ')) as url:
        assert send_to(url) == Receipt(False, 302, "HTTP 302 moved")


@pytest.mark.parametrize("url", ["http://[", "https://poke.invalid:port/", "nonsense", "http://", "https://\ud800/"])
def test_an_address_that_is_none_is_an_error_without_it(url: str) -> None:
    receipt = by_callback(url)
    assert (receipt.delivered, receipt.status, receipt.is_unsent) == (False, None, False)
    assert receipt.error
    assert url not in receipt.error


def test_what_is_no_http_is_no_answer() -> None:
    with answering(lambda connection: connection.sendall(b"220 mail.example ESMTP\r\n")) as url:
        receipt = send_to(url)
    assert (receipt.delivered, receipt.status) == (False, None)


@pytest.mark.parametrize("status", [200, 302])
def test_an_endless_answer_is_cut_off(status: int) -> None:
    def endless(connection: socket.socket) -> None:
        connection.sendall(head(status, "Transfer-Encoding: chunked", "Location: /elsewhere"))
        chunk = b"%x\r\n%s\r\n" % (65_536, b" " * 65_536)
        while True:  # until the sender hangs up
            connection.sendall(chunk)

    started = time.monotonic()
    with answering(endless) as url:
        receipt = send_to(url)
    assert (receipt.delivered, receipt.status) == (status == 200, status)
    assert time.monotonic() - started < 5


def test_an_answer_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(post, "ANSWER_SECONDS", 0.3)
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


# What is broken off ----------------------------------------------------------------------------------------------


def stalled(connection: socket.socket) -> None:
    connection.recv(1)  # until the sender hangs up


def dripping_header(connection: socket.socket) -> None:
    """Never late with a byte, and never done."""
    connection.sendall(b"HTTP/1.1 503 X\r\nX-Padding: ")
    never = threading.Event()
    while not never.wait(0.02):
        connection.sendall(b"x")


@pytest.mark.parametrize(("receiver", "status"), [(stalled, None), (dripping_header, 503)])
def test_a_post_that_takes_too_long_in_all_is_broken_off(
    receiver: Callable[[socket.socket], None], status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "POST_SECONDS", 0.3)
    receipts: list[Receipt] = []
    with answering(receiver) as url:
        sender = Poke(url, KEY, dry_run=False, callback_hosts=HERE)
        thread = threading.Thread(target=lambda: receipts.append(sender.send(message())))
        thread.start()
        sender.cut_overdue()  # not yet
        thread.join(0.4)
        assert thread.is_alive()
        sender.cut_overdue()
        thread.join(5)
    assert [(receipt.delivered, receipt.status) for receipt in receipts] == [(False, status)]
    assert re.fullmatch("HTTP 503" if status else r"broken off after \d+ s at 127\.0\.0\.1", receipts[0].error)


def test_a_closed_poke_breaks_its_posts_off_and_sends_no_more(inbox: Inbox) -> None:
    inbox.answer_with([{"delay": 30}])
    receipts: list[Receipt] = []
    sender = Poke(inbox.message_url, KEY, dry_run=False, callback_hosts=HERE)
    thread = threading.Thread(target=lambda: receipts.append(sender.send(message())))
    thread.start()
    assert inbox.wait_for(1, 10)
    sender.close()
    thread.join(5)
    assert [(receipt.delivered, receipt.is_unsent) for receipt in receipts] == [(False, False)]
    assert re.fullmatch(r"broken off after \d+ s at 127\.0\.0\.1", receipts[0].error)
    assert sender.send(message()) == NOT_SENT
    assert len(inbox.received) == 1


@pytest.mark.parametrize("is_leaving", [True, False])
def test_a_post_that_is_cut_before_it_had_a_connection_sends_nothing(
    inbox: Inbox, is_leaving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "POST_SECONDS", 0.0)
    looks_up, goes_on, lookup = threading.Event(), threading.Event(), socket.getaddrinfo

    def slow_lookup(*args: Any, **options: Any) -> Any:
        looks_up.set()
        assert goes_on.wait(10)
        return lookup(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow_lookup)
    receipts: list[Receipt] = []
    sender = Poke(inbox.message_url, KEY, dry_run=False, callback_hosts=HERE)
    thread = threading.Thread(target=lambda: receipts.append(sender.send(message())))
    thread.start()
    assert looks_up.wait(10)
    if is_leaving:
        sender.close()
    else:
        sender.cut_overdue()
    goes_on.set()
    thread.join(5)
    # An overdue one counts as a try, sent or not: it is the receiver's name or network that takes so long.
    assert receipts == [NOT_SENT if is_leaving else Receipt(False, None, "broken off after 0 s at 127.0.0.1")]
    assert inbox.received == []


def test_a_failure_that_a_cut_comes_too_late_for_was_sent(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox.answer_with([{"close": True}])
    sender = Poke(inbox.message_url, KEY, dry_run=False, callback_hosts=HERE)
    forget = post.Post.forget

    def forget_and_close(post: post.Post) -> None:
        sender._posts.add(post)  # as close() may have seen it just before
        forget(post)
        sender.close()

    monkeypatch.setattr(post.Post, "forget", forget_and_close)
    receipt = sender.send(message())
    assert (receipt.is_unsent, receipt.error) == (False, "ConnectionError at 127.0.0.1")


def test_posts_leave_no_socket_open(inbox: Inbox) -> None:
    by_message_api(inbox)
    before = len(list(Path("/proc/self/fd").iterdir()))
    inbox.answer_with([{"close": True}])
    for _ in range(5):
        by_message_api(inbox)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
