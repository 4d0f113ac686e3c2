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
from pokestrator.subagent_checks import alike, words_of
from pokestrator.subagents import Author, Definition, Draft, Origin, State, Subagent, Template

INSERT_SUBAGENT = """
INSERT INTO subagents (name, origin, state, version) VALUES (%s, %s, %s, 1) ON CONFLICT (name) DO NOTHING
RETURNING id"""

# Held until the transaction ends: of two that build at once, the second sees what the first has built.
LOCK_BUILDING = "SELECT pg_advisory_xact_lock(hashtextextended('pokestrator building', 0))"

BUILT_SINCE = f"""
SELECT name, description FROM (
    {CURRENT} WHERE s.created_at >= %s AND s.state <> 'archived' AND v.author = 'drafter') c"""

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

    def build(self, draft: Draft, cause: str | None, *, since: datetime, claim: Job | None = None) -> Subagent:
        """Store a draft, on probation; `cause`, the task it was drafted for, is its first example, unless it is None.

        Two jobs that draft one name, or nearly one description, at the same time end with one subagent, which then
        knows both tasks. One that had the name before `since`, when the task came, is another subagent, which did not
        fit: the new one is numbered. With `claim`, only for a job that still is the caller's: raises LeaseLost.
        """
        causes = () if cause is None else (cause,)
        with self._source.connection() as connection:
            if claim is not None:
                hold_claim(connection, claim)
            connection.execute(LOCK_BUILDING)
            wanted = _twin(connection, draft, since) or draft.name
            for number in itertools.count(1):
                name = wanted if number == 1 else f"{wanted[:44]}_{number}"
                row, created = _insert(connection, name, Origin.BUILT, Author.DRAFTER, draft.definition())
                if created or (row["created_at"] >= since and _says_the_same(row, draft)):
                    break
            add_examples(connection, row["id"], causes, Author.PERSON, claim.id if claim else None)
            add_examples(connection, row["id"], draft.examples if created else (), Author.DRAFTER)
        return subagent_of(row)

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


def hold_claim(connection: Connection, claim: Job) -> None:
    """Keep a job with its owner until the end of the transaction. Raises LeaseLost where it has another one by now."""
    if connection.execute(HOLD_CLAIM, [claim.id, claim.claim_seq]).fetchone() is None:
        raise LeaseLost(f"job {claim.id} has another owner or has ended")


def _twin(connection: Connection, draft: Draft, since: datetime) -> str | None:
    """The subagent that was built since then and says what the draft says, under another name."""
    own = words_of(draft.description)
    for row in connection.execute(BUILT_SINCE, [since]):
        if alike(own, words_of(row["description"])):
            name: str = row["name"]
            return name
    return None


def _says_the_same(row: DictRow, draft: Draft) -> bool:
    """Whether a subagent that has taken the draft's name meanwhile was drafted for the same kind of task.

    What the owner stored, archived or gave credentials to is another one: a stranger's task must not come to it by its
    name.
    """
    is_drafted = row["author"] == Author.DRAFTER and row["state"] != State.ARCHIVED
    has_credentials = row["credentials"] or row["optional_credentials"]
    return is_drafted and not has_credentials and alike(words_of(draft.description), words_of(row["description"]))


def _insert(
    connection: Connection, name: str, origin: Origin, author: Author, definition: Definition
) -> tuple[DictRow, bool]:
    """The locked row of this name with its current version, and whether it was made here."""
    state = State.PROBATION if origin is Origin.BUILT else State.ACTIVE
    while True:
        # Of two that store one name at once, the second waits here for the first to commit.
        created = connection.execute(INSERT_SUBAGENT, [name, origin, state]).fetchone()
        if created:
            insert_version(connection, created["id"], 1, author, definition)
        if row := locked(connection, name):  # else it was renamed just now
            return row, created is not None
