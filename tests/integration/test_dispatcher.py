"""The dispatcher on real PostgreSQL with a `run` of the tests' own: it wakes, bounds, renews, recovers and drains."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pokestrator import dispatcher as dispatcher_module
from pokestrator import sweeping as sweeping_module
from pokestrator.dispatcher import Dispatcher
from pokestrator.errors import LeaseLost, StoreUnavailable
from pokestrator.intake import new_job
from pokestrator.jobs import Job, JobState, Outcome
from pokestrator.liveness import Liveness, owner_name
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.store.rows import WAKE_CHANNEL
from pokestrator.sweeping import Sweeper
from tests.integration.flow import eventually, job_row, rows

FAR = 1_000.0  # seconds: what polls this seldom acts only when it is woken
DONE = Outcome(JobState.SUCCEEDED, "Done.")

NOWHERE = Liveness(Path("/nowhere/owners"))  # no owner is known by its lock

Run = Callable[[Job], object]


class Listening:
    """Real LISTEN; `ready` is set once it listens."""

    def __init__(self, database: Database) -> None:
        self.ready = threading.Event()
        self._database = database

    def __call__(self, stop: threading.Event) -> Iterator[str]:
        for payload in self._database.notifications(WAKE_CHANNEL, stop):
            yield payload  # the first one wakes the dispatcher, too
            self.ready.set()


def deaf(stop: threading.Event) -> Iterator[str]:
    """Hears no NOTIFY."""
    stop.wait()
    yield from ()


@contextmanager
def dispatching(database: Database, run: Run, **changes: Any) -> Iterator[Dispatcher]:
    claims, heartbeats = database.line(), database.line()
    recovery, owner = Recovery(claims), owner_name()
    lease = dispatcher_module.LEASE_SECONDS
    parts: dict[str, Any] = {
        "owner": owner,
        "cancellations": recovery,
        "sweeper": Sweeper(recovery, NOWHERE, owner=owner, lease_seconds=lease, retention_days=30),
        "revive": lambda: None,
        "cancel_run": lambda run_id: None,
        "claims": Jobs(claims),
        "heartbeats": Jobs(heartbeats),
        "notifications": deaf,
        "statistics": lambda: None,
        "prepare": lambda: None,
        "run": run,
        "abort_runs": lambda: None,
        "concurrency": 2,
        "drain_seconds": 5,
        **changes,
    }
    dispatcher = Dispatcher(**parts)
    dispatcher.start()
    try:
        yield dispatcher
    finally:
        dispatcher.close()
        claims.close()
        heartbeats.close()


class Runs:
    """A `run` that holds each job until its gate is opened, then finishes it."""

    def __init__(self, jobs: Jobs, *, gate_open: bool = False) -> None:
        self.gate = threading.Event()
        if gate_open:
            self.gate.set()
        self.started: list[uuid.UUID] = []
        self.lost: list[uuid.UUID] = []
        self.most_at_once = 0
        self._aborted = False
        self._now = 0
        self._jobs = jobs
        self._changed = threading.Condition()

    def __call__(self, job: Job) -> None:
        with self._changed:
            self.started.append(job.id)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            self._changed.notify_all()
        try:
            assert self.gate.wait(30)
            if self._aborted:
                raise LeaseLost("ended because the instance is leaving")
            self._jobs.finish(job, DONE)
        except LeaseLost:
            self.lost.append(job.id)
            raise
        finally:
            with self._changed:
                self._now -= 1

    def abort(self) -> None:
        """End what runs without a result."""
        self._aborted = True
        self.gate.set()

    def wait_for(self, count: int, timeout: float = 10) -> bool:
        """Whether `count` runs have started within `timeout` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self.started) >= count, timeout)


