"""A schema of its own for subagents that are only measured: the owner's are not touched."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from pokestrator.errors import StoreUnavailable
from pokestrator.store.examples import refresh_search
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Database, reason_of
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
    _execute(owner, f"CREATE SCHEMA {schema}")
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
        _execute(owner, f"DROP SCHEMA {schema} CASCADE")


def _load(database: Database, subagents: Iterable[Measured]) -> None:
    with database.connection(LOAD_SECONDS) as connection:
        for each in subagents:
            row = connection.execute(ADD, [each.name]).fetchone()
            assert row is not None
            connection.execute(ADD_VERSION, [row["id"], each.description])
            for example in each.examples:
                connection.execute(ADD_EXAMPLE, [row["id"], example])
            refresh_search(connection, row["id"])


def _execute(database: Database, statement: str) -> None:
    with database.connect() as connection:
        try:
            connection.execute(statement.encode())
        except psycopg.Error as error:
            raise StoreUnavailable(reason_of(error)) from error
