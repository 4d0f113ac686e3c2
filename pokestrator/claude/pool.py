"""Claude as the service sees it: a call that blocks until the run has ended, and leaves no process behind.

Slots runs each request in one of N warm processes of its own; Inline runs it in the caller's thread.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any, Protocol

from pokestrator.claude import processes, slot
from pokestrator.claude.outcomes import failure
from pokestrator.claude.processes import Process
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

OnEvent = Callable[[RunEvent], None]

GRACE = 0.5  # seconds after a run's deadline in which its slot must have ended it, or is killed
LEAVE_SECONDS = 1.0  # that a slot gets to end its run and itself when it is closed

_STOPPING = "the service is stopping"


class Claude(Protocol):
    """Runs requests. Thread-safe."""

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        """Run `request`, telling `on_event` what happens, in the caller's thread. Every failure is a result."""

    def close(self) -> None:
        """End all runs; they and later ones return AGENT_CRASHED. No process is left."""


class Slots:
    """`size` agent slots. `environment` is all that agents may see of ours. Nothing is started before start()."""

    def __init__(self, size: int, environment: Mapping[str, str]) -> None:
        if size < 1:
            raise ValueError(f"size={size}: at least one slot is needed")
        self._slots = [_Slot(dict(environment)) for _ in range(size)]
        self._free = list(self._slots)
        self._changed = threading.Condition()
        self._closed = False

    def start(self) -> None:
        """Start all slots' processes; they warm up on their own. Makes this process a child subreaper."""
        processes.become_subreaper()
        for each in self._slots:
            each.start()

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        deadline = time.monotonic() + request.timeout_seconds
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed, request.timeout_seconds)
            if self._closed:
                return failure(ErrorKind.AGENT_CRASHED, _STOPPING)
            if not self._free:
                return failure(ErrorKind.TIMEOUT, f"no slot was free in {request.timeout_seconds:g} s")
            chosen = self._free.pop()
        try:
            return chosen.run(request, deadline, on_event)
        finally:
            with self._changed:
                # One that was just replaced is still warming up: let the others go first.
                self._free.insert(len(self._free) if chosen.is_warm else 0, chosen)
                self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for each in self._slots:
            each.hang_up()
        for each in self._slots:
            each.close()


