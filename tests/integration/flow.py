"""What the tests of the way of a task share: applications on real parts, tasks with scripts, and bounded waiting."""

from __future__ import annotations

import json
import os
import select
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import psycopg
import pytest
import structlog
from psycopg.rows import dict_row
from structlog.typing import EventDict

from pokestrator import bootstrap
from pokestrator.bootstrap import Application
from pokestrator.demo.inbox import Inbox, Received
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, Channel, NewJob, Outcome
from pokestrator.runs import RunRequest, RunResult
from pokestrator.settings import Settings
from pokestrator.subagents import Draft, Template
from tests.no_limits import NO_LIMITS

DATA = tempfile.TemporaryDirectory(prefix="pokestrator-tests-data-")  # removed when the interpreter ends
KEY = "sk-ant-scripted-0123456789"
POKE_KEY = "poke-scripted-0123456789"
HERE = ("127.0.0.1",)  # whose callbacks are allowed
TOKEN = "callback-token-1"

# One template, and a task that is one of its examples word for word.
POET: dict[str, Any] = {
    "name": "sea_poet",
    "description": "Writes short poems about the sea, ships, harbours and lighthouses.",
    "system_prompt": "You write poems of at most four lines about the sea. Answer with the poem and nothing else.",
    "tools": ["Bash"],
    "examples": ["Write a poem about the lighthouse at dusk", "Four lines on ships that leave the harbour"],
}
POET_TASK = "Write a poem about the lighthouse at dusk"
UNFITTING_TASK = "Convert the knitting pattern of grandma's scarf into Morse code"


# settings and applications -----------------------------------------------------------------------------------------


def settings_for(api: MessagesApi, inbox: Inbox, **more: str) -> Settings:
    """The settings of an instance whose Claude and whose Poke are ours."""
    values = {
        "PATH": os.environ["PATH"],
        **NO_LIMITS,
        "POKESTRATOR_DATA_DIR": DATA.name,
        "ANTHROPIC_API_KEY": KEY,
        "ANTHROPIC_BASE_URL": api.url,
        "POKE_API_KEY": POKE_KEY,
        "POKE_WEBHOOK_URL": inbox.message_url,
        "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
        "POKESTRATOR_CONCURRENCY": "2",
        "POKESTRATOR_AGENT_TIMEOUT": "30",
        "POKESTRATOR_DRAIN_SECONDS": "0",
        **more,
    }
    return Settings.from_environ(values)


@contextmanager
def running(settings: Settings, url: str, **overrides: Any) -> Iterator[Application]:
    """A started application, closed at the end."""
    application = bootstrap.build(settings, url, **overrides)
    try:
        application.start()
        yield application
    finally:
        application.close()