@pytest.fixture
def never_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "POLL_SECONDS", FAR)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases of two seconds, and everything else in proportion."""
    for name, seconds in {"LEASE": 2.0, "HEARTBEAT": 0.3, "POLL": 0.05}.items():
        monkeypatch.setattr(dispatcher_module, f"{name}_SECONDS", seconds)
    for name, seconds in {"SWEEP": 0.1, "LOOK": 0.1}.items():
        monkeypatch.setattr(sweeping_module, f"{name}_SECONDS", seconds)


def insert(jobs: Jobs, count: int = 1) -> list[uuid.UUID]:
    made = [new_job(f"Task {number}") for number in range(count)]
    for job in made:
        jobs.insert(job)
    return [job.id for job in made]


def ended(url: str) -> int:
    return len(rows(url, "SELECT id FROM jobs WHERE state = 'succeeded'"))


# waking ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("never_polls")
def test_a_job_of_its_own_process_wakes_it_at_once(jobs: Jobs, database: Database, database_url: str) -> None:
    def has_ended(count: int) -> bool:
        return ended(database_url) == count

    runs = Runs(jobs, gate_open=True)
    with dispatching(database, runs) as dispatcher:
        # Several, since its start and the end of each run make it look by itself.
        for number in range(1, 6):
            insert(jobs)
            dispatcher.wake()
            assert runs.wait_for(number)
            assert eventually(partial(has_ended, number))


@pytest.mark.usefixtures("never_polls")
def test_a_job_that_another_instance_stored_wakes_it_by_notify(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    elsewhere = Database(database_url)
    elsewhere.open()
    runs, listening = Runs(jobs, gate_open=True), Listening(database)
    with dispatching(database, runs, notifications=listening):
        assert eventually(lambda: rows(database_url, "SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"))
        # Two, since the item that says that it listens may itself find the first.
        insert(Jobs(elsewhere))
        assert runs.wait_for(1)
        assert listening.ready.wait(5)
        insert(Jobs(elsewhere))
        assert runs.wait_for(2)
    elsewhere.close()


@pytest.mark.usefixtures("fast")
def test_the_poll_finds_what_no_wake_up_told(jobs: Jobs, database: Database) -> None:
    runs = Runs(jobs, gate_open=True)
    with dispatching(database, runs):
        insert(jobs)
        assert runs.wait_for(1)


@pytest.mark.usefixtures("never_polls")
def test_the_end_of_a_run_makes_room_for_the_next_at_once(jobs: Jobs, database: Database, database_url: str) -> None:
    runs = Runs(jobs, gate_open=True)
    made = insert(jobs, 7)
    with dispatching(database, runs, concurrency=1):
        assert runs.wait_for(7)
        assert eventually(lambda: ended(database_url) == 7)
    assert runs.started == made


# bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
def test_no_more_jobs_run_at_once_than_there_is_room_for(jobs: Jobs, database: Database, database_url: str) -> None:
    runs = Runs(jobs)
    insert(jobs, 9)
    with dispatching(database, runs, concurrency=3) as dispatcher:
        assert runs.wait_for(3)
        dispatcher.wake()
        assert not runs.wait_for(4, 0.3)
        assert len(rows(database_url, "SELECT id FROM jobs WHERE state = 'running'")) == 3
        assert len(rows(database_url, "SELECT id FROM jobs WHERE state = 'queued'")) == 6
        runs.gate.set()
        assert eventually(lambda: ended(database_url) == 9)
    assert runs.most_at_once == 3


@pytest.mark.usefixtures("fast")
def test_work_from_memory_takes_the_same_room_as_jobs(jobs: Jobs, database: Database) -> None:
    runs, gate, in_memory = Runs(jobs), threading.Event(), threading.Event()

    def work() -> None:
        in_memory.set()
        assert gate.wait(30)

    with dispatching(database, runs, concurrency=2) as dispatcher:
        assert dispatcher.submit_from_memory(work)
        assert in_memory.wait(5)
        insert(jobs, 2)
        assert runs.wait_for(1)
        assert not runs.wait_for(2, 0.3)
        assert not dispatcher.submit_from_memory(work)
        gate.set()
        assert runs.wait_for(2)
        runs.gate.set()


@pytest.mark.usefixtures("fast")
def test_a_run_that_raises_costs_only_itself(jobs: Jobs, database: Database, database_url: str) -> None:
    def run(job: Job) -> None:
        if job.id == first:
            raise ValueError("a fault of ours")
        jobs.finish(job, DONE)

    first, *_ = insert(jobs, 3)
    with dispatching(database, run, concurrency=1):
        assert eventually(lambda: ended(database_url) == 2)


# leases ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
def test_the_lease_of_a_long_run_is_renewed_and_nobody_takes_its_job(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    runs, others = Runs(jobs), Runs(jobs)
    [job_id] = insert(jobs)
    with dispatching(database, runs):
        assert runs.wait_for(1)
        first = job_row(database_url, job_id)["lease_until"]
        with dispatching(database, others):
            # Twice its lease, under the eyes of a sweeper.
            assert eventually(lambda: (job_row(database_url, job_id)["lease_until"] - first).total_seconds() > 4)
        runs.gate.set()
    row = job_row(database_url, job_id)
    assert (row["state"], row["claim_seq"], row["interruptions"]) == ("succeeded", 1, 0)
    assert others.started == []


@pytest.mark.usefixtures("fast")
def test_the_job_of_a_dead_owner_runs_again(
    jobs: Jobs, database: Database, database_url: str, history: History
) -> None:
    orphan = jobs.insert_claimed(new_job("An orphan"), "an owner that is gone", 0.1)
    runs = Runs(jobs, gate_open=True)
    with dispatching(database, runs):
        assert runs.wait_for(1)
        assert eventually(lambda: ended(database_url) == 1)
    row = job_row(database_url, orphan.id)
    assert (row["interruptions"], row["claim_seq"]) == (1, 2)
    assert [event.kind for event in history.timeline(orphan.id)] == [
        "accepted",
        "claimed",
        "interrupted",
        "claimed",
        "finished",
    ]


@pytest.mark.usefixtures("fast")
def test_the_first_sweep_waits_one_lease(jobs: Jobs, database: Database) -> None:
    # After an outage the owners of running jobs get this time to renew.
    jobs.insert_claimed(new_job("An orphan"), "an owner that may come back", 0.01)
    runs = Runs(jobs, gate_open=True)
    started = time.monotonic()
    with dispatching(database, runs):
        assert runs.wait_for(1)
    assert time.monotonic() - started >= 2.0


@pytest.mark.usefixtures("fast")
def test_a_run_that_lost_its_lease_ends_without_a_trace(jobs: Jobs, database: Database, database_url: str) -> None:
    runs = Runs(jobs)
    [job_id] = insert(jobs)
    with dispatching(database, runs, concurrency=1):
        assert runs.wait_for(1)
        rows(database_url, "UPDATE jobs SET claim_seq = claim_seq + 1, owner = 'another'")
        runs.gate.set()
        assert eventually(lambda: runs.lost == [job_id])
        assert job_row(database_url, job_id)["owner"] == "another"
        [next_id] = insert(jobs)
        assert eventually(lambda: job_row(database_url, next_id)["state"] == "succeeded")
        rows(database_url, "UPDATE jobs SET lease_until = now() + interval '1 hour' WHERE state = 'running'")


# the database is away ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
def test_a_job_claimed_here_again_is_kept_when_its_first_run_ends(
    jobs: Jobs, database: Database, database_url: str
) -> None:
    holds: list[threading.Event] = []
    begun = threading.Semaphore(0)

    def run(job: Job) -> None:
        gate = threading.Event()
        holds.append(gate)
        begun.release()
        assert gate.wait(30)
        jobs.finish(job, DONE)

    [job_id] = insert(jobs)
    with dispatching(database, run) as dispatcher:
        assert begun.acquire(timeout=10)
        # As if this instance had been cut off for a lease and another one had swept.
        rows(database_url, "UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL WHERE id = %s", job_id)
        dispatcher.wake()
        assert begun.acquire(timeout=10)
        holds[0].set()  # the first run ends, too late
        assert eventually(lambda: len(dispatcher._running) == 1)
        held = list(dispatcher._running.values())
        assert [(each.id, each.claim_seq) for each in held] == [(job_id, 2)]
        holds[1].set()
        assert eventually(lambda: job_row(database_url, job_id)["state"] == "succeeded")


def test_a_database_that_is_not_ready_is_tried_again(jobs: Jobs, database: Database) -> None:
    tries: list[float] = []

    def prepare() -> None:
        tries.append(time.monotonic())
        if len(tries) < 4:
            raise StoreUnavailable("connection refused")

    runs = Runs(jobs, gate_open=True)
    insert(jobs)
    with dispatching(database, runs, prepare=prepare) as dispatcher:
        assert runs.wait_for(1)
        assert eventually(lambda: dispatcher.database_error is None)
    assert len(tries) == 4


@pytest.mark.usefixtures("never_polls")
def test_until_the_database_is_ready_the_reason_can_be_read(jobs: Jobs, database: Database) -> None:
    def prepare() -> None:
        raise StoreUnavailable("connection refused")

    with dispatching(database, Runs(jobs), prepare=prepare) as dispatcher:
        assert dispatcher.database_error == "connection refused"


# drain -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast")
def test_a_drain_lets_runs_end_that_end_in_time(jobs: Jobs, database: Database, database_url: str) -> None:
    runs, aborted = Runs(jobs), threading.Event()
    [job_id] = insert(jobs)
    with dispatching(database, runs, drain_seconds=20, abort_runs=aborted.set) as dispatcher:
        assert runs.wait_for(1)
        dispatcher.request_drain()
        insert(jobs)
        assert not runs.wait_for(2, 0.3)  # nothing is claimed any more
        assert not dispatcher.submit_from_memory(lambda: None)
        assert not aborted.is_set()
        started = time.monotonic()
        runs.gate.set()
    assert time.monotonic() - started < 5
    row = job_row(database_url, job_id)
    assert (row["state"], row["claim_seq"]) == ("succeeded", 1)
    assert len(rows(database_url, "SELECT id FROM jobs WHERE state = 'queued'")) == 1


@pytest.mark.usefixtures("fast")
def test_what_a_drain_leaves_is_released_and_another_instance_takes_it(
    jobs: Jobs, database: Database, database_url: str, history: History
) -> None:
    leaving, staying = Runs(jobs), Runs(jobs, gate_open=True)
    [job_id] = insert(jobs)
    with dispatching(database, leaving, drain_seconds=0, abort_runs=leaving.abort):
        assert leaving.wait_for(1)
        with dispatching(database, staying, concurrency=1):
            assert staying.started == []
    # Both have closed: the inner one never saw a job that it could take.
    assert job_row(database_url, job_id)["state"] == "queued"
    with dispatching(database, staying, concurrency=1):
        assert staying.wait_for(1)
        assert eventually(lambda: ended(database_url) == 1)
    row = job_row(database_url, job_id)
    assert (row["claim_seq"], row["interruptions"]) == (2, 0)
    assert leaving.lost == [job_id]
    assert "released" in [event.kind for event in history.timeline(job_id)]


@pytest.mark.usefixtures("never_polls")
def test_a_release_wakes_the_other_instances(jobs: Jobs, database: Database) -> None:
    leaving, staying, listening = Runs(jobs), Runs(jobs, gate_open=True), Listening(database)
    with dispatching(database, leaving, drain_seconds=0, abort_runs=leaving.abort) as dispatcher:
        insert(jobs)
        dispatcher.wake()
        assert leaving.wait_for(1)
        with dispatching(database, staying, notifications=listening):
            # Listening is known by a NOTIFY that was heard.
            assert eventually(lambda: jobs.release([]) or listening.ready.is_set())
            dispatcher.close()
            assert staying.wait_for(1)


@pytest.mark.usefixtures("fast")
def test_a_drain_at_once_grants_no_time(jobs: Jobs, database: Database, database_url: str) -> None:
    runs = Runs(jobs)
    [job_id] = insert(jobs)
    with dispatching(database, runs, drain_seconds=1_000, abort_runs=runs.abort) as dispatcher:
        assert runs.wait_for(1)
        started = time.monotonic()
        dispatcher.request_drain(at_once=True)
    assert time.monotonic() - started < 5
    assert job_row(database_url, job_id)["state"] == "queued"


def test_close_leaves_no_thread(jobs: Jobs, database: Database) -> None:
    before = set(threading.enumerate())
    runs = Runs(jobs, gate_open=True)
    insert(jobs, 3)
    with dispatching(database, runs, notifications=Listening(database)):
        assert runs.wait_for(3)
        assert len(set(threading.enumerate()) - before) >= 4
    assert set(threading.enumerate()) - before == set()


def test_a_dispatcher_that_was_never_started_can_be_closed(jobs: Jobs, database: Database) -> None:
    before = set(threading.enumerate())
    recovery = Recovery(database)
    Dispatcher(
        owner="me",
        claims=jobs,
        heartbeats=jobs,
        cancellations=recovery,
        sweeper=Sweeper(recovery, NOWHERE, owner="me", lease_seconds=20, retention_days=30),
        notifications=deaf,
        statistics=lambda: None,
        prepare=lambda: None,
        revive=lambda: None,
        run=lambda job: None,
        cancel_run=lambda run_id: None,
        abort_runs=lambda: None,
        concurrency=1,
        drain_seconds=0,
    ).close()
    assert set(threading.enumerate()) == before
