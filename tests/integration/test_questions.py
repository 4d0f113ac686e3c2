"""What callers may ask about their tasks, and cancelling: History.answer on real PostgreSQL."""

from __future__ import annotations

import uuid

import psycopg
import pytest

from pokestrator.errors import LeaseLost
from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import CANCELLED, TOO_LATE, CallbackState, Channel, Job, JobState, JobStatus, NewJob, Outcome
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.recovery import Recovery
from pokestrator.store.rows import WAKE_CHANNEL
from tests.integration.flow import callback_row, job_row, rows

DONE = Outcome(JobState.SUCCEEDED, "Done.")


def sent(jobs: Jobs, task: str = "Water my plants", caller: str | None = "u-1") -> NewJob:
    job = new_job(task, caller=caller)
    jobs.insert(job)
    return job


def claimed(jobs: Jobs, job: NewJob) -> Job:
    taken = jobs.claim_one(job.id, "me", 20)
    assert taken is not None
    return taken


def status(history: History, request_id: uuid.UUID | None = None, caller: str | None = "u-1") -> JobStatus | None:
    return history.answer(Question(Action.STATUS, request_id, caller))


def cancel(history: History, request_id: uuid.UUID | None = None, caller: str | None = "u-1") -> JobStatus | None:
    return history.answer(Question(Action.CANCEL, request_id, caller))


def told(url: str, job: NewJob) -> str:
    """The one message about the job."""
    return str(callback_row(url, job.id)["content"])


# status ------------------------------------------------------------------------------------------------------------


def test_the_status_follows_a_task_on_its_way(jobs: Jobs, history: History, database_url: str) -> None:
    job = sent(jobs)
    found = status(history, job.id)
    assert found is not None
    assert (found.state, found.task, found.result, found.delivery) == (JobState.QUEUED, job.task, None, None)
    assert found.latest is not None
    assert found.latest.kind == "accepted"
    running = claimed(jobs, job)
    history.add_event(job.id, "tool", "Bash: ls")
    found = status(history, job.id)
    assert found is not None
    assert found.latest is not None
    assert (found.state, found.latest.text) == (JobState.RUNNING, "Bash: ls")
    jobs.finish(running, DONE)
    found = status(history, job.id)
    assert found is not None
    assert (found.state, found.result, found.delivery) == (JobState.SUCCEEDED, "Done.", CallbackState.PENDING)
    rows(database_url, "UPDATE callbacks SET state = 'delivered', ended_at = now()")
    found = status(history, job.id)
    assert found is not None
    assert found.delivery is CallbackState.DELIVERED


def test_ages_and_waits_are_told_in_seconds(jobs: Jobs, history: History, database_url: str) -> None:
    job = sent(jobs)
    jobs.retry(claimed(jobs, job), 25, "overloaded", Usage())
    rows(database_url, "UPDATE jobs SET created_at = now() - interval '100 seconds'")
    found = status(history, job.id)
    assert found is not None
    assert 100 <= found.age_seconds < 130
    assert 0 < found.waits_seconds <= 25


def test_without_an_id_it_is_the_callers_latest_task(jobs: Jobs, history: History) -> None:
    sent(jobs, "The first")
    latest = sent(jobs, "The second")
    sent(jobs, "Another's", caller="u-2")
    found = status(history)
    assert found is not None
    assert found.request_id == latest.id


def test_a_caller_sees_only_their_own_tasks(jobs: Jobs, history: History, database_url: str) -> None:
    theirs, nobodys = sent(jobs, caller="u-2"), sent(jobs, caller=None)
    terminals = new_job("here and now", channel=Channel.NONE)
    jobs.insert_claimed(terminals, "a terminal", 20)
    assert status(history) is None
    for other in (theirs, nobodys, terminals):
        assert status(history, other.id) is None
        assert cancel(history, other.id) is None
    assert status(history, theirs.id, caller=None) is None
    assert status(history, terminals.id, caller=None) is None
    assert status(history, nobodys.id, caller=None) is not None  # who has no name, knows the id
    assert status(history, None, caller=None) is None
    assert job_row(database_url, theirs.id)["state"] == "queued"


