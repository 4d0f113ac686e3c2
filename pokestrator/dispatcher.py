"""Claims queued jobs and runs each in a thread of its own; renews their leases; ends cancelled ones; drains.

Four threads besides the runs': `dispatch` claims, and has the sweeper look after others' orphans; `heartbeat` renews;
`listen` hears NOTIFY; `statistics` counts for the search. The first two use database connections of their own, so that
a busy pool never costs a lease. Wake-ups only save time; the poll guarantees.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from pokestrator.errors import LeaseLost, PokestratorError, StoreUnavailable
from pokestrator.jobs import Job
from pokestrator.store.jobs import Jobs
from pokestrator.store.recovery import Recovery
from pokestrator.sweeping import Sweeper
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

LEASE_SECONDS = 20.0
HEARTBEAT_SECONDS = 5.0
POLL_SECONDS = 1.0
RELEASE_SECONDS = 3.0  # a leaving instance has no time for a database that does not answer


class Dispatcher:
    """One instance's hands.

    `run` takes a claimed job to its end, `cancel_run` ends a run by its id; `prepare` makes the database ready for use,
    `revive` may start it again when it is away; `statistics` is called each second.
    """

    def __init__(
        self,
        *,
        owner: str,
        claims: Jobs,
        heartbeats: Jobs,
        cancellations: Recovery,
        sweeper: Sweeper,
        notifications: Callable[[threading.Event], Iterator[str]],
        statistics: Callable[[], None],
        prepare: Callable[[], None],
        revive: Callable[[], None],
        run: Callable[[Job], object],
        cancel_run: Callable[[str], None],
        abort_runs: Callable[[], None],
        concurrency: int,
        drain_seconds: float,
    ) -> None:
        self._owner = owner
        self._claims, self._heartbeats = claims, heartbeats
        self._cancellations = cancellations
        self._sweeper = sweeper
        self._notifications, self._statistics = notifications, statistics
        self._prepare, self._revive = prepare, revive
        self._run_job, self._cancel_run = run, cancel_run
        self._abort_runs = abort_runs
        self._concurrency, self._drain_seconds = concurrency, drain_seconds
        self._wake, self._stop = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        # By claim, not by job: a job whose lease was lost can be claimed here again while its first run still ends.
        self._running: dict[tuple[uuid.UUID, int], Job] = {}
        self._from_memory = 0
        self._draining, self._prepared = False, False
        self._drain_from = 0.0  # when it was asked for
        self._lost_at: float | None = None  # when the database was first found away
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="job")
        self._threads = [
            threading.Thread(target=self._dispatch, name="dispatch", daemon=True),
            threading.Thread(target=self._forever, args=(self._heartbeat,), name="heartbeat", daemon=True),
            threading.Thread(target=self._forever, args=(self._listen,), name="listen", daemon=True),
            threading.Thread(target=self._forever, args=(self._count,), name="statistics", daemon=True),
        ]
        self._reviver = threading.Thread()  # one that never ran
        self.database_error: str | None = "not connected yet"
        self.leaves_runs = False  # the rows of some runs could not be given back

    # boot ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Make the database ready (tried once here, then again and again in the background) and begin to claim."""
        self._reach_database()
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """A job was just queued in this process."""
        self._wake.set()

    def submit_from_memory(self, work: Callable[[], None]) -> bool:
        """Run something that is not in the database, if a slot is free."""
        with self._lock:
            if self._draining or len(self._running) + self._from_memory >= self._concurrency:
                return False
            self._from_memory += 1
        if self._submit(self._do_from_memory, work):
            return True
        with self._lock:
            self._from_memory -= 1
        return False

    def _submit(self, work: Callable[..., object], *arguments: object) -> bool:
        begun = threading.Lock()  # an executor without a thread for it keeps the work, and would begin it later
        try:
            self._executor.submit(lambda: begun.acquire(blocking=False) and work(*arguments))
        except RuntimeError as error:  # the machine has no thread left for us
            log.error("no_thread", reason=str(error))
            return not begun.acquire(blocking=False)
        return True

    # drain -----------------------------------------------------------------------------------------------------

    def request_drain(self, *, at_once: bool = False) -> None:
        """Claim no more; `at_once` grants running jobs no time. Safe in a signal handler: it only sets flags."""
        if at_once:
            self._drain_seconds = 0.0
        if not self._draining:
            self._drain_from = time.monotonic()
        self._draining = True

    def drain_left(self) -> float:
        """Seconds of the drain time that are left, at least 0."""
        return max(0.0, self._drain_from + self._drain_seconds - time.monotonic())

    def close(self) -> None:
        """Let runs end for the drain time, release what is left, end the threads."""
        self.request_drain()
        self._wake.set()
        if self._threads[0].ident is None:  # never started
            return
        for thread in self._threads:
            thread.join()
        self._executor.shutdown(wait=True)

    def _drain(self) -> None:
        log.info("draining", running=len(self._running), seconds=self._drain_seconds)
        while self._is_busy() and (left := self.drain_left()) > 0:
            self._wake.clear()
            self._cancel_while_draining(min(left, POLL_SECONDS))
            if self._is_busy():
                self._wake.wait(min(left, POLL_SECONDS))
        left_over = self._held()
        self._stop.set()
        try:
            self._abort_runs()  # first, so that no job runs here and elsewhere at once
        except Exception:
            log.exception("abort_failed")
        if left_over:
            self._release(left_over)

    def _cancel_while_draining(self, seconds: float) -> None:
        try:
            self._cancel(self._held(), seconds)
        except Exception:  # whatever it is, what is left has to be released
            log.exception("cancel_failed")

    def _release(self, jobs: list[Job]) -> None:
        try:
            released = self._claims.release(jobs, within=RELEASE_SECONDS)
            log.info("released", request_ids=[str(job_id) for job_id in released])
        except Exception:
            log.exception("release_failed")
            self.leaves_runs = True  # others take them from us, as from the dead

    def _held(self) -> list[Job]:
        with self._lock:
            return list(self._running.values())

    def _is_busy(self) -> bool:
        with self._lock:
            return bool(self._running or self._from_memory)

    # the threads -----------------------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        while not self._draining:
            self._wake.clear()
            try:
                if self._reach_database():
                    self._work()
            except StoreUnavailable as error:
                self._lost_database(str(error))
            except Exception as error:
                log.exception("dispatch_failed")  # this thread must outlive every fault
                self._lost_database(f"{type(error).__name__}")
            if self.database_error is not None and not self._draining and not self._reviver.is_alive():
                # In a thread of its own: a start can take a minute, and a drain cannot.
                self._reviver = threading.Thread(target=self._try_to_revive, name="revive", daemon=True)
                self._reviver.start()
            self._wake.wait(POLL_SECONDS)
        self._drain()

    def _reach_database(self) -> bool:
        if self._prepared:
            return True
        try:
            self._prepare()
        except PokestratorError as error:
            if self.database_error != str(error):
                log.error(f"database init failed: {error}")
            self.database_error = str(error)
            return False
        self._prepared = True
        log.info("PostgreSQL initialized and subagents table is ready")
        return True

    def _lost_database(self, reason: str) -> None:
        if self.database_error is None:
            log.error("database_lost", reason=reason)
            self._lost_at = time.monotonic()
        self.database_error = reason

    def _try_to_revive(self) -> None:
        try:
            self._revive()
        except StoreUnavailable as error:
            log.warning("revive_failed", reason=str(error))
        except Exception:
            log.exception("revive_failed")  # this thread must outlive every fault

    def _work(self) -> None:
        free = self._free()
        # After an outage even a full instance asks, to notice the end of it.
        jobs = self._claims.claim(self._owner, LEASE_SECONDS, free) if free > 0 or self.database_error else []
        if self._draining:
            if jobs:
                self._release(jobs)
            return
        for job in jobs:
            self._begin(job)
        held = self._held()
        if self.database_error is not None:
            self._recovered(held)
        self._cancel(held)
        if not self._draining:
            self._sweeper.work(held)

    def _begin(self, job: Job) -> None:
        with self._lock:
            self._running[job.id, job.claim_seq] = job
        if not self._submit(self._run, job):
            with self._lock:
                self._running.pop((job.id, job.claim_seq), None)
            self._release([job])

    def _free(self) -> int:
        with self._lock:
            return max(0, self._concurrency - len(self._running) - self._from_memory)

    def _recovered(self, held: list[Job]) -> None:
        away = float("inf") if self._lost_at is None else time.monotonic() - self._lost_at
        self._sweeper.database_back(away, held)
        if self._lost_at is not None:
            log.info("database_back", seconds=round(away, 1))
        self.database_error = self._lost_at = None

    def _cancel(self, held: list[Job], within: float | None = None) -> None:
        wanted = self._cancellations.to_cancel(self._owner, within) if held else ()
        for job in held:
            if job.id in wanted:
                self._cancel_run(job.run_id)

    def _run(self, job: Job) -> None:
        try:
            self._run_job(job)
        except LeaseLost as error:
            log.warning("lease_lost", request_id=str(job.id), reason=str(error))
        except Exception:
            log.exception("run_failed", request_id=str(job.id))
        finally:
            with self._lock:
                self._running.pop((job.id, job.claim_seq), None)
            self._wake.set()

    def _do_from_memory(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.exception("run_failed", durable=False)
        finally:
            with self._lock:
                self._from_memory -= 1
            self._wake.set()

    def _forever(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                work()
            except StoreUnavailable as error:
                log.debug("database_unreachable", thread=threading.current_thread().name, reason=str(error))
            except Exception:
                log.exception("thread_failed")  # this thread must outlive every fault
            self._stop.wait(POLL_SECONDS)

    def _heartbeat(self) -> None:
        while True:
            held = self._held()
            kept = self._heartbeats.renew(held, LEASE_SECONDS) if held else set()
            for job in held:
                claim = job.id, job.claim_seq
                if claim not in kept and claim in self._running:
                    log.warning("lease_lost", request_id=str(job.id), reason="not renewed; its run is ended")
                    self._cancel_run(job.run_id)
            if self._stop.wait(HEARTBEAT_SECONDS):
                return

    def _count(self) -> None:
        if self._prepared:
            self._statistics()

    def _listen(self) -> None:
        for _ in self._notifications(self._stop):
            self._wake.set()
