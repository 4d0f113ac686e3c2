"""A PostgreSQL of one's own that can be frozen: it keeps its sockets and answers nothing, like a machine that swaps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pokestrator.store.embedded import EmbeddedPostgres


class FreezablePostgres:
    """An embedded server in `folder`, which nobody else may use."""

    def __init__(self, folder: Path) -> None:
        self._server = EmbeddedPostgres(folder)
        self._pid_file = folder / "postgres" / "postmaster.pid"
        self.url = self._server.url

    def leave(self) -> None:
        self.thaw()
        self._server.leave()

    def freeze(self) -> None:
        # The postmaster first: one that is stopped starts no more processes.
        postmaster = self._postmaster()
        _stop(postmaster)
        for each in _children(postmaster):
            _stop(each)

    def thaw(self) -> None:
        postmaster = self._postmaster()
        for each in [*_children(postmaster), postmaster]:
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    @contextmanager
    def frozen_backends(self, pids: list[int]) -> Iterator[None]:
        """Only some connections' processes: what a network that forgets connections looks like to a client."""
        assert set(pids) <= set(_children(self._postmaster()))
        for each in pids:
            _stop(each)
        try:
            yield
        finally:
            self.thaw()

    def _postmaster(self) -> int:
        return int(self._pid_file.read_text(encoding="utf-8").split()[0])


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def _stop(pid: int) -> None:
    """Send SIGSTOP and wait until it holds."""
    try:
        os.kill(pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while _state(pid) not in "TZ":
            assert time.monotonic() < deadline, f"process {pid} does not stop"
            time.sleep(0.001)
    except (ProcessLookupError, FileNotFoundError):
        return  # it has just ended by itself


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
