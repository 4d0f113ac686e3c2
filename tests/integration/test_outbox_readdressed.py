"""Callbacks whose job gets a new address while they are sent to the old one, and those that were not sent at all."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from pokestrator.demo.inbox import Inbox
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, Channel, JobState, NewJob, Outcome
from pokestrator.store.callbacks import Callback, Callbacks
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import POKE_KEY, TOKEN, callback_row, contents
from tests.integration.outbox import change, delivering, finished, reaches

API = [Channel.API_MESSAGE]
URL = "https://poke.invalid/callback/1"


@pytest.fixture
def callbacks(database: Database) -> Callbacks:
    return Callbacks(database)


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


def claimed(callbacks: Callbacks) -> Callback:
    [callback] = callbacks.claim_due(API, 1)
    return callback


def readdressed(jobs: Jobs, url: str, again: str) -> tuple[uuid.UUID, Callable[[], None]]:
    """A job whose answer is wanted at `url`, and what a repeated call with the address `again` does to it."""
    metadata = {"idempotency_key": f"key {uuid.uuid4()}"}
    job = new_job("A task", metadata, callback=CallbackTarget(url, TOKEN))
    jobs.finish(jobs.insert_claimed(job, "me", 60), Outcome(JobState.SUCCEEDED, "Done."))
    repeated = new_job("A task", metadata, callback=CallbackTarget(again, TOKEN))
    return job.id, lambda: _repeats(jobs, repeated, job.id)


def _repeats(jobs: Jobs, job: NewJob, earlier: uuid.UUID) -> None:
    assert jobs.insert(job) == earlier


@pytest.mark.parametrize(
    ("status", "then"),
    [(401, "retry on the message API"), (400, "dead"), (503, "retry later"), (503, "dead"), (None, "retry later")],
)
def test_what_an_old_address_says_ends_and_puts_off_nothing_at_a_new_one(
    jobs: Jobs, callbacks: Callbacks, history: History, database_url: str, status: int | None, then: str
) -> None:
    job_id, repeat = readdressed(jobs, URL, f"{URL}/new")
    change(database_url, job_id, "attempts = 10, begun_at = now() - interval '60 hours'")
    [old] = callbacks.claim_due([Channel.CALLBACK], 1)
    assert (old.tries, old.target) == (11, CallbackTarget(URL, TOKEN))
    repeat()
    assert callbacks.claim_due([Channel.CALLBACK], 1) == []  # the sender still holds it
    if then == "dead":
        callbacks.dead(old, status, "HTTP no")
    else:
        wait, channel = (0.0, Channel.API_MESSAGE) if "API" in then else (86_400.0, Channel.CALLBACK)
        callbacks.retry(old, status, "HTTP no", wait_seconds=wait, channel=channel)
    row = callback_row(database_url, job_id)
    assert (row["state"], row["last_status"], row["last_error"]) == ("pending", status, "HTTP no")
    event = history.timeline(job_id)[-1]
    assert (event.kind, event.text) == ("callback failed", "HTTP no; its tries have begun anew meanwhile")
    [new] = callbacks.claim_due(list(Channel)[:2], 1)
    assert (new.channel, new.target, new.tries) == (Channel.CALLBACK, CallbackTarget(f"{URL}/new", TOKEN), 1)
    assert 0 <= new.age_seconds < 60
    callbacks.dead(new, 400, "HTTP 400")
    assert callback_row(database_url, job_id)["state"] == "dead"


@pytest.mark.parametrize("answer", [{"status": 401}, {"status": 400}, {"status": 503}, {"close": True}], ids=str)
def test_a_new_address_is_tried_at_once_when_the_old_one_has_failed_late_in_its_schedule(
    jobs: Jobs, database: Database, database_url: str, answer: dict[str, int]
) -> None:
    with Inbox(api_key=POKE_KEY) as old, Inbox(api_key=POKE_KEY) as new:
        old.answer_with([{**answer, "delay": 1}])
        job_id, repeat = readdressed(jobs, old.callback_url(TOKEN), new.callback_url(TOKEN))
        change(database_url, job_id, "attempts = 11, begun_at = now() - interval '75 hours'")
        with delivering(database, old):
            assert len(old.wait_for(1, 10)) == 1
            repeat()
            row = reaches(database_url, job_id, "delivered", 6)
        assert (row["channel"], row["attempts"]) == ("callback", 13)
        assert contents(old.received) == contents(new.received) == ["Done."]


def test_what_was_delivered_to_an_old_address_is_delivered(jobs: Jobs, callbacks: Callbacks, database_url: str) -> None:
    job_id, repeat = readdressed(jobs, URL, f"{URL}/new")
    [old] = callbacks.claim_due([Channel.CALLBACK], 1)
    repeat()
    callbacks.delivered(old, 200)
    assert callback_row(database_url, job_id)["state"] == "delivered"


def test_what_is_given_back_is_due_at_once_and_its_claim_was_no_try(
    jobs: Jobs, callbacks: Callbacks, history: History, database_url: str
) -> None:
    job_id = finished(jobs)
    change(database_url, job_id, "attempts = 3, last_status = 503, last_error = 'HTTP 503'")
    before, held = history.timeline(job_id), claimed(callbacks)
    assert held.tries == 4
    for _ in range(2):  # the second time because the COMMIT's answer was lost
        callbacks.give_back(held)
    row = callback_row(database_url, job_id)
    assert (row["state"], row["lease_until"], row["last_error"]) == ("pending", None, "HTTP 503")
    assert history.timeline(job_id) == before
    again = claimed(callbacks)
    assert (again.attempt, again.tries) == (5, 4)
    callbacks.give_back(held)  # too late
    assert callbacks.claim_due(API, 1) == []


def test_what_is_given_back_after_a_new_address_begins_at_its_first_try(
    jobs: Jobs, callbacks: Callbacks, database_url: str
) -> None:
    _, repeat = readdressed(jobs, URL, f"{URL}/new")
    [old] = callbacks.claim_due([Channel.CALLBACK], 1)
    repeat()
    callbacks.give_back(old)
    [new] = callbacks.claim_due([Channel.CALLBACK], 1)
    assert (new.tries, new.target) == (1, CallbackTarget(f"{URL}/new", TOKEN))