class _Slot:
    """One process with one run at a time, replaced when it dies. Only close() may come from a second thread."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._lock = threading.Lock()  # held while the process is exchanged or ended
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._process: Process | None = None
        self._lifeline: Connection | None = None
        self._events: Connection | None = None
        self._warmed: Future[int] | None = None
        self._run: tuple[str, float] | None = None  # the mark of the run that goes on, and when it began

    @property
    def is_warm(self) -> bool:
        return self._warmed is not None and self._warmed.done()

    def start(self) -> None:
        """Start the process unless it runs or the slot is closed."""
        with self._lock:
            if self._closed or self._is_alive():
                return
            self._discard()
            context = _Context()
            hears, self._lifeline = context.Pipe(duplex=False)
            self._events, tells = context.Pipe(duplex=False)
            self._executor = ProcessPoolExecutor(1, context, slot.settle, (hears, tells, self._environment))
            with _bare_main():
                self._warmed = self._executor.submit(slot.warm)
            # The slot holds these alone now, so that its death is an end of file here.
            hears.close()
            tells.close()
            assert context.started is not None and context.started.pid is not None
            self._process = processes.look_up(context.started.pid)

    def run(self, request: RunRequest, deadline: float, on_event: OnEvent) -> RunResult:
        self.start()
        with _folder() as folder:
            self._run = folder.name, processes.now()
            result = None
            try:
                result = self._attend(request, folder, deadline, on_event)
            finally:
                if result is None:
                    self._replace()
                self._run = None
        if result is not None:
            return result
        if self._closed:
            return failure(ErrorKind.AGENT_CRASHED, _STOPPING)
        if time.monotonic() >= deadline:
            return failure(ErrorKind.TIMEOUT, f"no result after {request.timeout_seconds:g} s; its slot did not answer")
        return failure(ErrorKind.AGENT_CRASHED, "the agent's slot died")

    def _attend(self, request: RunRequest, folder: Path, deadline: float, on_event: OnEvent) -> RunResult | None:
        """The run's result; None when the slot died or did not answer in time."""
        executor, events = self._executor, self._events
        if executor is None or events is None:
            return None
        backstop = deadline + GRACE

        def left() -> float:
            return max(0.0, backstop - time.monotonic())

        try:
            future = executor.submit(slot.run, request, str(folder), deadline)
            while wait([events], left()):
                event: RunEvent | None = events.recv()
                if event is None:
                    return _result_of(future, max(left(), GRACE))
                if time.monotonic() < deadline:  # a slow listener must not hold a run beyond its end
                    _tell(on_event, event)
        except (EOFError, OSError, BrokenProcessPool) as error:
            if not self._closed:
                log.warning("slot_lost", error=repr(error))
        return None

    def _replace(self) -> None:
        with self._lock:
            self._kill()
        self.start()

    def hang_up(self) -> None:
        """Tell the process to end its run and itself; does not wait."""
        with self._lock:
            self._closed = True
            if self._lifeline is not None:
                self._lifeline.close()

    def close(self) -> None:
        """Wait for a process that was hung up on, or end it the hard way."""
        with self._lock:
            if self._process is not None:
                processes.await_exit(self._process, LEAVE_SECONDS)
            self._kill()
            self._discard()

    def _is_alive(self) -> bool:
        if self._process is None:
            return False
        current = processes.look_up(self._process.pid)
        return current is not None and current.alive and current.identity == self._process.identity

    def _kill(self) -> None:
        """End the process and what it has started, which becomes our child: this process is a subreaper."""
        if self._process is None:
            return
        own = self._process
        suspects = processes.descendants(own.pid) if self._is_alive() else []
        processes.kill(lambda: [own] if self._is_alive() else [])
        if self._run is not None:
            mark, since = self._run
            left = processes.kill(lambda: processes.strays(mark, since, suspects, _bystanders()))
            if left:
                log.error("processes_left", pids=[process.pid for process in left])
            processes.reap_orphans(since, {own.pid, *_bystanders()})
        self._process = None

    def _discard(self) -> None:
        """Let go of a dead process's executor and pipes."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
        for connection in (self._lifeline, self._events):
            if connection is not None:
                connection.close()
        self._lifeline = self._events = None


class Inline:
    """Runs in the caller's own thread and process, one at a time: for a debugger, or a single run at a terminal.

    While a run goes on, `environment` is this whole process's environment.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._turn = threading.Lock()
        self._closed = False
        self._kill: Callable[[], object] = list

    def run(self, request: RunRequest, on_event: OnEvent) -> RunResult:
        from pokestrator.claude import worker  # the SDK is half a second and 60 MB that a service with slots can save

        deadline = time.monotonic() + request.timeout_seconds
        if not self._turn.acquire(timeout=request.timeout_seconds):
            return failure(ErrorKind.TIMEOUT, f"another run took all of {request.timeout_seconds:g} s")
        try:
            if self._closed:
                return failure(ErrorKind.AGENT_CRASHED, _STOPPING)
            processes.become_subreaper()
            since = processes.now()
            with _folder() as folder:
                self._kill = lambda: processes.kill(
                    lambda: processes.strays(folder.name, since, bystanders=_bystanders())
                )
                result = worker.run(
                    request, self._environment, folder, deadline, self._kill, lambda event: _tell(on_event, event)
                )
                processes.reap_orphans(since, _bystanders())
        finally:
            self._kill = list
            self._turn.release()
        return failure(ErrorKind.AGENT_CRASHED, _STOPPING, result.usage) if self._closed and result.error else result

    def close(self) -> None:
        self._closed = True
        self._kill()


class _Context(SpawnContext):
    """Starts processes as "spawn" does, and keeps the one it has started."""

    started: SpawnProcess | None = None

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]
        self.started = SpawnProcess(*args, **kwargs)
        return self.started


@contextmanager
def _bare_main() -> Iterator[None]:
    """Spawned processes run the main module's file again; a slot needs nothing of gunicorn or of the command line."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for one run, closed to other users; its name is the run's mark."""
    folder = tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True)
    try:
        yield Path(folder.name)
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # an agent can nest folders deeper than Python recurses
            log.error("folder_left", folder=folder.name)


def _bystanders() -> set[int]:
    """Processes that this one has started by multiprocessing, slots among them: never strays of a run."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def _tell(on_event: OnEvent, event: RunEvent) -> None:
    try:
        on_event(event)
    except Exception:
        log.exception("event_lost", kind=event.kind)


def _result_of(future: Future[RunResult], timeout: float) -> RunResult:
    """The result of a job that has ended. Raises BrokenProcessPool when its process died, TimeoutError."""
    error = future.exception(timeout)
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise error
    log.error("run_broke", exc_info=error)
    return failure(ErrorKind.INTERNAL, repr(error))
