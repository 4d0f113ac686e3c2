"""A slot as its parent sees it: a process that is started, given one run at a time, and replaced when it dies."""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

from pokestrator.claude import processes, slot
from pokestrator.claude.calls import Call
from pokestrator.claude.folders import run_folder
from pokestrator.claude.outcomes import failure
from pokestrator.claude.probing import probe
from pokestrator.claude.processes import Process
from pokestrator.runs import ErrorKind, RunEvent, RunResult
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

GRACE = 0.5  # seconds after a run's deadline in which its slot must have ended it, or is killed
LEAVE_SECONDS = 1.0  # that a slot gets to end its run and itself when it is closed


@dataclass(frozen=True)
class _Run:
    """What the process works on: `mark` names the run's processes, `since` is when it began (processes.now())."""

    call: Call
    mark: str
    since: float


class SlotProcess:
    """One process with one run at a time. end(), hang_up() and close() may come from other threads than run()."""

    def __init__(self, environment: Mapping[str, str], *, all_tools: bool = False) -> None:
        self._environment = environment
        self._all_tools = all_tools
        self._lock = threading.Lock()  # held while the process or its run is exchanged or ended
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._process: Process | None = None
        self._lifeline: Connection | None = None
        self._events: Connection | None = None
        self._warmed: Future[int] | None = None
        self._run: _Run | None = None

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
            given = (hears, tells, self._environment, probe(all_tools=self._all_tools))
            self._executor = ProcessPoolExecutor(1, context, slot.settle, given)
            with _bare_main():
                self._warmed = self._executor.submit(slot.warm)
            # The slot holds these alone now, so that its death is an end of file here.
            hears.close()
            tells.close()
            assert context.started is not None and context.started.pid is not None
            self._process = processes.look_up(context.started.pid)

    def run(self, call: Call) -> RunResult:
        """Run a call's request to its end; one that is told to end before it has begun is not begun."""
        self.start()
        with run_folder() as folder:
            result = None
            if self._begin(call, folder):
                try:
                    result = self._attend(call, folder)
                finally:
                    self._leave(replace=result is None)
        if result is not None:
            return result
        if ended := call.ended():
            return ended
        if time.monotonic() >= call.deadline:
            seconds = f"{call.request.timeout_seconds:g} s"
            return failure(ErrorKind.TIMEOUT, f"no result after {seconds}; its slot did not answer")
        return failure(ErrorKind.AGENT_CRASHED, "the agent's slot died")

    def end(self, call: Call) -> None:
        """Kill the process if it runs this call, which must have been told to end; run() does the rest."""
        with self._lock:
            if self._run is not None and self._run.call is call:
                self._kill_process()

    def _begin(self, call: Call, folder: Path) -> bool:
        """From now on end() finds the call here; one that came earlier has left its reason in the call."""
        with self._lock:
            if call.end_reason:
                return False
            self._run = _Run(call, folder.name, processes.now())
            return True

    def _leave(self, *, replace: bool) -> None:
        """The run is over; with `replace` so are its process and all that it has left."""
        with self._lock:
            if replace:
                self._kill()
            self._run = None
        self.start()

    def _attend(self, call: Call, folder: Path) -> RunResult | None:
        """The run's result; None when the slot died or did not answer in time."""
        executor, events = self._executor, self._events
        if executor is None or events is None:
            return None
        backstop = call.deadline + GRACE

        def left() -> float:
            return max(0.0, backstop - time.monotonic())

        try:
            future = executor.submit(slot.run, call.request, str(folder), call.deadline)
            while wait([events], left()):
                event: RunEvent | None = events.recv()
                if event is None:
                    return _result_of(future, max(left(), GRACE))
                # A slow listener must not hold a run beyond its end.
                if time.monotonic() < call.deadline and not call.end_reason:
                    call.tell(event)
        except (EOFError, OSError, BrokenProcessPool) as error:
            if not call.end_reason:
                log.warning("slot_lost", error=repr(error))
        return None

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
        self._kill_process()
        if self._run is not None:
            mark, since = self._run.mark, self._run.since
            left = processes.kill(lambda: processes.strays(mark, since, suspects, processes.bystanders()))
            if left:
                log.error("processes_left", pids=[process.pid for process in left])
            processes.reap_orphans(since, {own.pid, *processes.bystanders()})
        self._process = None

    def _kill_process(self) -> None:
        processes.kill(lambda: [self._process] if self._process and self._is_alive() else [])

    def _discard(self) -> None:
        """Let go of a dead process's executor and pipes."""
        if self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
        for connection in (self._lifeline, self._events):
            if connection is not None:
                connection.close()
        self._lifeline = self._events = None


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


def _result_of(future: Future[RunResult], timeout: float) -> RunResult:
    """The result of a job that has ended. Raises BrokenProcessPool when its process died, TimeoutError."""
    error = future.exception(timeout)
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        raise error
    log.error("run_broke", exc_info=error)
    return failure(ErrorKind.INTERNAL, repr(error))
