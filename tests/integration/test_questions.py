"""What a caller may ask of a job: how it stands, and to cancel it; and what becomes of a job that was cancelled."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import pytest

from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import (
    CANCELLED,
    TOO_LATE,
    CallbackState,
    CallbackTarget,
    Channel,
    Job,
    JobState,
    JobStatus,
    NewJob,
    Outcome,
)
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.store.rows import WAKE_CHANNEL
from tests.integration.flow import callback_row, job_row, rows

CALLER = "6f1c0a0e-0000-4000-8000-000000000001"
DONE = Outcome(JobState.SUCCEEDED, "The lamp is lit.")
TIMED_OUT = Outcome(JobState.FAILED, "I ran out of time.", ErrorKind.TIMEOUT, "no result after 90 s")


def stored(jobs: Jobs, task: str = "Light the lamp", *, caller: str | None = CALLER, **more: CallbackTarget) -> NewJob:
    job = new_job(task, f"call {uuid.uuid4()}", caller=caller, **more)
    jobs.insert(job)
    return job


def running(jobs: Jobs, *, owner: str = "me", caller: str | None = CALLER) -> Job:
    claimed = jobs.claim_one(stored(jobs, caller=caller).id, owner, 20)
    assert claimed is not None
    return claimed


def ask(history: History, job_id: uuid.UUID | None = None, *, caller: str | None = CALLER) -> JobStatus | None:
    return history.answer(Question(Action.STATUS, job_id, caller))


def cancel(history: History, job_id: uuid.UUID | None = None, *, caller: str | None = CALLER) -> JobStatus:
    status = history.answer(Question(Action.CANCEL, job_id, caller))
    assert status is not None
    return status


def known(status: JobStatus | None) -> JobStatus:
    assert status is not None
    return status


# status --------------------------------------------------------------------------------------------------------------


def test_the_status_of_a_queued_job_tells_its_age_and_its_wait(jobs: Jobs, history: History, database_url: str) -> None:
    job = stored(jobs)
    rows(
        database_url,
        "UPDATE jobs SET created_at = now() - interval '90 seconds', run_at = now() + interval '30 seconds'",
    )
    status = known(ask(history, job.id))
    assert (status.request_id, status.state, status.task) == (job.id, JobState.QUEUED, "Light the lamp")
    assert 90 <= status.age_seconds < 100
    assert 20 < status.waits_seconds <= 30
    assert (status.cancel_requested, status.result, status.delivery) == (False, None, None)
    assert status.latest is not None
    assert status.latest.kind == "accepted"


def test_the_status_of_a_running_job_tells_the_latest_of_its_timeline(jobs: Jobs, history: History) -> None:
    job = running(jobs)
    jobs.note(job, "tool", "Bash: light --lamp")
    status = known(ask(history, job.id))
    assert (status.state, status.waits_seconds, status.result) == (JobState.RUNNING, 0, None)
    assert status.latest is not None
    assert (status.latest.kind, status.latest.text) == ("tool", "Bash: light --lamp")


@pytest.mark.parametrize("outcome", [DONE, TIMED_OUT])
def test_the_status_of_an_ended_job_tells_its_result_and_whether_it_was_delivered(
    jobs: Jobs, history: History, database: Database, outcome: Outcome
) -> None:
    job = running(jobs)
    jobs.finish(job, outcome)
    status = known(ask(history, job.id))
    assert (status.state, status.result, status.delivery) == (outcome.state, outcome.text, CallbackState.PENDING)
    callbacks = Callbacks(database)
    [callback] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    callbacks.dead(callback, 400, "HTTP 400")
    assert known(ask(history, job.id)).delivery is CallbackState.DEAD
    callbacks.replay(job.id)
    [callback] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    callbacks.delivered(callback, 200)
    assert known(ask(history, job.id)).delivery is CallbackState.DELIVERED


def test_a_status_changes_nothing(jobs: Jobs, history: History, database_url: str) -> None:
    job = running(jobs)
    before, timeline = job_row(database_url, job.id), history.timeline(job.id)
    ask(history, job.id)
    ask(history)
    assert job_row(database_url, job.id) == before
    assert history.timeline(job.id) == timeline


# whose jobs ----------------------------------------------------------------------------------------------------------


def test_without_an_id_it_is_about_the_callers_latest(jobs: Jobs, history: History) -> None:
    assert ask(history) is None
    stored(jobs, "The first")
    latest = stored(jobs, "The second")
    stored(jobs, "Somebody else's", caller="another")
    assert known(ask(history)).request_id == latest.id
    assert cancel(history).request_id == latest.id


def test_the_jobs_of_others_cannot_be_seen_or_cancelled(jobs: Jobs, history: History, database_url: str) -> None:
    mine, nobodys = stored(jobs), stored(jobs, caller=None)
    for job, caller in [(mine, "another"), (mine, None), (nobodys, CALLER)]:
        for action in Action:
            assert history.answer(Question(action, job.id, caller)) is None
    assert ask(history, uuid.uuid4()) is None
    assert {row["state"] for row in rows(database_url, "SELECT state FROM jobs")} == {"queued"}


def test_who_has_no_name_asks_by_id_only(jobs: Jobs, history: History) -> None:
    job = stored(jobs, caller=None)
    assert known(ask(history, job.id, caller=None)).request_id == job.id
    assert ask(history, caller=None) is None
    assert cancel(history, job.id, caller=None).state is JobState.CANCELLED


def test_a_terminals_job_is_nobodys(jobs: Jobs, history: History) -> None:
    job = new_job("Here and now", channel=Channel.NONE, caller=CALLER)
    jobs.insert(job)
    assert ask(history, job.id) is None
    assert ask(history) is None


# cancel --------------------------------------------------------------------------------------------------------------


def test_a_queued_job_ends_at_once_and_the_person_is_told_once(
    jobs: Jobs, history: History, recovery: Recovery, database_url: str
) -> None:
    job = stored(jobs)
    for _ in range(2):
        status = cancel(history, job.id)
        assert (status.state, status.result, status.delivery) == (
            JobState.CANCELLED,
            CANCELLED,
            CallbackState.PENDING,
        )
    assert callback_row(database_url, job.id)["content"] == CANCELLED
    assert jobs.claim("me", 20, 5) == []
    assert recovery.end_cancelled() == []
    assert [event.kind for event in history.timeline(job.id)] == ["accepted", "finished"]


def test_a_queued_jobs_end_is_told_at_its_callback_address(jobs: Jobs, history: History, database: Database) -> None:
    target = CallbackTarget("https://poke.invalid/one", "token-one")
    job = stored(jobs, callback=target)
    cancel(history, job.id)
    [callback] = Callbacks(database).claim_due([Channel.CALLBACK], 1)
    assert (callback.target, callback.content) == (target, CANCELLED)


def test_a_running_job_is_marked_and_its_owner_is_woken(jobs: Jobs, history: History, database: Database) -> None:
    job, other = running(jobs), running(jobs, owner="another")
    with database.connect() as listening:
        listening.execute(f"LISTEN {WAKE_CHANNEL}".encode())
        status = cancel(history, job.id)
        assert len(list(listening.notifies(timeout=5, stop_after=1))) == 1
        assert (status.state, status.cancel_requested, status.result) == (JobState.RUNNING, True, None)
        assert cancel(history, job.id).cancel_requested
        assert list(listening.notifies(timeout=0.2)) == []  # once is enough
    recovery = Recovery(database)
    assert recovery.to_cancel("me") == {job.id}
    assert recovery.to_cancel("another") == set()
    assert [event.kind for event in history.timeline(job.id)] == ["accepted", "claimed", "cancelling"]
    assert not known(ask(history, other.id)).cancel_requested


def test_a_run_that_was_cancelled_ends_so_and_keeps_what_it_cost(
    jobs: Jobs, history: History, database_url: str
) -> None:
    job = running(jobs)
    cancel(history, job.id)
    aborted = Outcome(JobState.FAILED, "It broke.", ErrorKind.AGENT_CRASHED, "killed", Usage(0.5, 10, 20, 3))
    final = jobs.finish(job, aborted)
    assert (final.state, final.text) == (JobState.CANCELLED, CANCELLED)
    row = job_row(database_url, job.id)
    assert (row["state"], row["error_kind"], row["error_detail"], row["cost_usd"]) == ("cancelled", None, "killed", 0.5)
    assert callback_row(database_url, job.id)["content"] == CANCELLED


def test_a_run_that_succeeds_before_it_can_be_ended_stays_a_success_and_says_so(
    jobs: Jobs, history: History, database_url: str
) -> None:
    job = running(jobs)
    cancel(history, job.id)
    assert jobs.finish(job, DONE).state is JobState.SUCCEEDED
    assert callback_row(database_url, job.id)["content"] == f"{TOO_LATE}\n\n{DONE.text}"
    status = cancel(history, job.id)
    assert (status.state, status.result) == (JobState.SUCCEEDED, f"{TOO_LATE}\n\n{DONE.text}")


@pytest.mark.parametrize("outcome", [DONE, TIMED_OUT])
def test_an_ended_job_is_beyond_cancelling(jobs: Jobs, history: History, database_url: str, outcome: Outcome) -> None:
    job = running(jobs)
    jobs.finish(job, outcome)
    before, sent, timeline = job_row(database_url, job.id), callback_row(database_url, job.id), history.timeline(job.id)
    status = cancel(history, job.id)
    assert (status.state, status.result, status.cancel_requested) == (outcome.state, outcome.text, False)
    assert job_row(database_url, job.id) == before
    assert callback_row(database_url, job.id) == sent
    assert history.timeline(job.id) == timeline


# a cancelled job whose run ends without a result ---------------------------------------------------------------------


def is_released(jobs: Jobs, _recovery: Recovery, job: Job) -> None:
    jobs.release([job])


def is_unknown_to_its_owner(_jobs: Jobs, recovery: Recovery, _job: Job) -> None:
    recovery.release_unknown("me", [])


def is_interrupted(jobs: Jobs, _recovery: Recovery, job: Job) -> None:
    ended = jobs.interrupt(job, "the slot died", Usage())
    assert ended is not None
    assert ended.state is JobState.CANCELLED


def is_to_be_tried_again(jobs: Jobs, _recovery: Recovery, job: Job) -> None:
    ended = jobs.retry(job, 10, "HTTP 529", Usage())
    assert ended is not None
    assert ended.state is JobState.CANCELLED


def loses_its_owner(_jobs: Jobs, recovery: Recovery, job: Job) -> None:
    assert recovery.sweep([], dead_owners=["me"]).ended == (job.id,)


@pytest.mark.parametrize(
    "what_happens", [is_released, is_unknown_to_its_owner, is_interrupted, is_to_be_tried_again, loses_its_owner]
)
def test_a_cancelled_job_never_runs_again_and_the_person_is_told_once(
    jobs: Jobs,
    history: History,
    recovery: Recovery,
    database_url: str,
    what_happens: Callable[[Jobs, Recovery, Job], None],
) -> None:
    job = running(jobs)
    cancel(history, job.id)
    what_happens(jobs, recovery, job)
    assert jobs.claim("me", 20, 5) == []
    assert jobs.claim_one(job.id, "me", 20) is None
    recovery.end_cancelled()
    assert recovery.end_cancelled() == []
    row = job_row(database_url, job.id)
    assert (row["state"], row["result"], row["claim_seq"]) == ("cancelled", CANCELLED, 1)
    assert callback_row(database_url, job.id)["content"] == CANCELLED
    assert [event.kind for event in history.timeline(job.id)].count("finished") == 1


def test_a_job_that_came_back_cancelled_may_be_cancelled_again(jobs: Jobs, history: History, database_url: str) -> None:
    job = running(jobs)
    cancel(history, job.id)
    jobs.release([job])
    assert cancel(history, job.id).state is JobState.CANCELLED
    assert callback_row(database_url, job.id)["content"] == CANCELLED
