"""Poke's HTTP API, spoken to a real server on loopback that plays it well and badly."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.poke.api import Poke
from pokestrator.poke.post import Receipt
from tests.unit.poke_calls import CONTENT, KEY, REQUEST_ID, TOKEN, by_callback, by_message_api, message


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=KEY) as started:
        yield started


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
        ({"headers": {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}}, 60),
        ({"headers": {"Retry-After": "Wed, 99 Oct 2015 07:28:00 GMT"}}, 60),
        ({"headers": {"Retry-After": "-3"}}, 60),
    ],
)
def test_a_rate_limit_says_how_long_to_wait_or_means_a_minute(
    inbox: Inbox, answer: dict[str, Any], seconds: float
) -> None:
    inbox.answer_with([{"status": 429, **answer}])
    receipt = by_message_api(inbox)
    assert (receipt.delivered, receipt.status, receipt.retry_after_seconds) == (False, 429, seconds)


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%d %b %Y %H:%M:%S"])
def test_a_date_says_how_long_to_wait_by_our_clock(inbox: Inbox, form: str) -> None:
    date = (datetime.now(UTC) + timedelta(seconds=300)).strftime(form)
    inbox.answer_with([{"status": 503, "headers": {"Retry-After": date}}])
    assert 290 < (by_message_api(inbox).retry_after_seconds or 0) <= 300


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


def test_a_refusal_that_quotes_what_it_refuses_is_kept_without_it(inbox: Inbox) -> None:
    inbox.answer_with([{"status": 403, "body": {"error": f"{'no ' * 58}such key: {KEY}"}}])
    assert KEY[:8] not in by_message_api(inbox).error
    url = inbox.callback_url(TOKEN)
    inbox.answer_with([{"status": 400, "body": {"message": f"token {TOKEN} is not for {url}"}}])
    assert by_callback(url).error == "HTTP 400 token [secret] is not for [secret]"
