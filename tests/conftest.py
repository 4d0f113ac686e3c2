"""Real PostgreSQL for every test that touches data: one embedded server a session, one cloned database a test."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest

from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.store.subagents import Subagents

TEMPLATE_DATABASE = "migrated"


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The session's server. Not under pytest's own temporary folder, whose parents it would open to others."""
    folder = Path(tempfile.mkdtemp(prefix="pokestrator-tests-"))
    server = EmbeddedPostgres(folder)
    # These databases need not survive a power cut; making and dropping hundreds of them is most of what they do.
    _execute(server, "ALTER SYSTEM SET fsync = off")
    _execute(server, "SELECT pg_reload_conf()")
    yield server
    server.leave()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def migrated(postgres: EmbeddedPostgres) -> str:
    """Name of a migrated, otherwise empty database to clone."""
    _execute(postgres, f"CREATE DATABASE {TEMPLATE_DATABASE}")
    migrate(Database(database_named(postgres, TEMPLATE_DATABASE)))
    return TEMPLATE_DATABASE


@pytest.fixture
def database_url(postgres: EmbeddedPostgres, migrated: str) -> Iterator[str]:
    """A fresh migrated database."""
    name = f"test_{uuid.uuid4().hex}"
    _execute(postgres, f"CREATE DATABASE {name} TEMPLATE {migrated} STRATEGY FILE_COPY")
    yield database_named(postgres, name)
    _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def empty_database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """A fresh database without any table."""
    name = f"test_{uuid.uuid4().hex}"
    _execute(postgres, f"CREATE DATABASE {name}")
    yield database_named(postgres, name)
    _execute(postgres, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


@pytest.fixture
def recovery(database: Database) -> Recovery:
    return Recovery(database)


@pytest.fixture
def subagents(database: Database) -> Subagents:
    return Subagents(database)


def database_named(server: EmbeddedPostgres, name: str) -> str:
    parts = urlsplit(server.url)
    return urlunsplit(parts._replace(path=f"/{name}"))


def _execute(server: EmbeddedPostgres, statement: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(statement.encode())
