"""The outbox and its senders: real PostgreSQL on one side, an inbox that plays Poke on the other."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pokestrator import delivery as delivery_module
from pokestrator.delivery import Delivery
from pokestrator.demo.inbox import Inbox
from pokestrator.jobs import CallbackTarget, Channel, JobState, Outcome, new_job
from pokestrator.poke import Poke
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import POKE_KEY, TOKEN, callback_row, contents, eventually, rows

FAR = 1_000.0  # seconds: a sender that polls this seldom acts only when it is woken


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=POKE_KEY) as inbox:
        yield inbox


@pytest.fixture
def delivery(database: Database, inbox: Inbox) -> Iterator[Delivery]:
    with delivering(database, inbox) as delivery:
        yield delivery


@contextmanager
def delivering(
    database: Database, inbox: Inbox, *, key: str | None = POKE_KEY, dry_run: bool = False
) -> Iterator[Delivery]:
    delivery = Delivery(Callbacks(database), Poke(inbox.message_url, key, dry_run=dry_run))
    delivery.start()
    try:
        yield delivery
    finally:
        delivery.close()


def finished(jobs: Jobs, text: str = "Done.", *, inbox: Inbox | None = None, token: str = TOKEN) -> uuid.UUID:
    """A job that has just ended; with `inbox` it wants its answer at a callback address there."""
    target = CallbackTarget(inbox.callback_url(TOKEN), token) if inbox else None
    job = jobs.insert_claimed(new_job("A task with a result", callback=target), "me", 60)
    jobs.finish(job, Outcome(JobState.SUCCEEDED, text))
    return job.id


def make_due(url: str) -> None:
    rows(url, "UPDATE callbacks SET next_attempt_at = now() WHERE state = 'pending'")


def reaches(url: str, job_id: uuid.UUID, state: str, timeout: float = 10) -> dict[str, Any]:
    """The callback's row, once it has this state."""

    def there() -> dict[str, Any] | None:
        row = callback_row(url, job_id)
        return row if row["state"] == state else None

    row = eventually(there, timeout)
    assert row, callback_row(url, job_id)
    return dict(row)


def failed_once(url: str, job_id: uuid.UUID) -> Callable[[], bool]:
    return lambda: callback_row(url, job_id)["last_error"] is not None


def wait_left(url: str, job_id: uuid.UUID) -> float:
    """Seconds until the next try."""
    query = "SELECT extract(epoch FROM next_attempt_at - now())::float AS left FROM callbacks WHERE job_id = %s"
    return float(rows(url, query, job_id)[0]["left"])


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
    assert jobs.timeline(job_id)[-1].kind == "delivered"


def test_a_result_that_nobody_woke_delivery_for_is_found_by_the_poll(
    jobs: Jobs, database_url: str, delivery: Delivery
) -> None:
    reaches(database_url, finished(jobs), "delivered")


def test_deliver_posts_one_jobs_callback_in_the_callers_thread(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    never_started = Delivery(Callbacks(database), Poke(inbox.message_url, POKE_KEY, dry_run=False))
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
    job_id = finished(jobs, inbox=inbox)
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
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    inbox.answer_with([{"status": 500}])
    job_id = finished(jobs)
    rows(database_url, "UPDATE callbacks SET attempts = 11")
    delivery.wake()
    row = reaches(database_url, job_id, "dead")
    assert (row["attempts"], row["last_status"]) == (12, 500)


# refused -----------------------------------------------------------------------------------------------------------


def test_a_refusal_makes_a_dead_letter_with_its_reason(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    inbox.answer_with([{"status": 400, "body": {"error": "message is too long"}}])
    job_id = finished(jobs)
    delivery.wake()
    row = reaches(database_url, job_id, "dead")
    assert (row["last_status"], row["last_error"]) == (400, "HTTP 400 message is too long")
    assert row["content"] == "Done."  # kept, to be sent again
    event = jobs.timeline(job_id)[-1]
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


# many --------------------------------------------------------------------------------------------------------------


def test_slow_receivers_do_not_hold_up_another_callback(
    jobs: Jobs, database_url: str, inbox: Inbox, delivery: Delivery
) -> None:
    inbox.answer_with([{"delay": 30}] * 7)
    slow = [finished(jobs, f"Slow {number}.") for number in range(7)]
    delivery.wake()
    assert len(inbox.wait_for(7, 10)) == 7
    started = time.monotonic()
    quick = finished(jobs, "Quick.")
    delivery.wake()
    reaches(database_url, quick, "delivered")
    assert time.monotonic() - started < 2
    assert {callback_row(database_url, job_id)["state"] for job_id in slow} == {"pending"}
    inbox.stop()  # or close() would wait for them


def test_two_deliveries_never_send_one_callback_twice(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    for number in range(60):
        finished(jobs, f"Result {number}.")
    with delivering(database, inbox), delivering(database, inbox):
        inbox.wait_for(60, 20)
        assert eventually(lambda: not rows(database_url, "SELECT id FROM callbacks WHERE state = 'pending'"))
    assert sorted(contents(inbox.received)) == sorted(f"Result {number}." for number in range(60))
    assert rows(database_url, "SELECT DISTINCT attempts FROM callbacks") == [{"attempts": 1}]


@pytest.mark.parametrize("seen_by_analyze", [0, 1])
def test_a_claim_takes_no_more_than_its_limit_whatever_the_planner_knows(
    jobs: Jobs, database: Database, database_url: str, seen_by_analyze: int
) -> None:
    for _ in range(seen_by_analyze):
        finished(jobs)
    rows(database_url, "ANALYZE")
    for _ in range(10):
        finished(jobs)
    callbacks = Callbacks(database)
    assert [len(callbacks.claim_due([Channel.API_MESSAGE], 1)) for _ in range(3)] == [1, 1, 1]


def test_a_sender_whose_claim_lapsed_writes_nothing(jobs: Jobs, database: Database, database_url: str) -> None:
    job_id = finished(jobs)
    callbacks = Callbacks(database)
    [late] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    assert callbacks.claim_due([Channel.API_MESSAGE], 1) == []
    rows(database_url, "UPDATE callbacks SET lease_until = now() - interval '1 second'")
    [current] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    before, timeline = callback_row(database_url, job_id), jobs.timeline(job_id)
    callbacks.dead(late, 400, "too late")
    callbacks.retry(late, 500, "too late", wait_seconds=5, channel=Channel.API_MESSAGE)
    callbacks.delivered(late, 200)
    assert callback_row(database_url, job_id) == before
    assert jobs.timeline(job_id) == timeline
    callbacks.delivered(current, 200)
    row = callback_row(database_url, job_id)
    assert (row["state"], row["attempts"]) == ("delivered", 2)


def test_a_delivered_callback_stays_delivered(jobs: Jobs, database: Database, database_url: str) -> None:
    job_id = finished(jobs)
    callbacks = Callbacks(database)
    [callback] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    callbacks.delivered(callback, 200)
    callbacks.dead(callback, 400, "a second opinion")
    assert callback_row(database_url, job_id)["state"] == "delivered"
    assert callbacks.claim_due([Channel.API_MESSAGE], 1) == []
