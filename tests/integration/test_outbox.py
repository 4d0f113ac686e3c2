"""What becomes of a callback: real PostgreSQL on one side, an inbox that plays Poke on the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pokestrator import delivery as delivery_module
from pokestrator.delivery import Delivery
from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import Channel
from pokestrator.poke.api import Poke
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import HERE, POKE_KEY, TOKEN, callback_row, contents, eventually
from tests.integration.outbox import change, delivering, failed_once, finished, make_due, reaches, wait_left

FAR = 1_000.0  # seconds: a sender that polls this seldom acts only when it is woken


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=POKE_KEY) as inbox:
        yield inbox


@pytest.fixture
def delivery(database: Database, inbox: Inbox) -> Iterator[Delivery]:
    with delivering(database, inbox) as delivery:
        yield delivery


# delivered ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [Channel.API_MESSAGE, Channel.CALLBACK])
def test_a_result_is_posted_as_soon_as_delivery_is_woken(
    jobs: Jobs, database_url: str, database: Database, inbox: Inbox, channel: Channel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "POLL_SECONDS", FAR)
    with delivering(database, inbox) as delivery:
        job_id = finished(jobs, "Forty-two.", inbox=inbox if channel is Channel.CALLBACK else None)
        delivery.wake()
        [received] = inbox.wait_for(1, 10)
        row = reaches(database_url, job_id, "delivered")
    assert (received.channel, received.status) == (channel, 200)
    if channel is Channel.CALLBACK:
        assert received.body == {"content": "Forty-two.", "hasMore": False}
        assert received.headers["authorization"] == f"Bearer {TOKEN}"
    else:
        assert received.body["message"] == "Forty-two."
        assert received.body["request_id"] == str(job_id)
        assert received.headers["authorization"] == f"Bearer {POKE_KEY}"
    assert (row["attempts"], row["last_status"], row["lease_until"]) == (1, 200, None)
    assert History(database).timeline(job_id)[-1].kind == "delivered"


def test_a_result_that_nobody_woke_delivery_for_is_found_by_the_poll(
    jobs: Jobs, database_url: str, delivery: Delivery
) -> None:
    reaches(database_url, finished(jobs), "delivered")


def test_deliver_posts_one_jobs_callback_in_the_callers_thread(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    never_started = Delivery(Callbacks(database), Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    other, wanted = finished(jobs, "Other."), finished(jobs, "Wanted.")
    never_started.deliver(wanted)
    assert contents(inbox.received) == ["Wanted."]
    assert callback_row(database_url, wanted)["state"] == "delivered"
    assert callback_row(database_url, other)["attempts"] == 0


def test_a_dry_run_sends_nothing_and_marks_everything_delivered(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    ended = [finished(jobs), finished(jobs, inbox=inbox)]
    with delivering(database, inbox, key=None, dry_run=True):
        for job_id in ended:
            assert reaches(database_url, job_id, "delivered")["last_status"] is None
    assert inbox.received == []


# tried again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 500}, {"status": 503, "body": {"error": "later"}}, {"close": True}])
def test_a_fault_of_the_receiver_is_tried_again_with_the_same_idempotency_key(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery, fault: dict[str, Any]
) -> None:
    inbox.answer_with([fault])
    job_id = finished(jobs)
    delivery.wake()
    assert eventually(failed_once(database_url, job_id))
    row = callback_row(database_url, job_id)
    assert (row["state"], row["attempts"], row["last_status"]) == ("pending", 1, fault.get("status"))
    assert 3 < wait_left(database_url, job_id) <= 6  # 5 s, a fifth more or less
    make_due(database_url)
    delivery.wake()
    assert reaches(database_url, job_id, "delivered")["attempts"] == 2
    first, second = inbox.received
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] == str(row["id"])
    assert first.body == second.body


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ({"status": 429, "body": {"retryAfterMs": 90_000}}, 90),
        ({"status": 429, "headers": {"Retry-After": "120"}}, 120),
        ({"status": 429}, 60),
        ({"status": 503, "headers": {"Retry-After": "999999"}}, 3_600),
    ],
    ids=["retryAfterMs", "Retry-After", "neither", "capped"],
)
def test_the_wait_that_a_receiver_asks_for_is_kept(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery, answer: dict[str, Any], seconds: float
) -> None:
    inbox.answer_with([answer])
    job_id = finished(jobs)
    delivery.wake()
    assert eventually(failed_once(database_url, job_id))
    assert seconds - 5 < wait_left(database_url, job_id) <= seconds
    assert callback_row(database_url, job_id)["state"] == "pending"


def test_a_redirect_is_not_followed(jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery) -> None:
    inbox.answer_with([{"redirect": "/elsewhere"}])
    job_id = finished(jobs)
    delivery.wake()
    row = reaches(database_url, job_id, "dead")
    assert row["last_status"] == 302
    assert [received.path for received in inbox.received] == ["/api/v1/inbound/api-message"]


def test_the_last_try_that_fails_makes_a_dead_letter(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    inbox.answer_with([{"status": 500}])
    job_id = finished(jobs)
    change(database_url, job_id, "attempts = 11")
    with delivering(database, inbox):
        row = reaches(database_url, job_id, "dead")
    assert (row["attempts"], row["last_status"]) == (12, 500)


# refused -----------------------------------------------------------------------------------------------------------


def test_a_refusal_makes_a_dead_letter_with_its_reason(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    inbox.answer_with([{"status": 400, "body": {"error": "message is too long"}}])
    job_id = finished(jobs)
    delivery.wake()
    row = reaches(database_url, job_id, "dead")
    assert (row["last_status"], row["last_error"]) == (400, "HTTP 400 message is too long")
    assert row["content"] == "Done."  # kept, to be sent again
    event = History(database).timeline(job_id)[-1]
    assert (event.kind, event.text) == ("callback dead", "HTTP 400 message is too long")
    assert len(inbox.received) == 1


def test_a_wrong_key_for_the_message_api_makes_a_dead_letter(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    with delivering(database, inbox, key="another-key"):
        assert reaches(database_url, finished(jobs), "dead")["last_status"] == 401


def test_an_unhappy_success_is_no_delivery(jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery) -> None:
    inbox.answer_with([{"status": 200, "body": {"success": False, "message": "no such user"}}])
    row = reaches(database_url, finished(jobs), "dead")
    assert row["last_error"] == "HTTP 200 no such user"


def test_a_callback_token_that_is_refused_falls_back_to_the_message_api(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    job_id = finished(jobs, inbox=inbox, token="a-token-that-has-ended")
    delivery.wake()
    row = reaches(database_url, job_id, "delivered")
    assert (row["channel"], row["attempts"]) == ("api_message", 2)
    assert [(each.channel, each.status) for each in inbox.received] == [("callback", 401), ("api_message", 200)]


# without a key -----------------------------------------------------------------------------------------------------


def test_without_a_key_messages_wait_unattempted_and_go_out_once_there_is_one(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    waits = finished(jobs, "I wait.")
    with delivering(database, inbox, key=None) as keyless:
        goes = finished(jobs, "I go.", inbox=inbox)
        keyless.wake()
        reaches(database_url, goes, "delivered")
    row = callback_row(database_url, waits)
    assert (row["state"], row["attempts"]) == ("pending", 0)
    assert contents(inbox.received) == ["I go."]
    with delivering(database, inbox):
        reaches(database_url, waits, "delivered")
    assert contents(inbox.received) == ["I go.", "I wait."]


# a callback URL that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"status": 503}, {"close": True}, {"redirect": "/elsewhere"}])
def test_a_callback_url_that_fails_is_tried_there_until_ten_minutes_have_passed(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, fault: dict[str, Any]
) -> None:
    inbox.answer_with([fault, fault])
    job_id = finished(jobs, inbox=inbox)
    change(database_url, job_id, "begun_at = now() - interval '9 minutes'")
    with delivering(database, inbox) as delivery:
        assert eventually(failed_once(database_url, job_id))
        assert callback_row(database_url, job_id)["channel"] == "callback"
        change(database_url, job_id, "begun_at = now() - interval '10 minutes', next_attempt_at = now()")
        delivery.wake()
        row = reaches(database_url, job_id, "delivered")
    assert row["channel"] == "api_message"
    assert inbox.received[-1].channel == "api_message"
    assert {each.headers["idempotency-key"] for each in inbox.received} == {str(row["id"])}


def test_the_wait_before_the_message_api_takes_over_ends_at_ten_minutes(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    inbox.answer_with([{"status": 500}])
    job_id = finished(jobs, inbox=inbox)
    change(database_url, job_id, "attempts = 3, begun_at = now() - interval '160 seconds'")
    with delivering(database, inbox):
        assert eventually(failed_once(database_url, job_id))
    row = callback_row(database_url, job_id)
    assert (row["state"], row["channel"]) == ("pending", "api_message")
    assert 430 < wait_left(database_url, job_id) <= 440


def test_without_a_key_a_callback_url_that_fails_is_tried_on(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    inbox.answer_with([{"status": 500}])
    job_id = finished(jobs, inbox=inbox)
    change(database_url, job_id, "attempts = 6, begun_at = now() - interval '3 hours'")
    with delivering(database, inbox, key=None):
        assert eventually(failed_once(database_url, job_id))
    row = callback_row(database_url, job_id)
    assert (row["state"], row["channel"]) == ("pending", "callback")
    assert 0.8 * 18_000 - 10 < wait_left(database_url, job_id) <= 1.2 * 18_000


def test_a_callback_url_that_refuses_the_text_makes_a_dead_letter(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    inbox.answer_with([{"status": 422, "body": {"error": "too long"}}])
    row = reaches(database_url, finished(jobs, inbox=inbox), "dead")
    assert (row["channel"], row["last_status"], row["last_error"]) == ("callback", 422, "HTTP 422 too long")


@pytest.mark.parametrize("said", ["no \x00 here", "half \ud800 a pair"])
def test_a_refusal_in_characters_that_no_row_can_hold_makes_a_dead_letter_too(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery, said: str
) -> None:
    inbox.answer_with([{"status": 400, "body": {"error": said}}])
    row = reaches(database_url, finished(jobs), "dead")
    assert row["last_error"].startswith("HTTP 400 ")
    assert len(inbox.received) == 1
