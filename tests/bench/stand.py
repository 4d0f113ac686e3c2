"""What the benches share: the real service on a database of its own, percentiles, and one MCP call over HTTP."""

from __future__ import annotations

import statistics
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import LocalService
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.environ import minimal_environment
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.processes import eventually
from tests.no_limits import NO_LIMITS

KEY = "the-key-of-this-bench"


@dataclass(frozen=True)
class Stand:
    service: LocalService
    database_url: str
    inbox: Inbox
    messages_api: MessagesApi


@contextmanager
def running_service(**settings: str) -> Iterator[Stand]:
    """The service under gunicorn, its scripted Messages API and its inbox, in a temporary folder."""
    with (
        tempfile.TemporaryDirectory(prefix="pokestrator-bench-", ignore_cleanup_errors=True) as folder,
        Inbox() as inbox,
        MessagesApi() as api,
    ):
        postgres = EmbeddedPostgres(Path(folder))
        environment = {
            **minimal_environment(),
            **NO_LIMITS,
            "DATABASE_URL": postgres.url,
            "POKESTRATOR_DATA_DIR": folder,
            "POKESTRATOR_API_KEY": KEY,
            "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
            "ANTHROPIC_BASE_URL": api.url,
            "POKE_API_KEY": "pk-for-the-inbox",
            "POKE_WEBHOOK_URL": inbox.message_url,
            "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
            "POKESTRATOR_DRAIN_SECONDS": "0",
            **settings,
        }
        try:
            with LocalService(environment) as service:
                if not eventually(lambda: _is_ready(service), 30):
                    raise RuntimeError(service.log)
                yield Stand(service, postgres.url, inbox, api)
        finally:
            postgres.leave()


def _is_ready(service: LocalService) -> bool:
    answer = requests.get(service.url.replace("/mcp", "/healthz"), timeout=10)
    ready: bool = answer.json()["status"] == "ok"
    return ready


def orchestrate(session: requests.Session, url: str, task: str) -> str:
    """One tools/call as Poke's client frames it; returns the request_id."""
    arguments = {"name": "orchestrate", "arguments": {"task_description": task}}
    answer = session.post(
        url,
        json={"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": arguments},
        headers={
            "Authorization": f"Bearer {KEY}",
            "X-Poke-User-Id": str(uuid.uuid4()),  # a person who has sent little: what counts tasks reads few rows
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": "2025-06-18",
        },
        timeout=30,
    )
    request_id: str = answer.json()["result"]["structuredContent"]["request_id"]
    return request_id


def percentiles(values: list[float]) -> tuple[float, float]:
    """(p50, p99) of at least two values."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return cuts[49], cuts[98]


def pause(seconds: float) -> None:
    """Let the machine settle between two measurements."""
    threading.Event().wait(seconds)
