"""Subagents in PostgreSQL: how they come in, by template or by draft, and how they are read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import datetime

from psycopg.rows import DictRow

from pokestrator.errors import LeaseLost
from pokestrator.jobs import Job
from pokestrator.store.examples import add_examples, replace_template_examples
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.versions import CURRENT, insert_version, locked, subagent_of
from pokestrator.subagents import Author, Definition, Draft, Origin, Subagent, Template

INSERT_SUBAGENT = """
INSERT INTO subagents (name, origin, version) VALUES (%s, %s, 1) ON CONFLICT (name) DO NOTHING RETURNING id"""

HOLD_CLAIM = "SELECT id FROM jobs WHERE id = %s AND claim_seq = %s AND state = 'running' FOR SHARE"


class Subagents:
    """The subagents' tables. All functions raise StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def get(self, name: str) -> Subagent | None:
        with self._source.connection() as connection:
            row = connection.execute(f"{CURRENT} WHERE s.name = %s", [name]).fetchone()
        return subagent_of(row) if row else None

    def all(self) -> list[Subagent]:
        with self._source.connection() as connection:
            return [subagent_of(row) for row in connection.execute(f"{CURRENT} ORDER BY s.id")]

    def names(self, limit: int) -> list[str]:
        """The names in use, newest first."""
        with self._source.connection() as connection:
            rows = connection.execute("SELECT name FROM subagents ORDER BY id DESC LIMIT %s", [limit])
            return [row["name"] for row in rows]

    def adopt(self, template: Template) -> Subagent:
        """Store a template as a subagent, or return the one already stored under its name."""
        with self._source.connection() as connection:
            row, created = _insert(connection, template.name, Origin.TEMPLATE, Author.TEMPLATE, template)
            if created:
                add_examples(connection, row["id"], template.examples, Author.TEMPLATE)
        return subagent_of(row)

    def build(self, draft: Draft, cause: str, *, since: datetime, claim: Job | None = None) -> Subagent:
        """Store a draft; `cause`, the task it was drafted for, is its first example.

        Two jobs that draft one name at the same time end with one subagent, which then knows both tasks. One that had
        the name before `since`, when the task came, is another subagent, which did not fit: the new one is numbered.
        With `claim`, only for a job that still is the caller's: raises LeaseLost.
        """
        for number in itertools.count(1):
            name = draft.name if number == 1 else f"{draft.name[:44]}_{number}"
            with self._source.connection() as connection:
                if claim is not None:
                    _hold(connection, claim)
                row, created = _insert(connection, name, Origin.BUILT, Author.DRAFTER, draft.definition())
                if not created and row["created_at"] < since:
                    continue
                add_examples(connection, row["id"], (cause, *draft.examples) if created else (cause,), Author.DRAFTER)
            return subagent_of(row)
        raise AssertionError("count() has no end")

    def follow(self, templates: Sequence[Template]) -> list[str]:
        """Give stored templates whose file has changed a new version, unless the owner has edited them.

        Returns the names that got one.
        """
        changed = []
        for template in templates:
            with self._source.connection() as connection:
                row = locked(connection, template.name)
                if row is None or row["origin"] != Origin.TEMPLATE or row["author"] != Author.TEMPLATE:
                    continue
                if row["digest"] == template.digest():
                    continue
                version = row["version"] + 1
                insert_version(connection, row["id"], version, Author.TEMPLATE, template)
                connection.execute("UPDATE subagents SET version = %s WHERE id = %s", [version, row["id"]])
                replace_template_examples(connection, row["id"], template.examples)
            changed.append(template.name)
        return changed


def _hold(connection: Connection, claim: Job) -> None:
    """Keep a job with its owner until the end of the transaction. Raises LeaseLost where it has another one by now."""
    if connection.execute(HOLD_CLAIM, [claim.id, claim.claim_seq]).fetchone() is None:
        raise LeaseLost(f"job {claim.id} has another owner or has ended")


def _insert(
    connection: Connection, name: str, origin: Origin, author: Author, definition: Definition
) -> tuple[DictRow, bool]:
    """The locked row of this name with its current version, and whether it was made here."""
    # Of two that store one name at once, the second waits here for the first to commit.
    created = connection.execute(INSERT_SUBAGENT, [name, origin]).fetchone()
    if created:
        insert_version(connection, created["id"], 1, author, definition)
    row = locked(connection, name)
    assert row is not None, "inserted or found above"
    return row, created is not None
