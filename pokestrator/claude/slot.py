"""A slot's process, as seen from inside: one run at a time, and nothing left behind.

Light to import: the SDK comes with worker.py, once the process can already look after itself.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from pokestrator.claude import folders, processes
from pokestrator.claude.confinement import Confinement
from pokestrator.redaction import Redactor
from pokestrator.runs import RunEvent, RunRequest, RunResult
from pokestrator.telemetry import configure_logging, log_uncaught_errors

_LEAVE = signal.SIGUSR1


class _Slot:
    """This process's slot; there is one, made by `settle`."""

    def __init__(self, events: Connection, environment: Mapping[str, str], confinement: Confinement) -> None:
        self.environment = environment
        self.confinement = confinement
        self.redactor = Redactor()
        self.folder: Path | None = None
        self._events = events
        self._room = select.poll()
        self._room.register(events.fileno(), select.POLLOUT)

    def send(self, event: RunEvent) -> None:
        """Tell the parent, unless it is so far behind that we would have to wait: a timeline may have gaps."""
        if self._room.poll(0):
            self._events.send(event)

    def end_of_events(self) -> None:
        self._events.send(None)

    def leave(self, *_: int | FrameType | None) -> None:
        """End everything this process has started, and the process. Runs in the main thread, which starts them."""
        processes.kill_descendants()
        if self.folder is not None:
            with suppress(OSError):  # our parent may have been quicker
                folders.remove(self.folder)
        os._exit(0)


_slot: _Slot | None = None


def settle(lifeline: Connection, events: Connection, environment: Mapping[str, str], confinement: Confinement) -> None:
    """Make this process a slot: ends with its parent, whatever happens to it; not by signals meant for the parent.

    The parent holds the only other end of `lifeline` and never writes to it.
    """
    global _slot  # noqa: PLW0603 - an executor's initializer has no other place to leave things for its jobs
    os.setsid()  # away from the terminal's and the service's process group: Ctrl-C is the parent's to answer
    _settle_signals()
    processes.become_subreaper()
    processes.hide_memory()
    for connection in (lifeline, events):
        os.set_inheritable(connection.fileno(), False)
    _slot = _Slot(events, environment, confinement)
    signal.signal(_LEAVE, _slot.leave)
    threading.Thread(target=_watch, args=(lifeline,), name="lifeline", daemon=True).start()
    configure_logging("WARNING", redact=_slot.redactor)
    log_uncaught_errors()
    logging.getLogger("claude_agent_sdk").setLevel(logging.CRITICAL)  # what it would say is in the run's result
    import pokestrator.claude.worker  # noqa: F401 - half a second that no run has to wait


def warm() -> int:
    """A job that ends once the slot is ready for runs; returns its pid."""
    return os.getpid()


def run(request: RunRequest, folder: str, deadline: float) -> RunResult:
    """One run; see worker.run. Returns when no process of the run is left."""
    from pokestrator.claude import worker

    assert _slot is not None, "settle() comes first"
    _slot.folder = Path(folder)
    end_all, never = processes.kill_descendants, lambda: False  # a slot whose run must end is killed itself
    try:
        with _slot.redactor.also(request.variables.values()):
            return worker.run(
                request, _slot.environment, _slot.confinement, _slot.folder, deadline, end_all, _slot.send, never
            )
    finally:
        processes.reap()
        _slot.folder = None
        _slot.end_of_events()


def _settle_signals() -> None:
    """Nothing inherited from the parent's threads; a handler, since what is ignored would be ignored by agents too."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGCHLD, signal.SIGQUIT, signal.SIGALRM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def _watch(lifeline: Connection) -> None:
    lifeline.poll(None)  # nothing is ever sent: the parent has closed its end, or is gone
    signal.pthread_kill(threading.main_thread().ident or 0, _LEAVE)
