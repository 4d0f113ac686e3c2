"""When a callback is tried again, moved to another channel, or given up."""

from __future__ import annotations

import doctest
import uuid
from typing import Any, cast

import pytest

from pokestrator import delivery, schedule
from pokestrator.delivery import Delivery
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.poke.api import Message, Poke
from pokestrator.poke.post import NOT_SENT, Receipt
from pokestrator.schedule import LONGEST_ASKED_WAIT, WAITS, NextTry, is_worth_retrying, next_try, wait_after
from pokestrator.store.callbacks import Callback, Callbacks
from tests.integration.flow import captured_logs

SECOND, MINUTE, HOUR, DAY = 1, 60, 3_600, 86_400
LAST_TRY = len(WAITS) + 1


# The schedule ----------------------------------------------------------------------------------------------------


def test_the_waits_are_those_of_the_promise() -> None:
    assert [wait_after(attempt) for attempt in range(1, LAST_TRY)] == [
        5 * SECOND,
        30 * SECOND,
        2 * MINUTE,
        10 * MINUTE,
        30 * MINUTE,
        2 * HOUR,
        5 * HOUR,
        10 * HOUR,
        14 * HOUR,
        20 * HOUR,
        24 * HOUR,
    ]


def test_the_tries_span_three_days_whatever_the_jitter() -> None:
    total = sum(wait_after(attempt) or 0 for attempt in range(1, LAST_TRY)) / HOUR
    assert 75 < total < 77
    assert sum(wait_after(attempt, jitter=0.8) or 0 for attempt in range(1, LAST_TRY)) / HOUR > 60


def test_after_the_twelfth_try_there_is_no_other() -> None:
    assert LAST_TRY == 12
    assert wait_after(11) is not None
    assert wait_after(12) is wait_after(13) is wait_after(12, asked=5) is None


@pytest.mark.parametrize("jitter", [0.8, 1.0, 1.2])
def test_jitter_stretches_every_wait(jitter: float) -> None:
    for attempt, wait in enumerate(WAITS, start=1):
        assert wait_after(attempt, jitter=jitter) == pytest.approx(wait * jitter)


@pytest.mark.parametrize(
    ("asked", "wait"),
    [(None, 30), (0.0, 30), (29.0, 30), (31.0, 31), (3_600.0, 3_600), (3_601.0, 3_600), (1e300, 3_600)],
)
def test_a_receiver_can_ask_for_more_time_but_not_for_more_than_an_hour(asked: float | None, wait: float) -> None:
    assert wait_after(2, asked) == wait


def test_asking_for_an_hour_shortens_no_longer_wait() -> None:
    assert wait_after(LAST_TRY - 1, asked=LONGEST_ASKED_WAIT) == 24 * HOUR


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(schedule)
    assert (result.failed, result.attempted > 0) == (0, True)


# What follows a failure ------------------------------------------------------------------------------------------

URL, API = Channel.CALLBACK, Channel.API_MESSAGE


@pytest.mark.parametrize("status", [None, 408, 425, 429, 500, 502, 503, 504, 529, 599])
@pytest.mark.parametrize("channel", [URL, API])
def test_no_answer_a_fault_and_not_now_are_worth_another_try(status: int | None, channel: Channel) -> None:
    assert is_worth_retrying(status, channel)


@pytest.mark.parametrize("status", [200, 204, 400, 401, 403, 404, 405, 409, 410, 413, 422, 451])
@pytest.mark.parametrize("channel", [URL, API])
def test_any_other_refusal_is_not(status: int, channel: Channel) -> None:
    assert not is_worth_retrying(status, channel)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_a_fault_of_a_callback_url_and_a_refusal_by_the_message_api(status: int) -> None:
    assert is_worth_retrying(status, URL)
    assert not is_worth_retrying(status, API)


MINUTES_10 = 10 * MINUTE


@pytest.mark.parametrize(
    ("channel", "status", "tries", "age", "channels", "then"),
    [
        # A callback URL that fails hands over at ten minutes, to the second.
        (URL, 503, 1, 0, (URL, API), NextTry(5, URL)),
        (URL, None, 3, 40, (URL, API), NextTry(120, URL)),
        (URL, 302, 4, 160, (URL, API), NextTry(440, API)),
        (URL, 503, 4, 0, (URL, API), NextTry(MINUTES_10, API)),
        (URL, 503, 4, -DAY, (URL, API), NextTry(MINUTES_10, API)),  # the clock went back
        (URL, 503, 2, MINUTES_10, (URL, API), NextTry(0, API)),
        (URL, 503, 2, DAY, (URL, API), NextTry(0, API)),  # the clock went forward
        (URL, 503, 12, 76 * HOUR, (URL, API), NextTry(0, API)),
        # Where there is no message API, the URL has the whole schedule.
        (URL, 503, 4, 160, (URL,), NextTry(10 * MINUTE, URL)),
        (URL, 503, 11, 50 * HOUR, (URL,), NextTry(24 * HOUR, URL)),
        (URL, 503, 12, 76 * HOUR, (URL,), None),
        # A dead token hands over at once, and waits for a key if there is none.
        (URL, 401, 1, 0, (URL, API), NextTry(0, API)),
        (URL, 410, 12, 76 * HOUR, (URL,), NextTry(0, API)),
        # A refusal is final everywhere.
        (URL, 400, 1, 0, (URL, API), None),
        (URL, 422, 1, DAY, (URL, API), None),
        (API, 401, 1, 0, (URL, API), None),
        (API, 302, 1, 0, (URL, API), None),
        # The message API has the rest of the schedule.
        (API, 503, 5, MINUTES_10, (URL, API), NextTry(30 * MINUTE, API)),
        (API, 503, 12, 76 * HOUR, (URL, API), None),
    ],
)
def test_what_follows_a_failure(
    channel: Channel,
    status: int | None,
    tries: int,
    age: float,
    channels: tuple[Channel, ...],
    then: NextTry | None,
) -> None:
    assert next_try(status, channel=channel, tries=tries, age_seconds=age, channels=channels) == then


