"""A schema of its own for subagents that are only measured: the owner's are not touched."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
from psycopg import sql

from pokestrator.errors import StoreUnavailable
from pokestrator.store.examples import refresh_search
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Connection, Database, reason_of
from pokestrator.store.statistics import Statistics

ADD = "INSERT INTO subagents (name, origin, version) VALUES (%s, 'built', 1) RETURNING id"
ADD_VERSION = """
INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, credentials, hosts,
    digest)
VALUES (%s, 1, 'owner', %s, '', '{}', '{}', '{}', '')"""
ADD_EXAMPLE = """
INSERT INTO subagent_examples (subagent_id, task, source) VALUES (%s, left(%s, 2000), 'person')
ON CONFLICT DO NOTHING"""
LOAD_SECONDS = 300.0

# Whoever measures holds a lock on their schema's name: one that nobody holds is of a process that was killed.
LOCK = "SELECT pg_advisory_lock(hashtextextended(%s, 0))"
ABANDONED = """
SELECT nspname AS name FROM pg_namespace
WHERE starts_with(nspname, 'pokestrator_measured_') AND pg_get_userbyid(nspowner) = current_user
    AND pg_try_advisory_lock(hashtextextended(nspname, 0))"""


@dataclass(frozen=True)
class Measured:
    """A subagent as far as the search sees it."""

    name: str
    description: str
    examples: Sequence[str]


@contextmanager
def scratch(url: str, subagents: Iterable[Measured]) -> Iterator[Database]:
    """An open database that holds these subagents alone, in a schema that is dropped at the end.

    Raises StoreUnavailable, also when this user may not make schemas.
    """
    schema = f"pokestrator_measured_{secrets.token_hex(6)}"
    owner = Database(url)
    with owner.connect() as line:  # has the lock for as long as it is open
        _begin(line, schema)
        try:
            database = Database(url, schema=schema)
            migrate(database)
            database.open()
            try:
                _load(database, subagents)
                Statistics(database).count()
                yield database
            finally:
                database.close()
        finally:
            with owner.connect() as other, _told():  # the line may not have lived as long
                _drop(other, schema)


def _begin(line: Connection, schema: str) -> None:
    with _told():
        for row in line.execute(ABANDONED).fetchall():
            _drop(line, row["name"])
        line.execute(LOCK, [schema])
        line.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))


def _drop(connection: Connection, schema: str) -> None:
    connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise StoreUnavailable(reason_of(error)) from error


def _load(database: Database, subagents: Iterable[Measured]) -> None:
    with database.connection(LOAD_SECONDS) as connection:
        for each in subagents:
            row = connection.execute(ADD, [each.name]).fetchone()
            assert row is not None
            connection.execute(ADD_VERSION, [row["id"], each.description])
            for example in each.examples:
                connection.execute(ADD_EXAMPLE, [row["id"], example])
            refresh_search(connection, row["id"])
