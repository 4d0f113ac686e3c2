"""One call is one job: repeated calls on real PostgreSQL, by a key of the caller's own or by the same words."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, JobState, NewJob, Outcome
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from tests.integration.flow import callback_row, job_row, rows

DONE = Outcome(JobState.SUCCEEDED, "Done.")
KEY = {"idempotency_key": "order-66"}
FIRST = CallbackTarget("https://poke.example/callback/1", "token-1")
SECOND = CallbackTarget("https://poke.example/callback/2", "token-2")


def call(metadata: Any = "", *, caller: str | None = "u-1", callback: CallbackTarget | None = None) -> NewJob:
    return new_job("Water my plants", metadata, caller=caller, callback=callback)


def ended(jobs: Jobs, job: NewJob) -> None:
    claimed = jobs.claim_one(job.id, "me", 20)
    assert claimed is not None
    jobs.finish(claimed, DONE)


def make_older(url: str, seconds: float) -> None:
    rows(url, "UPDATE jobs SET created_at = created_at - make_interval(secs => %s)", seconds)


@pytest.mark.parametrize(("metadata", "caller"), [(KEY, "u-1"), (KEY, None), ("", "u-1")], ids=["key", "open", "words"])
def test_fifty_equal_calls_at_once_make_one_job(
    jobs: Jobs, database_url: str, metadata: Any, caller: str | None
) -> None:
    made = [call(metadata, caller=caller) for _ in range(50)]
    with ThreadPoolExecutor(16) as callers:
        told = set(callers.map(lambda job: jobs.insert(job, 30.0), made))
    [stored] = rows(database_url, "SELECT id FROM jobs")
    assert told == {stored["id"]}
    kinds = [row["kind"] for row in rows(database_url, "SELECT kind FROM job_events ORDER BY id")]
    assert kinds == ["accepted"] + ["repeated"] * 49


def test_the_newest_callback_address_is_the_one_that_is_used(jobs: Jobs, database_url: str) -> None:
    first = call(callback=FIRST)
    jobs.insert(first)
    assert jobs.insert(call(callback=SECOND)) == first.id
    row = job_row(database_url, first.id)
    assert (row["channel"], row["callback_url"], row["callback_token"]) == ("callback", SECOND.url, SECOND.token)
    assert jobs.insert(call()) == first.id  # one that brings none leaves it as it is
    assert job_row(database_url, first.id)["callback_url"] == SECOND.url


def test_an_address_can_come_after_a_call_that_had_none(jobs: Jobs, database_url: str) -> None:
    first = call()
    jobs.insert(first)
    jobs.insert(call(callback=SECOND))
    assert job_row(database_url, first.id)["channel"] == "callback"


def test_a_message_that_waits_in_the_outbox_goes_to_the_newest_address_at_once(jobs: Jobs, database_url: str) -> None:
    first = call(KEY, callback=FIRST)
    jobs.insert(first)
    ended(jobs, first)
    rows(
        database_url,
        "UPDATE callbacks SET attempts = 4, channel = 'api_message', next_attempt_at = now() + interval '1 hour'",
    )
    assert jobs.insert(call(KEY, callback=SECOND)) == first.id
    row = callback_row(database_url, first.id)
    assert (row["channel"], row["attempts"], row["attempts_before"]) == ("callback", 4, 4)
    [due] = rows(database_url, "SELECT next_attempt_at <= now() AS now FROM callbacks")
    assert due["now"]


def test_what_was_delivered_is_not_sent_again_to_a_new_address(jobs: Jobs, database_url: str) -> None:
    first = call(KEY, callback=FIRST)
    jobs.insert(first)
    ended(jobs, first)
    rows(database_url, "UPDATE callbacks SET state = 'delivered', ended_at = now()")
    assert jobs.insert(call(KEY, callback=SECOND)) == first.id
    assert callback_row(database_url, first.id)["state"] == "delivered"


def test_the_same_words_are_a_new_task_once_the_first_has_ended(jobs: Jobs) -> None:
    first, second = call(), call()
    jobs.insert(first)
    ended(jobs, first)
    assert jobs.insert(second) == second.id


def test_the_same_words_are_a_new_task_after_two_minutes(jobs: Jobs, database_url: str) -> None:
    first, second, third = call(), call(), call()
    jobs.insert(first)
    make_older(database_url, 110)
    assert jobs.insert(second) == first.id
    make_older(database_url, 11)
    assert jobs.insert(third) == third.id


def test_other_words_other_metadata_and_other_callers_are_other_tasks(jobs: Jobs) -> None:
    made = [
        call(),
        call({"zone": "UTC"}),
        call(caller="u-2"),
        new_job("Water my cat", caller="u-1"),
        call(KEY),
        call(KEY, caller="u-2"),
        call({"idempotency_key": "order-67"}),
    ]
    assert [jobs.insert(job) for job in made] == [job.id for job in made]


def test_the_same_words_of_nobody_we_know_are_two_tasks(jobs: Jobs) -> None:
    first, second = call(caller=None), call(caller=None)
    assert [jobs.insert(first), jobs.insert(second)] == [first.id, second.id]


def test_a_key_of_ones_own_names_the_task_for_a_day_also_when_it_has_ended(jobs: Jobs, database_url: str) -> None:
    first = call(KEY)
    jobs.insert(first)
    ended(jobs, first)
    make_older(database_url, 86_000)
    assert jobs.insert(new_job("The same in other words", KEY, caller="u-1")) == first.id
    make_older(database_url, 500)
    later = call(KEY)
    assert jobs.insert(later) == later.id


def test_text_that_holds_an_object_has_its_key(jobs: Jobs) -> None:
    first = call('{"idempotency_key": "order-66"}')
    jobs.insert(first)
    assert jobs.insert(call(KEY)) == first.id


def test_storing_the_same_job_again_is_no_repetition(jobs: Jobs, history: History) -> None:
    # As after a COMMIT whose answer was lost.
    job = call(KEY)
    assert [jobs.insert(job), jobs.insert(job)] == [job.id, job.id]
    assert [event.kind for event in history.timeline(job.id)] == ["accepted"]
