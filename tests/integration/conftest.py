"""What agents and callbacks need: a scripted Messages API, warm slots, an inbox that plays Poke."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pokestrator import service
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from tests.integration.agent_runs import agent_environment, agents


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Like pytest's own, but open to those who know a name in it: where we are root, agents are other users."""
    with tempfile.TemporaryDirectory(prefix="pokestrator-test-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


@pytest.fixture(scope="module")
def slots(api: MessagesApi) -> Iterator[Slots]:
    slots = Slots(2, agent_environment(api.url))
    slots.start()
    try:
        yield slots
    finally:
        slots.close()
    assert agents() == []


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as inbox:
        yield inbox


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the API's trouble has stopped is tried again at once."""
    monkeypatch.setattr(service, "API_WAITS", (0.0, 0.0))
