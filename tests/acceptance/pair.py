"""Two instances of the service on one database and one data folder, tasks for them, and what became of each."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from pokestrator.demo.inbox import Inbox, Received
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.environ import minimal_environment
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.processes import eventually
from tests.chaos.instance import Instance
from tests.conftest import database_named
from tests.integration.flow import callback_row, job_row, rows
from tests.no_limits import NO_LIMITS

KEY = "the-key-of-this-test"
TASK = (
    "Split 184.50 between 5 people with a tip"  # goes to a shipped template; what its run does stands in its metadata
)
DRAIN_SECONDS = 5
READY_SECONDS = 30.0
HANGS_ONCE: Mapping[str, Any] = {"hang": 80, "times": 1}  # the first run meets it, the second one the next step


@dataclass(frozen=True)
class Answer:
    """What a tools/call came back with, and after how many seconds."""

    fields: Mapping[str, Any]
    text: str
    seconds: float

    @property
    def is_accepted(self) -> bool:
        return self.fields.get("status") == "accepted"

    @property
    def request_id(self) -> uuid.UUID:
        return uuid.UUID(self.fields["request_id"])


def call(url: str, metadata: Any, task: str = TASK, within: float = 15, **headers: str) -> Answer:
    """One tools/call as Poke's client frames it, on a connection of its own. Raises requests' errors.

    `within`: seconds to wait for the answer.
    """
    arguments = {"task_description": task, "metadata": metadata}
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "orchestrate", "arguments": arguments},
    }
    fixed = {
        "Authorization": f"Bearer {KEY}",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": "2025-06-18",
    }
    started = time.monotonic()
    answer = requests.post(url, json=body, headers={**fixed, **headers}, timeout=within)
    seconds = time.monotonic() - started
    assert answer.status_code == 200, answer.text
    result = answer.json()["result"]
    return Answer(result.get("structuredContent") or {}, result["content"][0]["text"], seconds)


def scripted(*steps: Mapping[str, Any]) -> str:
    """Metadata whose runs play `steps`; no other task has the same."""
    script = f" SCRIPT: {json.dumps(steps)}" if steps else ""
    return f"Task {uuid.uuid4()}.{script}"


def environment(inbox: Inbox, api: MessagesApi, data: Path, **more: str) -> dict[str, str]:
    """What an instance is started with."""
    return {
        **minimal_environment(),
        **NO_LIMITS,
        "POKESTRATOR_API_KEY": KEY,
        "POKESTRATOR_DATA_DIR": str(data),
        "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
        "ANTHROPIC_BASE_URL": api.url,
        "POKE_API_KEY": "pk-for-the-inbox",
        "POKE_WEBHOOK_URL": inbox.message_url,
        "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
        "POKESTRATOR_CONCURRENCY": "2",
        "POKESTRATOR_DRAIN_SECONDS": str(DRAIN_SECONDS),
        **more,
    }


def posts(inbox: Inbox, request_id: uuid.UUID) -> list[Received]:
    """The messages about a job that the person got."""
    return [each for each in inbox.received if each.body.get("request_id") == str(request_id)]


class Pair:
    """Instances A and B. Each keeps its port, and all its processes carry `marker(instance)` in their environment."""

    def __init__(self, database_url: str, inbox: Inbox, api: MessagesApi, data: Path) -> None:
        self.database_url = database_url
        self.inbox = inbox
        self.api = api
        self._environments = {
            name: environment(inbox, api, data, DATABASE_URL=database_url, LANG=f"pair-{name}-{uuid.uuid4().hex}")
            for name in "AB"
        }
        self.a, self.b = (Instance(name, values) for name, values in self._environments.items())
        self._metadata: dict[uuid.UUID, str] = {}

    # instances

    def marker(self, instance: Instance) -> str:
        return self._environments[instance.name]["LANG"]

    def start_missing(self) -> None:
        """Have both run, healthy."""
        for instance in (self.a, self.b):
            if not self._runs(instance):
                self.start(instance)
        for instance in (self.a, self.b):
            assert eventually(instance.healthy, READY_SECONDS), instance.log

    def start(self, instance: Instance) -> None:
        """Start an instance that has ended, on its port."""
        instance.start()
        self._environments[instance.name]["PORT"] = str(urlsplit(instance.url).port)

    def stop(self) -> None:
        for instance in (self.a, self.b):
            instance.stop()

    def run_alone(self) -> Instance:
        """Have only one run, healthy, whichever; returns it."""
        running = [each for each in (self.a, self.b) if self._runs(each)]
        if not running:
            self.start(self.a)
        for other in running[1:]:
            other.service.stop()
        alone = running[0] if running else self.a
        assert eventually(alone.healthy, READY_SECONDS), alone.log
        return alone

    @contextmanager
    def held_back(self, instance: Instance) -> Iterator[None]:
        """Its worker stands still for a moment, much shorter than a lease: the other one takes what comes."""
        worker = instance.worker()
        assert worker is not None
        os.kill(worker, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)

    def _runs(self, instance: Instance) -> bool:
        with suppress(IndexError, OSError):  # never started, or gone
            return os.waitid(os.P_PID, instance.service.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        return False

    # tasks

    def send(self, instance: Instance, *steps: Mapping[str, Any], **headers: str) -> uuid.UUID:
        """Hand over a task whose runs play `steps`; its id, once it is acknowledged as durable."""
        metadata = scripted(*steps)
        answer = call(instance.url, metadata, **headers)
        assert answer.is_accepted and "durable" not in answer.fields, answer
        self._metadata[answer.request_id] = metadata
        return answer.request_id

    def send_to_run(self, instance: Instance, *scripts: list[Mapping[str, Any]]) -> list[uuid.UUID]:
        """Hand over one task a script, which this instance claims; once all their agents have asked Claude."""
        with self.held_back(self.b if instance is self.a else self.a):
            sent = [self.send(instance, *steps) for steps in scripts]
            for each in sent:
                self.await_agent(each)
        return sent

    def await_agent(self, request_id: uuid.UUID) -> None:
        """Wait until the agent of a job has asked Claude."""
        mark = self._metadata[request_id].split(".")[0]
        asked = eventually(lambda: any(mark in json.dumps(each.body) for each in self.api.requests), 60)
        assert asked, self.story(request_id)

    def ran_again(self, request_id: uuid.UUID, timeout: float) -> float:
        """When (time.time()) the second run of a job began; its agent starts after that, sooner or later."""
        assert eventually(lambda: len(self.events(request_id, "running")) > 1, timeout), self.story(request_id)
        at: float = self.events(request_id, "running")[1]["at"]
        return at

    def row(self, request_id: uuid.UUID) -> dict[str, Any]:
        return job_row(self.database_url, request_id)

    def events(self, request_id: uuid.UUID, kind: str) -> list[dict[str, Any]]:
        """Lines of a job's timeline: `at` (time.time()) and `text`."""
        query = "SELECT extract(epoch FROM at)::float8 AS at, text FROM job_events WHERE job_id = %s AND kind = %s"
        return rows(self.database_url, f"{query} ORDER BY id", request_id, kind)

    def delivered(self, request_id: uuid.UUID, timeout: float = 40) -> str:
        """What the person was told, once; and that the job ended once."""
        assert eventually(lambda: posts(self.inbox, request_id), timeout), self.story(request_id)
        recorded = eventually(lambda: callback_row(self.database_url, request_id)["state"] == "delivered")
        assert recorded, self.story(request_id)
        [post] = posts(self.inbox, request_id)
        assert len(self.events(request_id, "finished")) == 1, self.story(request_id)
        message: str = post.body["message"]
        return message

    def story(self, request_id: uuid.UUID) -> str:
        """All that is known of a job, for a person who looks into a failure."""
        query = "SELECT at::text || '  ' || kind || ': ' || text AS line FROM job_events WHERE job_id = %s ORDER BY id"
        timeline = [each["line"] for each in rows(self.database_url, query, request_id)]
        logs = [f"--- {each.name}\n{each.service.log[-6_000:]}" for each in (self.a, self.b)]
        return "\n".join([str(self.row(request_id)), *timeline, *logs])


@contextmanager
def pair_on(postgres: EmbeddedPostgres, template: str) -> Iterator[Pair]:
    """A pair on a fresh clone of the database `template`; nothing is started yet."""
    name = f"pair_{uuid.uuid4().hex}"
    rows(postgres.url, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY")
    with ExitStack() as stack:
        stack.callback(rows, postgres.url, f"DROP DATABASE {name} WITH (FORCE)")
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="pokestrator-pair-"))
        inbox = stack.enter_context(Inbox())
        api = stack.enter_context(MessagesApi())
        pair = Pair(database_named(postgres, name), inbox, api, Path(data))
        stack.callback(pair.stop)
        yield pair
