"""One instance of the service under gunicorn, whose processes can be found, killed and frozen."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path

import requests

from pokestrator.claude import processes
from pokestrator.claude.processes import Process
from pokestrator.demo.local import LocalService
from tests.acceptance.processes import children, eventually

READY_SECONDS = 60.0
REAP_SECONDS = 0.3


class Instance:
    """`start()` starts a new gunicorn on a new port; `url` is the newest one's MCP address."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._environment = environment
        self._services: list[LocalService] = []

    @property
    def service(self) -> LocalService:
        return self._services[-1]

    @property
    def url(self) -> str:
        return self.service.url

    @property
    def log(self) -> str:
        return "\n".join(f"--- start {n} ---\n{each.log}" for n, each in enumerate(self._services, 1))

    def masters(self) -> list[int]:
        """The pid of every gunicorn master that was ever started."""
        return [each.pid for each in list(self._services)]

    def start(self) -> None:
        service = LocalService(self._environment)
        service.start()
        self._services.append(service)

    def stop(self) -> None:
        """End everything that was ever started; the dead ones' pipes are closed too."""
        if not self._services:
            return
        self.service.stop()
        masters = self.masters()[:-1]
        # A killed master's worker that has not left by itself would hold the pipe that is closed here.
        processes.kill(lambda: [p for p in processes.descendants() if p.session in masters])
        for each in self._services[:-1]:
            each.stop()

    # processes, living ones only

    def worker(self) -> int | None:
        """gunicorn's one worker."""
        return next(iter(_living(self.service.pid)), None)

    def slots(self) -> list[int]:
        worker = self.worker()
        found = _living(worker) if worker is not None else []
        return [pid for pid in found if "resource_tracker" not in command(pid)]

    def agents(self) -> list[int]:
        """The processes that slots have started, at the moment."""
        return [pid for slot in self.slots() for pid in _living(slot)]

    def tree(self) -> list[Process]:
        return processes.descendants(self.service.pid)

    # readiness

    def healthy(self) -> bool:
        """Whether it answers, and has its database."""
        try:
            answer = requests.get(self.url.replace("/mcp", "/healthz"), timeout=3)
            return bool(answer.json().get("status") == "ok")
        except (requests.RequestException, ValueError):
            return False

    def answers(self) -> bool:
        """Whether it answers at all."""
        try:
            requests.get(self.url.replace("/mcp", "/healthz"), timeout=3)
        except requests.RequestException:
            return False
        return True

    def await_answers(self, worker: int | None = None) -> bool:
        """Wait until it answers, by another worker than `worker`."""
        return eventually(lambda: self.worker() not in (None, worker) and self.answers(), READY_SECONDS)


def _living(pid: int) -> list[int]:
    try:
        found = children(pid)
    except OSError:
        return []
    return [child for child in found if (process := processes.look_up(child)) is not None and process.alive]


def command(pid: int) -> str:
    """The command line of a process; empty when it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


class Reaper:
    """Collects what the killed leave to us: this process is their subreaper. `spared` are children of others here."""

    def __init__(self, spared: Callable[[], Collection[int]]) -> None:
        self._spared = spared
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._reap, name="reaper", daemon=True)

    def start(self) -> None:
        processes.become_subreaper()
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _reap(self) -> None:
        while not self._stop.wait(REAP_SECONDS):
            spared = self._spared()
            for process in processes.all_processes().values():
                # What we have started ourselves lies in our own session, or is spared.
                ours = process.parent == os.getpid() and process.session != os.getsid(0)
                if ours and not process.alive and process.pid not in spared:
                    with suppress(ChildProcessError):
                        os.waitpid(process.pid, os.WNOHANG)
