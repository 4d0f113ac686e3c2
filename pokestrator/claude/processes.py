"""Process trees on Linux: what descends from whom, and ending all of it.

Commands of an agent live in sessions of their own and can clear their environment, so neither process groups nor
names find them all. A child subreaper does: whatever its descendants leave behind becomes its child again.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import select
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

MARK = "POKESTRATOR_RUN"  # names the run in the environment of its processes

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36
_TICKS = os.sysconf("SC_CLK_TCK")
_AT_ONCE = 200  # processes that are ended in one go, each with an open descriptor


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it. `started` is in seconds after boot; with the pid it identifies the process."""

    pid: int
    parent: int
    session: int
    started: float
    alive: bool

    @property
    def identity(self) -> tuple[int, float]:
        return self.pid, self.started


def become_subreaper() -> None:
    """From now on, orphans among this process's descendants become its children. Raises OSError."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """Close /proc/<this process>/environ and mem to others of the same user (not to root)."""
    _prctl(_PR_SET_DUMPABLE, 0)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def now() -> float:
    """Seconds after boot, the clock of `Process.started`."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def look_up(pid: int) -> Process | None:
    """The process with this pid, dead but unreaped ones included; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field is the name in parentheses, which may itself hold blanks and parentheses.
    fields = stat.rpartition(")")[2].split()
    # A process whose first thread has ended looks like a zombie while its other threads run on.
    dead = fields[0] in "ZX" and int(fields[17]) <= 1
    return Process(pid, int(fields[1]), int(fields[3]), int(fields[19]) / _TICKS, not dead)


def all_processes() -> dict[int, Process]:
    found = (look_up(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())  # noqa: PTH208
    return {process.pid: process for process in found if process is not None}


def threads_of(user: int) -> int:
    """How many threads a user has on this machine, as RLIMIT_NPROC counts them."""
    total = 0
    for entry in os.listdir("/proc"):  # noqa: PTH208
        if entry.isdigit():
            with suppress(OSError):  # it has just ended
                status = Path(f"/proc/{entry}/status").read_text(errors="replace")
                fields = dict(re.findall(r"^(Uid|Threads):\s+(\d+)", status, re.M))
                total += int(fields["Threads"]) if int(fields["Uid"]) == user else 0
    return total


def below(roots: Iterable[int], table: Mapping[int, Process]) -> list[Process]:
    """All descendants of `roots` in `table`, dead ones included, without the roots themselves."""
    children = defaultdict(list)
    for process in table.values():
        children[process.parent].append(process)
    found: dict[int, Process] = {}
    todo = list(roots)
    while todo:
        for child in children[todo.pop()]:
            if child.pid not in found:
                found[child.pid] = child
                todo.append(child.pid)
    return list(found.values())


def descendants(pid: int | None = None) -> list[Process]:
    """What is alive below `pid` (default: this process)."""
    return [process for process in below([pid or os.getpid()], all_processes()) if process.alive]


def strays(
    mark: str, since: float, suspects: Collection[Process] = (), bystanders: Collection[int] = ()
) -> list[Process]:
    """What is alive of a run that has no subreaper of its own any more, or never had one.

    `mark` is the run's MARK value, `since` when it began (`now()`), `suspects` are processes seen below it before, and
    `bystanders` are pids of this process's own children. An orphan that cleared its environment is known by this:
    it is our child, younger than the run, and in a session that is not ours.
    """
    table = all_processes()
    seen = {suspect.identity for suspect in suspects}
    roots = {
        process.pid: process
        for process in table.values()
        if process.identity in seen or _is_orphan(process, since, bystanders) or _carries(process.pid, mark)
    }
    roots.pop(os.getpid(), None)
    found = {**roots, **{process.pid: process for process in below(roots, table)}}
    return [process for process in found.values() if process.alive]


def bystanders() -> set[int]:
    """Processes that this one has started by multiprocessing, slots among them: never strays of a run."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def _is_orphan(process: Process, since: float, bystanders: Collection[int]) -> bool:
    return (
        process.parent == os.getpid()
        and process.session != os.getsid(0)
        and process.pid not in bystanders
        and process.started >= since - 1 / _TICKS
        and not _is_database(process.pid)
    )


def _carries(pid: int, mark: str) -> bool:
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
    return f"{MARK}={mark}".encode() in environ.split(b"\0")


def _is_database(pid: int) -> bool:
    """The embedded PostgreSQL may be started again while a run goes on; it, too, is an orphan in its own session."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name == "postgres"
    except OSError:
        return False


def kill(find: Callable[[], Collection[Process]], patience: float = 2.0) -> list[Process]:
    """SIGKILL what `find` finds, again and again until it finds nothing or `patience` seconds have passed.

    Returns what is still there. Nothing is reaped.
    """
    deadline = time.monotonic() + patience
    while found := list(find()):
        if time.monotonic() >= deadline:
            return found
        with _handles(found[:_AT_ONCE]) as handles:
            for handle in handles:
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            _await_exits(handles, deadline)
    return []


def await_exit(process: Process, seconds: float) -> bool:
    """Wait until `process` has exited; False when it has not after `seconds`."""
    with _handles([process]) as handles:
        return _await_exits(handles, time.monotonic() + seconds)


@contextmanager
def _handles(processes: Iterable[Process]) -> Iterator[list[int]]:
    """A pidfd for each process that still is the one that was seen, not a later one with its pid."""
    handles: list[int] = []
    try:
        for process in processes:
            with suppress(ProcessLookupError):
                handles.append(os.pidfd_open(process.pid))
                current = look_up(process.pid)
                if current is None or current.identity != process.identity:
                    os.close(handles.pop())
        yield handles
    finally:
        for handle in handles:
            os.close(handle)


def _await_exits(handles: Iterable[int], deadline: float) -> bool:
    poller = select.poll()  # a pidfd is readable once its process has exited
    waiting = set(handles)
    for handle in waiting:
        poller.register(handle, select.POLLIN)
    while waiting and (left := deadline - time.monotonic()) > 0:
        for handle, _ in poller.poll(left * 1000):
            poller.unregister(handle)
            waiting.discard(handle)
    return not waiting


def kill_descendants() -> list[Process]:
    """End everything below this process; returns what could not be ended."""
    return kill(descendants)


def reap() -> None:
    """Collect all dead children of this process."""
    _reap(lambda _: True)


def reap_orphans(since: float, bystanders: Collection[int]) -> None:
    """Collect the dead among what strays() takes for orphans of a run."""
    _reap(lambda process: _is_orphan(process, since, bystanders))


def _reap(belongs: Callable[[Process], bool]) -> None:
    for process in all_processes().values():
        if process.parent == os.getpid() and not process.alive and belongs(process):
            with suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)
