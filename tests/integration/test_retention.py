"""What ended long ago is removed, in batches; what somebody still waits for, or may look into, stays."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from pokestrator import sweeping
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackState, Channel, JobState, Outcome
from pokestrator.liveness import Liveness
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.sweeping import REMOVE_SECONDS, Sweeper
from tests.integration.flow import captured_logs, quiet_task, rows
from tests.integration.passing_time import DAYS, LEASE, Instance, passing_time

DONE = Outcome(JobState.SUCCEEDED, "Done.")
OLD = DAYS + 1
AGE = """
UPDATE jobs SET created_at = created_at - {age}, finished_at = finished_at - {age} WHERE id = '{job}';
UPDATE callbacks SET created_at = created_at - {age}, ended_at = ended_at - {age} WHERE job_id = '{job}'"""


@pytest.fixture
def callbacks(database: Database) -> Callbacks:
    return Callbacks(database)


def ended(
    jobs: Jobs, callbacks: Callbacks, url: str, *, days_ago: float = OLD, delivery: str = CallbackState.DELIVERED
) -> uuid.UUID:
    """A job that ended so long ago, and its callback with it unless that waits."""
    job = jobs.insert_claimed(new_job("A task of long ago"), "me", LEASE)
    jobs.finish(job, DONE)
    if delivery != CallbackState.PENDING:
        [callback] = callbacks.claim_due([Channel.API_MESSAGE], 1, job.id)
        if delivery == CallbackState.DELIVERED:
            callbacks.delivered(callback, 200)
        else:
            callbacks.dead(callback, 400, "HTTP 400")
    make_older(url, job.id, days_ago)
    return job.id


def make_older(url: str, job_id: uuid.UUID, days: float) -> None:
    rows(url, AGE.format(age=f"interval '{days * 86_400} seconds'", job=job_id))


def stored(url: str) -> set[uuid.UUID]:
    return {row["id"] for row in rows(url, "SELECT id FROM jobs")}


def test_an_old_job_goes_with_its_timeline_and_its_delivered_callback(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str
) -> None:
    ended(jobs, callbacks, database_url)
    kept = ended(jobs, callbacks, database_url, days_ago=1)
    assert recovery.remove_old(DAYS, 10) == 1
    assert stored(database_url) == {kept}
    for table in ("job_events", "callbacks"):
        assert {row["job_id"] for row in rows(database_url, f"SELECT job_id FROM {table}")} == {kept}
    assert recovery.remove_old(DAYS, 10) == 0


def test_a_job_is_kept_to_the_end_of_its_last_day(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str
) -> None:
    recent = ended(jobs, callbacks, database_url, days_ago=DAYS - 0.01)
    ended(jobs, callbacks, database_url, days_ago=DAYS + 0.01)
    assert recovery.remove_old(DAYS, 10) == 1
    assert stored(database_url) == {recent}


def test_what_has_not_ended_stays_however_old(jobs: Jobs, recovery: Recovery, database_url: str) -> None:
    queued, running = new_job("Queued"), jobs.insert_claimed(new_job("Running"), "me", LEASE)
    jobs.insert(queued)
    for job in (queued, running):
        make_older(database_url, job.id, 1_000)
    assert recovery.remove_old(DAYS, 10) == 0
    assert stored(database_url) == {queued.id, running.id}


@pytest.mark.parametrize("delivery", [CallbackState.PENDING, CallbackState.DEAD])
def test_an_undelivered_result_stays_however_old(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str, delivery: CallbackState
) -> None:
    job_id = ended(jobs, callbacks, database_url, days_ago=1_000, delivery=delivery)
    assert recovery.remove_old(DAYS, 10) == 0
    assert stored(database_url) == {job_id}


def test_a_result_that_was_replayed_and_delivered_lately_is_kept_from_then_on(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str
) -> None:
    job_id = ended(jobs, callbacks, database_url, days_ago=1_000, delivery=CallbackState.DEAD)
    callbacks.replay(job_id)
    [callback] = callbacks.claim_due([Channel.API_MESSAGE], 1)
    callbacks.delivered(callback, 200)
    assert recovery.remove_old(DAYS, 10) == 0
    make_older(database_url, job_id, OLD)
    assert recovery.remove_old(DAYS, 10) == 1


def test_a_job_without_a_message_goes_by_its_own_age(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str
) -> None:
    discarded = ended(jobs, callbacks, database_url, delivery=CallbackState.DEAD)
    callbacks.discard(discarded)
    of_terminal = jobs.insert_claimed(quiet_task(), "me", LEASE)
    jobs.finish(of_terminal, DONE)
    assert recovery.remove_old(DAYS, 10) == 1
    assert stored(database_url) == {of_terminal.id}
    make_older(database_url, of_terminal.id, OLD)
    assert recovery.remove_old(DAYS, 10) == 1


def test_the_oldest_go_first_and_no_more_than_the_limit_at_once(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str
) -> None:
    dead = ended(jobs, callbacks, database_url, days_ago=500, delivery=CallbackState.DEAD)
    by_age = [ended(jobs, callbacks, database_url, days_ago=OLD + day) for day in range(5)]
    assert recovery.remove_old(DAYS, 2) == 2
    assert stored(database_url) == {dead, *by_age[:3]}
    assert [recovery.remove_old(DAYS, 2) for _ in range(3)] == [2, 1, 0]
    assert stored(database_url) == {dead}


def test_a_job_that_somebody_holds_is_passed_over(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database: Database, database_url: str
) -> None:
    held, free = (ended(jobs, callbacks, database_url) for _ in range(2))
    with database.connection() as connection:
        connection.execute("SELECT id FROM jobs WHERE id = %s FOR UPDATE", [held])
        assert recovery.remove_old(DAYS, 10) == 1
    assert stored(database_url) == {held}
    assert free not in stored(database_url)


def test_the_sweeper_removes_batch_after_batch_then_now_and_then_and_says_so(
    jobs: Jobs, callbacks: Callbacks, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for _ in range(5):
        ended(jobs, callbacks, database_url)
    monkeypatch.setattr(sweeping, "REMOVE_AT_ONCE", 2)
    with passing_time(database_url, monkeypatch) as world, captured_logs(monkeypatch, sweeping) as logs:
        sweeper = Instance(world, "here:1:00000001", Liveness(tmp_path / "owners"))
        for remaining in (3, 1, 0):
            world.live(1, sweeper)
            assert len(stored(database_url)) == remaining
        late = ended(world.jobs, Callbacks(world.database), database_url)
        world.live(60, sweeper)
        assert stored(database_url) == {late}
        world.pass_by(REMOVE_SECONDS)
        world.live(1, sweeper)
    assert stored(database_url) == set()
    told = [(line["jobs"], line["days"]) for line in logs if line["event"] == "removed_old"]
    assert told == [(2, DAYS), (2, DAYS), (1, DAYS), (1, DAYS)]


def test_how_long_is_kept_is_a_setting(
    jobs: Jobs, callbacks: Callbacks, recovery: Recovery, database_url: str, tmp_path: Path
) -> None:
    old, recent = ended(jobs, callbacks, database_url, days_ago=3), ended(jobs, callbacks, database_url, days_ago=1)
    owners = Liveness(tmp_path / "owners")
    Sweeper(recovery, owners, owner="here:1:00000001", lease_seconds=LEASE, retention_days=2).work([])
    assert old not in stored(database_url)
    assert recent in stored(database_url)