# cancel ------------------------------------------------------------------------------------------------------------


def test_a_queued_task_is_cancelled_at_once_and_the_person_is_told(
    jobs: Jobs, history: History, database_url: str
) -> None:
    job = sent(jobs)
    for _ in range(2):
        found = cancel(history)
        assert found is not None
        assert (found.request_id, found.state) == (job.id, JobState.CANCELLED)
    assert told(database_url, job) == CANCELLED
    assert jobs.claim("me", 20, 5) == []


def test_a_running_task_is_marked_and_every_instance_is_woken(
    jobs: Jobs, history: History, recovery: Recovery, database_url: str
) -> None:
    job = sent(jobs)
    claimed(jobs, job)
    with psycopg.connect(database_url, autocommit=True) as listener:
        listener.execute(f"LISTEN {WAKE_CHANNEL}")
        found = cancel(history, job.id)
        assert len(list(listener.notifies(timeout=5, stop_after=1))) == 1
    assert found is not None
    assert (found.state, found.cancel_requested) == (JobState.RUNNING, True)
    assert recovery.to_cancel("me") == {job.id}
    assert recovery.to_cancel("another") == set()


@pytest.mark.parametrize("error", [ErrorKind.AGENT_CRASHED, ErrorKind.TIMEOUT])
def test_a_run_that_ended_without_a_result_after_it_was_cancelled_is_cancelled(
    jobs: Jobs, history: History, database_url: str, error: ErrorKind
) -> None:
    job = sent(jobs)
    running = claimed(jobs, job)
    cancel(history, job.id)
    final = jobs.finish(running, Outcome(JobState.FAILED, "Something else.", error))
    assert (final.state, final.error) == (JobState.CANCELLED, None)
    assert job_row(database_url, job.id)["state"] == "cancelled"
    assert told(database_url, job) == CANCELLED


def test_a_result_that_was_there_before_it_could_be_cancelled_is_not_thrown_away(
    jobs: Jobs, history: History, database_url: str
) -> None:
    job = sent(jobs)
    running = claimed(jobs, job)
    cancel(history, job.id)
    assert jobs.finish(running, DONE).state is JobState.SUCCEEDED
    assert told(database_url, job) == f"{TOO_LATE}\n\nDone."


def test_what_has_ended_stays_as_it_is(jobs: Jobs, history: History, database_url: str) -> None:
    job = sent(jobs)
    jobs.finish(claimed(jobs, job), DONE)
    before = job_row(database_url, job.id)
    found = cancel(history, job.id)
    assert found is not None
    assert found.state is JobState.SUCCEEDED
    assert job_row(database_url, job.id) == before
    assert told(database_url, job) == "Done."


@pytest.mark.parametrize("way", ["interrupt", "retry", "release", "owner died", "lease ran out"])
def test_a_cancelled_run_that_does_not_come_to_its_end_is_never_run_again(
    jobs: Jobs, history: History, recovery: Recovery, database_url: str, way: str
) -> None:
    job = sent(jobs)
    running = claimed(jobs, job)
    cancel(history, job.id)
    if way == "interrupt":
        assert jobs.interrupt(running, "its agent died", Usage()) is not None
    elif way == "retry":
        assert jobs.retry(running, 5, "overloaded", Usage()) is not None
    elif way == "release":
        assert jobs.release([running]) == {job.id}
        assert jobs.claim("another", 20, 5) == []
        assert jobs.claim_one(job.id, "another", 20) is None
        assert recovery.end_cancelled() == [job.id]
    elif way == "owner died":
        assert recovery.sweep([], dead_owners=["me"]).ended == (job.id,)
    else:
        rows(database_url, "UPDATE jobs SET lease_until = now() - interval '1 second'")
        assert recovery.sweep([], expired=True).ended == (job.id,)
    assert job_row(database_url, job.id)["state"] == "cancelled"
    assert told(database_url, job) == CANCELLED
    assert jobs.claim("another", 20, 5) == []
    with pytest.raises(LeaseLost):
        jobs.finish(running, DONE)
