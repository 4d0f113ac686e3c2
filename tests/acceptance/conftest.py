"""The real service under the real gunicorn, with a scripted Messages API and an inbox that plays Poke."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.environ import minimal_environment
from pokestrator.store.secrets import new_key


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox() as opened:
        yield opened


@pytest.fixture
def messages_api() -> Iterator[MessagesApi]:
    with MessagesApi() as opened:
        yield opened


@pytest.fixture
def service_environment(database_url: str, inbox: Inbox, messages_api: MessagesApi, tmp_path: Path) -> dict[str, str]:
    """A working environment for LocalService on a database of its own; tests change what they are about."""
    return {
        **minimal_environment(),
        "DATABASE_URL": database_url,
        "POKESTRATOR_DATA_DIR": str(tmp_path / "data"),
        "POKESTRATOR_API_KEY": "the-key-of-this-test",
        "POKESTRATOR_SECRET_KEY": new_key(),
        "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
        "ANTHROPIC_BASE_URL": messages_api.url,
        "POKE_API_KEY": "pk-for-the-inbox",
        "POKE_WEBHOOK_URL": inbox.message_url,
        "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
        "POKESTRATOR_CONCURRENCY": "2",
        "POKESTRATOR_DRAIN_SECONDS": "5",
    }
