"""The same call twice is one job: by the caller's own key, or by the same words of one named caller."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import CallbackTarget, Job, JobState, NewJob, Outcome
from pokestrator.store.accepting import LOCK
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import callback_row, job_row, rows

DONE = Outcome(JobState.SUCCEEDED, "Done.")
AT_ONCE = 50
CALLER = "6f1c0a0e-0000-4000-8000-000000000001"


def call(
    task: str = "Water the plants", *, caller: str | None = CALLER, key: str | None = None, address: str | None = None
) -> NewJob:
    target = CallbackTarget(f"https://poke.invalid/{address}", f"token-{address}") if address else None
    return new_job(task, {"idempotency_key": key} if key else "", caller=caller, callback=target)


def same_words() -> NewJob:
    return call()


def own_key() -> NewJob:
    return call(f"Water the plants, said another way: {uuid.uuid4()}", key="plants-1")


def own_key_without_a_name() -> NewJob:
    return call(caller=None, key="plants-1")


def is_repeated(jobs: Jobs, first: NewJob, second: NewJob) -> bool:
    stored = jobs.insert(second)
    assert stored in (first.id, second.id)
    return stored == first.id


def ended(jobs: Jobs, job: NewJob) -> Job:
    claimed = jobs.claim_one(job.id, "me", 20)
    assert claimed is not None
    jobs.finish(claimed, DONE)
    return claimed


def make_older(url: str, job: NewJob, age: str) -> None:
    rows(url, "UPDATE jobs SET created_at = now() - %s::interval WHERE id = %s", age, job.id)


# at once -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [same_words, own_key, own_key_without_a_name])
def test_fifty_at_once_make_one_job_and_all_learn_its_id(
    database_url: str, history: History, make: Callable[[], NewJob]
) -> None:
    database = Database(database_url, max_size=12)
    database.open()
    jobs, together = Jobs(database), threading.Barrier(AT_ONCE)

    def insert(job: NewJob) -> uuid.UUID:
        together.wait()
        return jobs.insert(job, within=30)

    made = [make() for _ in range(AT_ONCE)]
    try:
        with ThreadPoolExecutor(AT_ONCE) as callers:
            told = set(callers.map(insert, made))
    finally:
        database.close()
    [job_id] = told
    assert job_id in {job.id for job in made}
    assert [row["id"] for row in rows(database_url, "SELECT id FROM jobs")] == [job_id]
    kinds = [event.kind for event in history.timeline(job_id)]
    assert kinds == ["accepted", *["repeated"] * (AT_ONCE - 1)]


def test_a_repetition_that_waits_for_the_first_to_commit_finds_it(jobs: Jobs, database_url: str) -> None:
    first, second = call(), call()
    assert first.idempotency is not None
    key = first.idempotency.key
    insert = "INSERT INTO jobs (id, task, metadata, channel, idempotency_key) VALUES (%s, 'Slow', '{}', 'none', %s)"
    with psycopg.connect(database_url) as slow, ThreadPoolExecutor(1) as other:
        slow.execute(LOCK.encode(), [[key]])
        told = other.submit(jobs.insert, second)
        with pytest.raises(TimeoutError):
            told.result(0.3)
        slow.execute(insert, [first.id, key])
        slow.commit()
        assert told.result(5) == first.id


# what counts as a repetition -----------------------------------------------------------------------------------------


def test_the_same_words_of_a_named_caller_are_repeated_until_their_job_ends(jobs: Jobs) -> None:
    first = call()
    jobs.insert(first)
    assert is_repeated(jobs, first, call())
    claimed = jobs.claim_one(first.id, "me", 20)
    assert claimed is not None
    assert is_repeated(jobs, first, call())  # while it runs
    jobs.finish(claimed, DONE)
    assert not is_repeated(jobs, first, call())


def test_the_same_words_while_their_job_is_being_cancelled_are_a_new_task(jobs: Jobs, history: History) -> None:
    first = call()
    jobs.insert(first)
    assert jobs.claim_one(first.id, "me", 20) is not None
    status = history.answer(Question(Action.CANCEL, first.id, CALLER))
    assert status is not None and status.cancel_requested  # its run has yet to end
    assert not is_repeated(jobs, first, call())


def test_the_same_words_two_minutes_later_are_a_new_task(jobs: Jobs, database_url: str) -> None:
    first = call()
    jobs.insert(first)
    make_older(database_url, first, "115 seconds")
    assert is_repeated(jobs, first, call())
    make_older(database_url, first, "120 seconds")
    assert not is_repeated(jobs, first, call())


def test_the_same_words_without_a_name_are_a_new_task_each_time(jobs: Jobs, database_url: str) -> None:
    first = call(caller=None)
    jobs.insert(first)
    assert not is_repeated(jobs, first, call(caller=None))
    assert len(rows(database_url, "SELECT id FROM jobs")) == 2


def test_other_words_or_other_metadata_are_a_new_task(jobs: Jobs) -> None:
    first = new_job("Water the plants", {"room": "hall", "floor": 1}, caller=CALLER)
    jobs.insert(first)
    assert is_repeated(jobs, first, new_job("Water the plants", {"floor": 1, "room": "hall"}, caller=CALLER))
    assert is_repeated(jobs, first, new_job("Water the plants", '{"room": "hall", "floor": 1}', caller=CALLER))
    assert not is_repeated(jobs, first, new_job("Water the plants", {"room": "hall", "floor": 2}, caller=CALLER))
    assert not is_repeated(jobs, first, new_job("water the plants", {"room": "hall", "floor": 1}, caller=CALLER))


def test_an_own_key_names_its_job_for_a_day_also_after_its_end(jobs: Jobs, database_url: str) -> None:
    first = own_key()
    jobs.insert(first)
    ended(jobs, first)
    assert is_repeated(jobs, first, own_key())
    make_older(database_url, first, "23 hours 59 minutes")
    assert is_repeated(jobs, first, own_key())
    make_older(database_url, first, "1 day")
    assert not is_repeated(jobs, first, own_key())


def test_a_key_that_has_been_used_again_names_the_newer_job(jobs: Jobs, database_url: str) -> None:
    first, second = own_key(), own_key()
    jobs.insert(first)
    make_older(database_url, first, "25 hours")
    jobs.insert(second)
    make_older(database_url, first, "23 hours")  # as if the clock had gone back
    assert jobs.insert(own_key()) == second.id


@pytest.mark.parametrize(("caller", "key"), [(None, "plants-1"), ("another", "plants-1"), (CALLER, "plants-2")])
def test_another_caller_or_another_key_is_another_job(jobs: Jobs, caller: str | None, key: str) -> None:
    first = call(key="plants-1")
    jobs.insert(first)
    assert not is_repeated(jobs, first, call(key=key, caller=caller))


def test_the_same_words_of_another_caller_are_another_job(jobs: Jobs) -> None:
    first = call()
    jobs.insert(first)
    assert not is_repeated(jobs, first, call(caller="another"))


def test_an_own_key_is_not_the_same_words(jobs: Jobs) -> None:
    first = call()
    jobs.insert(first)
    assert not is_repeated(jobs, first, call(key="Water the plants"))


@pytest.mark.parametrize("make", [same_words, own_key, lambda: call(caller=None)])
def test_the_same_job_stored_again_is_no_repetition(
    jobs: Jobs, database_url: str, history: History, make: Callable[[], NewJob]
) -> None:
    job = make()
    assert jobs.insert(job) == jobs.insert(job) == job.id
    assert len(rows(database_url, "SELECT id FROM jobs")) == 1
    assert [event.kind for event in history.timeline(job.id)] == ["accepted"]


# where the answer goes -----------------------------------------------------------------------------------------------


def test_the_newest_address_is_the_one_that_is_used(jobs: Jobs, database: Database, database_url: str) -> None:
    first = call(address="one")
    jobs.insert(first)
    jobs.insert(call(address="two"))
    claimed = jobs.claim_one(first.id, "me", 20)
    assert claimed is not None
    jobs.insert(call(address="three"))  # while it runs
    assert job_row(database_url, first.id)["callback_url"] == "https://poke.invalid/three"
    jobs.finish(claimed, DONE)
    [callback] = Callbacks(database).claim_due([first.channel], 1)
    assert callback.target == CallbackTarget("https://poke.invalid/three", "token-three")


def test_a_task_for_the_message_api_is_answered_at_the_address_that_came_later(jobs: Jobs, database: Database) -> None:
    first, second = call(), call(address="one")
    jobs.insert(first)
    assert is_repeated(jobs, first, second)
    ended(jobs, first)
    [callback] = Callbacks(database).claim_due([second.channel], 1)
    assert callback.target == second.callback


def test_a_repetition_without_an_address_leaves_the_address_alone(jobs: Jobs, database_url: str) -> None:
    first = call(address="one")
    jobs.insert(first)
    assert is_repeated(jobs, first, call())
    row = job_row(database_url, first.id)
    assert (row["channel"], row["callback_token"]) == ("callback", "token-one")


def test_a_result_that_waits_in_the_outbox_goes_to_the_new_address_at_once(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    first, second = call(key="plants-1"), call(key="plants-1", address="two")
    jobs.insert(first)
    ended(jobs, first)
    wait = "UPDATE callbacks SET next_attempt_at = now() + interval '5 hours', attempts = 7 WHERE job_id = %s"
    rows(database_url, wait, first.id)
    assert is_repeated(jobs, first, second)
    [callback] = Callbacks(database).claim_due([second.channel], 1)
    assert (callback.job_id, callback.target, callback.attempt) == (first.id, second.callback, 8)
    assert (callback.tries, round(callback.age_seconds)) == (1, 0)  # the new address gets all the tries


def test_a_dead_letter_gets_another_chance_at_the_new_address(jobs: Jobs, database: Database) -> None:
    first, second = call(key="plants-1", address="one"), call(key="plants-1", address="two")
    jobs.insert(first)
    ended(jobs, first)
    callbacks = Callbacks(database)
    [callback] = callbacks.claim_due([first.channel], 1)
    callbacks.dead(callback, 400, "HTTP 400")
    assert is_repeated(jobs, first, second)
    [callback] = callbacks.claim_due([second.channel], 1)
    assert (callback.target, callback.tries) == (second.callback, 1)


def test_a_result_that_was_delivered_is_not_sent_again(jobs: Jobs, database: Database, database_url: str) -> None:
    first = call(key="plants-1", address="one")
    jobs.insert(first)
    ended(jobs, first)
    callbacks = Callbacks(database)
    [callback] = callbacks.claim_due([first.channel], 1)
    callbacks.delivered(callback, 200)
    before = callback_row(database_url, first.id)
    assert is_repeated(jobs, first, call(key="plants-1", address="two"))
    assert callback_row(database_url, first.id) == before