def test_what_a_receiver_asks_for_does_not_put_the_message_api_off() -> None:
    then = next_try(429, 3_600.0, channel=URL, tries=1, age_seconds=100, channels=(URL, API))
    assert then == NextTry(500, API)


# What is done with a receipt -------------------------------------------------------------------------------------


class Outbox:
    """Hands out one callback, once, and keeps what is written about it."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback
        self.written: list[tuple[Any, ...]] = []
        self.claimed = False

    def claim_due(
        self, channels: tuple[Channel, ...], limit: int, job_id: uuid.UUID, *, not_ids: list[uuid.UUID]
    ) -> list[Callback]:
        assert not_ids == []
        assert (limit, job_id) == (1, self.callback.job_id)
        self.claimed, claimed = True, self.claimed
        return [self.callback] if self.callback.channel in channels and not claimed else []

    def delivered(self, callback: Callback, status: int | None) -> None:
        self.written.append(("delivered", status))

    def dead(self, callback: Callback, status: int | None, error: str) -> None:
        self.written.append(("dead", status, error))

    def retry(
        self, callback: Callback, status: int | None, error: str, *, wait_seconds: float, channel: Channel
    ) -> None:
        self.written.append(("retry", status, error, wait_seconds, channel))

    def give_back(self, callback: Callback) -> None:
        self.written.append(("given back",))


class Postman:
    """Answers every message with one receipt, or fails as none should."""

    channels = tuple(Channel)

    def __init__(self, receipt: Receipt | Exception) -> None:
        self.receipt = receipt
        self.sent: list[Message] = []

    def send(self, message: Message) -> Receipt:
        self.sent.append(message)
        if isinstance(self.receipt, Exception):
            raise self.receipt
        return self.receipt


def written(receipt: Receipt | Exception, *, tries: int = 1, channel: Channel = Channel.API_MESSAGE) -> tuple[Any, ...]:
    """What the outbox holds after this receipt."""
    target = CallbackTarget("https://poke.invalid/c", "token") if channel is Channel.CALLBACK else None
    callback = Callback(uuid.uuid4(), uuid.uuid4(), "a task", "a result", channel, target, 100 + tries, tries, 0.0)
    outbox, postman = Outbox(callback), Postman(receipt)
    Delivery(cast(Callbacks, outbox), cast(Poke, postman)).deliver(callback.job_id)
    (message,) = postman.sent
    assert (message.request_id, message.idempotency_key) == (callback.job_id, str(callback.id))
    assert (message.content, message.channel, message.target) == ("a result", channel, target)
    (entry,) = outbox.written
    return entry


def test_a_delivered_callback_is_written_as_delivered() -> None:
    assert written(Receipt(True, 200)) == ("delivered", 200)


def test_a_fault_is_tried_again_on_the_same_channel_with_a_jitter_of_a_fifth() -> None:
    waits = set()
    for _ in range(100):
        kind, status, error, wait, channel = written(Receipt(False, 503, "HTTP 503"), tries=4)
        assert (kind, status, error, channel) == ("retry", 503, "HTTP 503", Channel.API_MESSAGE)
        assert 480 <= wait <= 720
        waits.add(wait)
    assert len(waits) > 50
    assert max(waits) - min(waits) > 100


def test_the_receivers_own_wait_is_kept() -> None:
    assert written(Receipt(False, 429, "HTTP 429", 900.0))[3] == 900
    assert written(Receipt(False, 429, "HTTP 429", float("inf")))[3] == LONGEST_ASKED_WAIT


def test_a_fault_of_ours_is_recorded_as_a_try_and_tried_again_and_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    with captured_logs(monkeypatch, delivery) as logs:
        kind, status, error, wait, channel = written(RuntimeError("https://poke.invalid/secret"), tries=2)
    assert (kind, status, error, channel) == ("retry", None, "RuntimeError", Channel.API_MESSAGE)
    assert 24 <= wait <= 36
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["post_failed"]


def test_a_fault_of_ours_in_the_last_try_ends_in_the_dead_letters() -> None:
    assert written(KeyError("x"), tries=12) == ("dead", None, "KeyError")


def test_what_was_certainly_not_sent_is_given_back() -> None:
    assert written(NOT_SENT, tries=12) == ("given back",)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 403, 404, 422])
def test_a_refusal_by_the_message_api_is_a_dead_letter_with_its_reason(status: int) -> None:
    assert written(Receipt(False, status, "why")) == ("dead", status, "why")


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_callback_address_that_has_ended_hands_over_to_the_message_api_at_once(status: int) -> None:
    entry = written(Receipt(False, status, "why"), tries=7, channel=Channel.CALLBACK)
    assert entry == ("retry", status, "why", 0, Channel.API_MESSAGE)


def test_the_last_try_ends_in_the_dead_letters() -> None:
    assert written(Receipt(False, None, "ConnectionError"), tries=11)[0] == "retry"
    assert written(Receipt(False, None, "ConnectionError"), tries=12) == ("dead", None, "ConnectionError")
