"""The loopback inbox, seen by an HTTP client as Poke is."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from pokestrator.demo.inbox import Inbox, Received


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as inbox:
        yield inbox


def post(url: str, token: str, body: Any, *, timeout: float = 5) -> requests.Response:
    headers = {"Authorization": f"Bearer {token}"}
    return requests.post(url, json=body, headers=headers, timeout=timeout, allow_redirects=False)


def test_a_message_is_kept_and_answered_with_success(inbox: Inbox) -> None:
    before = time.time()
    answer = post(inbox.message_url, "any key", {"message": "Hello ✨"})
    assert (answer.status_code, answer.json()["success"]) == (200, True)
    (received,) = inbox.received
    assert (received.channel, received.body, received.status) == ("api_message", {"message": "Hello ✨"}, 200)
    assert received.path == "/api/v1/inbound/api-message"
    assert received.headers["authorization"] == "Bearer any key"
    assert before <= received.at <= time.time()


def test_a_message_without_the_right_key_is_refused() -> None:
    with Inbox(api_key="right") as inbox:
        assert post(inbox.message_url, "wrong", {"message": "x"}).status_code == 401
        assert post(inbox.message_url, "right", {"message": "x"}).status_code == 200
        assert [r.status for r in inbox.received] == [401, 200]


def test_a_message_without_any_key_is_refused(inbox: Inbox) -> None:
    assert requests.post(inbox.message_url, json={"message": "x"}, timeout=5).status_code == 401


@pytest.mark.parametrize("body", [["a list"], "text", None])
def test_a_message_that_is_no_object_is_refused(inbox: Inbox, body: Any) -> None:
    assert post(inbox.message_url, "key", body).status_code == 400


def test_each_callback_needs_the_token_of_the_answer_before(inbox: Inbox) -> None:
    url = inbox.callback_url(token="first")
    answer = post(url, "first", {"content": "working", "hasMore": True})
    assert post(url, "first", {"content": "again", "hasMore": True}).status_code == 401
    token = answer.json()["nextToken"]
    assert token != "first"
    last = post(url, token, {"content": "done", "hasMore": False})
    assert (last.status_code, last.json()) == (200, {})
    assert post(url, token, {"content": "more", "hasMore": False}).status_code == 401
    assert [r.status for r in inbox.received] == [200, 401, 200, 401]
    assert {r.channel for r in inbox.received} == {"callback"}


def test_two_callback_conversations_do_not_share_a_token(inbox: Inbox) -> None:
    one, other = inbox.callback_url(token="a"), inbox.callback_url(token="b")
    assert post(one, "b", {"content": "x", "hasMore": False}).status_code == 401
    assert post(other, "b", {"content": "x", "hasMore": False}).status_code == 200
    assert post(one, "a", {"content": "x", "hasMore": False}).status_code == 200


@pytest.mark.parametrize("body", [{}, {"content": "x"}, {"content": 1, "hasMore": True}, {"message": "x"}, []])
def test_a_callback_in_another_form_is_refused_and_keeps_its_token(inbox: Inbox, body: Any) -> None:
    url = inbox.callback_url(token="t")
    assert post(url, "t", body).status_code == 400
    assert post(url, "t", {"content": "x", "hasMore": False}).status_code == 200


def test_scripted_answers_come_in_order_and_then_all_is_normal(inbox: Inbox) -> None:
    inbox.answer_with(
        [
            {"status": 500},
            {"status": 429, "headers": {"Retry-After": "2"}, "body": {"retryAfterMs": 2_000}},
            {"redirect": "/elsewhere"},
        ]
    )
    answers = [post(inbox.message_url, "key", {"message": "x"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [500, 429, 302, 200]
    assert answers[1].headers["retry-after"] == "2"
    assert answers[1].json() == {"retryAfterMs": 2_000}
    assert answers[2].headers["location"] == "/elsewhere"
    assert [r.status for r in inbox.received] == [500, 429, 302, 200]


def test_a_client_that_follows_a_redirect_is_seen(inbox: Inbox) -> None:
    inbox.answer_with([{"redirect": "/elsewhere"}])
    requests.post(inbox.message_url, json={"message": "x"}, timeout=5)
    assert [(r.channel, r.path) for r in inbox.received] == [
        ("api_message", "/api/v1/inbound/api-message"),
        ("other", "/elsewhere"),
    ]


def test_a_scripted_close_leaves_the_client_without_an_answer(inbox: Inbox) -> None:
    inbox.answer_with([{"close": True}])
    with pytest.raises(requests.exceptions.ConnectionError):
        post(inbox.message_url, "key", {"message": "x"})
    assert [r.status for r in inbox.received] == [0]


def test_a_delay_holds_the_normal_answer_back(inbox: Inbox) -> None:
    inbox.answer_with([{"delay": 0.3}])
    started = time.monotonic()
    assert post(inbox.message_url, "key", {"message": "x"}).status_code == 200
    assert time.monotonic() - started >= 0.3


def test_a_failed_callback_keeps_its_token_and_one_at_the_turn_limit_has_no_next(inbox: Inbox) -> None:
    url = inbox.callback_url(token="t")
    inbox.answer_with([{"status": 503}, {"body": {}}])
    assert post(url, "t", {"content": "x", "hasMore": True}).status_code == 503
    assert post(url, "t", {"content": "x", "hasMore": True}).json() == {}
    assert post(url, "t", {"content": "x", "hasMore": True}).status_code == 401


def test_waiting_returns_when_enough_has_come(inbox: Inbox) -> None:
    client = threading.Thread(target=lambda: [post(inbox.message_url, "key", {"message": str(n)}) for n in range(2)])
    client.start()
    started = time.monotonic()
    received = inbox.wait_for(2, timeout=10)
    assert time.monotonic() - started < 5
    assert [r.body["message"] for r in received] == ["0", "1"]
    client.join()


def test_waiting_in_vain_returns_what_is_there(inbox: Inbox) -> None:
    post(inbox.message_url, "key", {"message": "only"})
    assert [r.body["message"] for r in inbox.wait_for(2, timeout=0.1)] == ["only"]


def test_the_callable_hears_of_each_request_before_its_answer() -> None:
    heard: list[Received] = []
    with Inbox(on_received=heard.append) as inbox:
        post(inbox.message_url, "key", {"message": "x"})
        assert heard == inbox.received


def test_an_inbox_that_was_away_comes_back_at_the_same_address(inbox: Inbox) -> None:
    url = inbox.message_url
    inbox.stop()
    with pytest.raises(requests.exceptions.ConnectionError):
        post(url, "key", {"message": "x"})
    inbox.start()
    assert post(url, "key", {"message": "x"}).status_code == 200


def test_stopping_ends_a_delay_at_once(inbox: Inbox) -> None:
    inbox.answer_with([{"delay": 60}])
    failures: list[requests.exceptions.RequestException] = []

    def send() -> None:
        try:
            post(inbox.message_url, "key", {"message": "x"}, timeout=30)
        except requests.exceptions.RequestException as error:
            failures.append(error)

    client = threading.Thread(target=send)
    client.start()
    assert len(inbox.wait_for(1, timeout=20)) == 1
    started = time.monotonic()
    inbox.stop()
    client.join(timeout=20)
    assert len(failures) == 1 and not isinstance(failures[0], requests.exceptions.Timeout)
    assert time.monotonic() - started < 10