class Borrowed:
    """A Claude that outlives the applications it is lent to."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner

    def run(self, request: RunRequest, on_event: Callable[[Any], None]) -> RunResult:
        result: RunResult = self._owner.run(request, on_event)
        return result

    def cancel(self, run_id: str) -> None:
        self._owner.cancel(run_id)

    def close(self) -> None:
        """Stays open for the next application."""


def write_template(folder: Path, **changes: Any) -> Path:
    """A folder with one template: POET with `changes`."""
    folder.mkdir(exist_ok=True)
    definition = {**POET, **changes}
    (folder / f"{definition['name']}.json").write_text(json.dumps(definition), encoding="utf-8")
    return folder


def poet(**changes: Any) -> Template:
    return Template(**{**POET, **changes})


def draft(name: str, **changes: Any) -> Draft:
    values = {
        "name": name,
        "description": f"Takes tasks of the kind {name.replace('_', ' ')}.",
        "system_prompt": "You do tasks of one kind and answer in a few short sentences of plain text.",
        "examples": examples_for(f"Please do {name.replace('_', ' ')}"),
    }
    return Draft(**{**values, **changes})


def examples_for(first: str) -> list[str]:
    """As many different tasks as a draft must have."""
    return [first, *(f"{first} for {whom}" for whom in ("Ann", "Ben", "Cleo", "Dan"))]


# tasks -------------------------------------------------------------------------------------------------------------


def task(description: str = POET_TASK, *steps: Mapping[str, Any], inbox: Inbox | None = None) -> NewJob:
    """A task whose runs play `steps`. The script travels as metadata, so that the task is routed by its words alone.

    With `inbox` its result goes to a callback address there, else to the message API.
    """
    metadata = f"Job {uuid.uuid4()}. SCRIPT: {json.dumps(steps)}" if steps else ""
    target = CallbackTarget(inbox.callback_url(TOKEN), TOKEN) if inbox else None
    return new_job(description, metadata, callback=target)


def quiet_task(description: str = POET_TASK) -> NewJob:
    """A task that ends without a callback."""
    return new_job(description, channel=Channel.NONE)


def bash(command: str) -> dict[str, Any]:
    return {"tool": "Bash", "input": {"command": command, "description": "a test"}}


def outcome_of(application: Application, job: NewJob, timeout: float = 20) -> Outcome:
    """How a job ended, once it has."""
    outcome = eventually(lambda: application.history.outcome(job.id), timeout)
    assert isinstance(outcome, Outcome), application.history.timeline(job.id)
    return outcome


def contents(received: list[Received]) -> list[str]:
    """The texts that a person got, on either channel."""
    return [str(each.body.get("content", each.body.get("message"))) for each in received]


# the database, seen from outside -----------------------------------------------------------------------------------


def rows(url: str, query: str, *values: object) -> list[dict[str, Any]]:
    """Rows of a query that names a column, or [] for a statement that gives none; committed."""
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []


def row(url: str, query: str, *values: object) -> dict[str, Any]:
    found = rows(url, query, *values)
    assert len(found) == 1, f"{len(found)} rows"
    return found[0]


def job_row(url: str, job_id: uuid.UUID) -> dict[str, Any]:
    return row(url, "SELECT * FROM jobs WHERE id = %s", job_id)


def callback_row(url: str, job_id: uuid.UUID) -> dict[str, Any]:
    return row(url, "SELECT * FROM callbacks WHERE job_id = %s", job_id)


class Forwarder:
    """Carries TCP on a loopback port of its own to the Unix socket of the database at `url`.

    It starts closed: connections are refused until open(), and again after close(), which also ends those that are
    open. Its port stays its own.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"
        self._listener = self._bind(0)
        self.port: int = self._listener.getsockname()[1]
        query = "sslmode=disable&gssencmode=disable"
        self.url = urlunsplit(parts._replace(netloc=f"postgres@127.0.0.1:{self.port}", query=query))
        self._pairs: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        self._listener.listen(64)
        self._thread = threading.Thread(target=self._accept, args=(self._listener,), name="forwarder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept()
        self._listener.close()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            for each in self._pairs:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        self._listener = self._bind(self.port)

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._listener.close()

    def _bind(self, port: int) -> socket.socket:
        # Bound, but not listening: the kernel refuses connections, and nobody else gets the port.
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        return bound

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._carry, args=(client,), name="forwarder", daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        with client, server:
            server.connect(self._target)
            with self._lock:
                self._pairs |= {client, server}
            with suppress(OSError):
                self._pump(client, server)
            with self._lock:
                self._pairs -= {client, server}

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        while True:
            for source in select.select([client, server], [], [])[0]:
                data = source.recv(65_536)
                if not data:
                    return
                other[source].sendall(data)


# waiting and watching ----------------------------------------------------------------------------------------------


def eventually(condition: Callable[[], Any], timeout: float = 10) -> Any:
    """Poll `condition`, for which there is no signal to wait on; its first true value, or its last false one."""
    deadline = time.monotonic() + timeout
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


@contextmanager
def captured_logs(patch: pytest.MonkeyPatch, *modules: ModuleType) -> Iterator[list[EventDict]]:
    """What `modules` log, however earlier tests have configured the logs."""
    with structlog.testing.capture_logs() as captured:
        for module in modules:
            patch.setattr(module, "log", structlog.get_logger())
        yield captured
