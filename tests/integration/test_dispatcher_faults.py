"""The dispatcher when something around it fails: it keeps its runs, its cancellations and its leave in order."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from pokestrator import dispatcher as dispatcher_module
from pokestrator.errors import StoreUnavailable
from pokestrator.intake import Action, Question
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.sweeping import Sweeper
from tests.integration.flow import eventually, job_row
from tests.integration.test_dispatcher import NOWHERE, Runs, dispatching, insert


class Unkept(Recovery):
    """A database that cannot remove what is old: too much of it, or too slow a disk."""

    tries = 0

    def remove_old(self, days: int, limit: int) -> int:
        type(self).tries += 1
        raise StoreUnavailable("canceling statement due to statement timeout", is_busy=True)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "POLL_SECONDS", 0.05)


def cancelled(history: History, job_id: Any) -> None:
    assert history.answer(Question(Action.CANCEL, job_id, None)) is not None


def test_a_running_job_that_was_cancelled_has_its_run_ended(jobs: Jobs, history: History, database: Database) -> None:
    runs, ended = Runs(jobs), threading.Event()
    [job_id] = insert(jobs)

    def cancel_run(run_id: str) -> None:
        assert run_id == f"{job_id}:1"
        ended.set()

    with dispatching(database, runs, cancel_run=cancel_run):
        assert runs.wait_for(1)
        cancelled(history, job_id)
        assert ended.wait(20)
        runs.gate.set()


def test_upkeep_that_fails_costs_no_cancellation_and_is_no_lost_database(
    jobs: Jobs, history: History, database: Database
) -> None:
    runs, ended = Runs(jobs), threading.Event()
    line = database.line()
    sweeper = Sweeper(Unkept(line), NOWHERE, owner="me", lease_seconds=20, retention_days=30)
    [job_id] = insert(jobs)
    with dispatching(database, runs, sweeper=sweeper, cancel_run=lambda run_id: ended.set()) as dispatcher:
        assert runs.wait_for(1)
        assert eventually(lambda: Unkept.tries)
        cancelled(history, job_id)
        assert ended.wait(20)
        assert dispatcher.database_error is None
        runs.gate.set()
    assert Unkept.tries == 1  # it has time
    line.close()


def test_a_job_for_which_there_is_no_thread_is_given_back_and_runs_later(
    jobs: Jobs, database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(jobs, gate_open=True)
    with dispatching(database, runs) as dispatcher:
        submit, refused = dispatcher._executor.submit, []

        def refuse_once(*arguments: Any) -> Any:
            if not refused:
                refused.append(arguments)
                raise RuntimeError("can't start new thread")
            return submit(*arguments)

        monkeypatch.setattr(dispatcher._executor, "submit", refuse_once)
        [job_id] = insert(jobs)
        assert eventually(lambda: job_row(database_url, job_id)["state"] == "succeeded")
    row = job_row(database_url, job_id)
    assert (row["claim_seq"], row["interruptions"]) == (2, 0)


def test_work_that_was_refused_for_want_of_a_thread_is_never_done(
    jobs: Jobs, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, refused, done, ended = threading.Thread.start, [], [], threading.Event()

    def second() -> None:
        done.append("second")
        ended.set()

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name.startswith("job") and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    with dispatching(database, Runs(jobs)) as dispatcher:
        monkeypatch.setattr(threading.Thread, "start", refuse_once)
        assert not dispatcher.submit_from_memory(lambda: done.append("first"))  # its caller tries again
        assert dispatcher.submit_from_memory(second)
        assert ended.wait(20)
    assert done == ["second"]


def test_the_drain_time_counts_from_the_signal(jobs: Jobs, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # The dispatch thread is held up, as by a database that does not answer, and sees the signal late.
    runs, held_up, go_on = Runs(jobs), threading.Event(), threading.Event()
    insert(jobs)
    with dispatching(database, runs, drain_seconds=4, abort_runs=runs.abort) as dispatcher:
        assert runs.wait_for(1)

        def hang(*_: Any) -> None:
            held_up.set()
            assert go_on.wait(30)

        monkeypatch.setattr(dispatcher._sweeper, "work", hang)
        assert held_up.wait(20)
        dispatcher.request_drain()
        threading.Event().wait(4)  # all of the drain time
        go_on.set()
        started = time.monotonic()
    assert time.monotonic() - started < 3.5


def test_whatever_goes_wrong_while_it_drains_what_is_left_is_released(
    jobs: Jobs, database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Runs(jobs)

    def broken(*_: Any) -> None:
        raise OSError("too many open files")

    def abort() -> None:
        runs.abort()
        raise OSError("too many open files")

    [job_id] = insert(jobs)
    with dispatching(database, runs, drain_seconds=0.5, abort_runs=abort) as dispatcher:
        assert runs.wait_for(1)
        monkeypatch.setattr(dispatcher._cancellations, "to_cancel", broken)
    row = job_row(database_url, job_id)
    assert (row["state"], row["interruptions"]) == ("queued", 0)
    assert not dispatcher.leaves_runs
