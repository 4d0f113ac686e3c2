"""Which owners on this machine have died: each holds a lock on a file of its own as long as it lives.

The kernel releases the lock when the process ends, however it ends, and keeps it while the process is only stopped.
Process ids would lie: containers that share the folder number their processes each for itself.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pokestrator.telemetry import get_logger

log = get_logger(__name__)

KEEP_SECONDS = 600.0  # that a dead owner's file is kept, for those who ask later: well over a lease
LOCK_SECONDS = 1.0  # others hold a living owner's lock for an instant, when it is just being declared

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}:[0-9]{1,10}:[0-9a-f]{8}")


def owner_name() -> str:
    """Names this process in the rows that it owns, and its file here."""
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or "host"
    return f"{host}:{os.getpid()}:{uuid.uuid4().hex[:8]}"


class Liveness:
    """Owners' files in `folder`, which declare() makes. An owner is named `host:pid:8 hexadecimal digits`.

    Declare in the process that is the owner, after its forks: a forked child would hold the lock beyond its death.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, int] = {}  # owner to the descriptor that holds its lock
        self._is_off = False

    def declare(self, owner: str) -> bool:
        """Say that `owner` is this process and lives; whether that could be said. Raises ValueError for other names.

        Where it cannot (no folder, no locks) the owner's death goes unnoticed until its leases run out.
        """
        if not _OWNER.fullmatch(owner):
            raise ValueError(f"owner={owner!r}: must be host:pid:8 hexadecimal digits")
        if owner in self._held:
            return True
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as folder:
                os.fchmod(folder, 0o700)
                self._held[owner] = _lock_own(folder, owner)
                for name in os.listdir(folder):  # noqa: PTH208 - the folder as it was opened, whatever its path names now
                    _forget_if(folder, name, _is_long_dead)
        except OSError as error:
            if not self._is_off:
                self._is_off = True
                log.warning("liveness_off", folder=str(self._folder), reason=error.strerror or str(error))
        return owner in self._held

    def is_dead(self, owner: str) -> bool:
        """Whether `owner` was declared on this machine and has died since. False when that is not known."""
        if owner in self._held or not _OWNER.fullmatch(owner):
            return False
        try:
            with self._opened() as folder, _file(folder, owner) as file:
                # Shared, so that two who ask at once do not take each other for the owner.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def forget(self, owner: str) -> None:
        """Remove what is left of an owner that has died; nothing happens to one that lives."""
        if owner not in self._held and _OWNER.fullmatch(owner):
            with suppress(OSError), self._opened() as folder:
                _forget_if(folder, owner, lambda _file: True)

    def withdraw(self, *, leaves_runs: bool = False) -> None:
        """Leave in order: what this process has declared is gone, neither alive nor dead.

        `leaves_runs`: it could not give back all it owned. Then it counts as dead, so that others take them at once.
        """
        for owner, file in self._held.items():
            with suppress(OSError), self._opened() as folder:
                if not leaves_runs and _is_named(folder, owner, file):
                    os.unlink(owner, dir_fd=folder)  # before its release: nobody may see it without its lock
            os.close(file)
        self._held.clear()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            yield folder
        finally:
            os.close(folder)


@contextmanager
def _file(folder: int, name: str, flags: int = 0) -> Iterator[int]:
    """A descriptor that no started process inherits. Raises OSError for everything but a regular file."""
    file = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | flags, 0o600, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise OSError(f"{name} is no regular file")
        yield file
    finally:
        os.close(file)


def _lock_own(folder: int, owner: str) -> int:
    """The descriptor that holds the lock on the owner's new file. Raises OSError."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        with _file(folder, owner, os.O_CREAT) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # Waiting without an end would be waiting for a process that may be stopped.
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)
                continue
            # Between our opening and our locking it may have been taken for a dead owner's, marked or removed.
            if _is_named(folder, owner, file):
                os.ftruncate(file, 0)
                return os.dup(file)  # the lock belongs to what was opened, and lasts as long as any descriptor of it


def _forget_if(folder: int, name: str, condition: Callable[[int], bool]) -> None:
    """Remove the file of a dead owner if `condition` holds for its descriptor. Whoever removes it holds its lock."""
    if not _OWNER.fullmatch(name):
        return
    with suppress(OSError), _file(folder, name) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_named(folder, name, file) and condition(file):
            os.unlink(name, dir_fd=folder)


def _is_long_dead(file: int) -> bool:
    """The first to find an owner dead writes a byte into its file, so that the file's age counts from there.

    One that is declared in place of a dead one must leave its file to those who recover its jobs.
    """
    found = os.fstat(file)
    if found.st_size == 0:
        os.write(file, b"x")
        return False
    return time.time() - found.st_mtime > KEEP_SECONDS


def _is_named(folder: int, name: str, file: int) -> bool:
    try:
        named = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(file))
