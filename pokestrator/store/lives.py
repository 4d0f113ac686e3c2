"""What the owner does to stored subagents: new versions, roll-backs, archiving, other names, imports.

Each is one transaction that locks the subagent's row. History is never rewritten: a roll-back is a new version too.
"""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from psycopg.rows import DictRow

from pokestrator.errors import CannotChange, UnknownSubagent
from pokestrator.store.examples import add_examples, refresh_search, remove_undone
from pokestrator.store.learning import GOOD_RUNS
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.versions import definition_of, insert_version, locked, subagent_of
from pokestrator.subagents import Author, Definition, Origin, State, Subagent

INSERT = """
INSERT INTO subagents (name, origin, version) VALUES (%s, %s, 1) ON CONFLICT (name) DO NOTHING RETURNING id"""

MAKE_CURRENT = "UPDATE subagents SET version = %s WHERE id = %s"

OLD_VERSION = "SELECT * FROM subagent_versions WHERE subagent_id = %s AND version = %s"

ARCHIVE = "UPDATE subagents SET archived_from = state, state = 'archived', search_made_at = now() WHERE id = %s"

RESTORE = """
UPDATE subagents SET state = coalesce(archived_from, 'active'), archived_from = NULL, search_made_at = now()
WHERE id = %s"""

# What did well before it was widened is not on probation when it is back.
TRUST_AGAIN = """
UPDATE subagents SET state = 'active'
WHERE id = %(id)s AND state = 'probation' AND %(good_runs)s <= (
    SELECT count(*) FROM jobs
    WHERE subagent_id = %(id)s AND subagent_version = %(version)s AND state = 'succeeded'
        AND verdict IS DISTINCT FROM 'bad')"""

RENAME = "UPDATE subagents SET name = %s WHERE id = %s"

# Those first that were of most use.
EXAMPLES = """
SELECT e.task, e.source FROM subagent_examples e JOIN subagents s ON s.id = e.subagent_id
WHERE s.name = %s ORDER BY e.uses DESC, e.created_at, e.task"""


class Lives:
    """The owner's changes. All functions raise UnknownSubagent for a name that is not stored, CannotChange with the
    reason, and StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def edit(self, name: str, definition: Definition, *, based_on: int, note: str = "") -> Subagent:
        """Make `definition` the current version. One that says the same as the current version makes none.

        `based_on`: the version it was made from; refused if another one has become the current one since.
        """
        with self._source.connection() as connection:
            row = _hold(connection, name, based_on)
            _write(connection, row, definition, note)
            return _now(connection, name)

    def roll_back(self, name: str, *, to: int, based_on: int) -> Subagent:
        """Make a new version that says what version `to` said. `based_on`: see `edit`.

        Tasks that only the undone versions were said to be for are examples no longer.
        """
        with self._source.connection() as connection:
            row = _hold(connection, name, based_on)
            if to == based_on:
                raise CannotChange(f"version {to} of {name} is the current one")
            old = connection.execute(OLD_VERSION, [row["id"], to]).fetchone()
            if old is None:
                raise CannotChange(f"{name} has no version {to}; its versions are 1 to {based_on}")
            remove_undone(connection, row["id"], to)
            if not _write(connection, row, definition_of(old), f"back to version {to}"):
                raise CannotChange(f"version {to} of {name} says the same as the current one, version {based_on}")
            connection.execute(TRUST_AGAIN, {"id": row["id"], "version": to, "good_runs": GOOD_RUNS})
            return _now(connection, name)

    def archive(self, name: str) -> Subagent:
        """Have a subagent matched no more; all else of it is kept."""
        with self._source.connection() as connection:
            row = _hold(connection, name)
            if row["state"] == State.ARCHIVED:
                raise CannotChange(f"{name} is archived already")
            connection.execute(ARCHIVE, [row["id"]])
            return _now(connection, name)

    def restore(self, name: str) -> Subagent:
        """Bring an archived subagent back, to the state that it had."""
        with self._source.connection() as connection:
            row = _hold(connection, name)
            if row["state"] != State.ARCHIVED:
                raise CannotChange(f"{name} is not archived")
            connection.execute(RESTORE, [row["id"]])
            return _now(connection, name)

    def rename(self, name: str, new_name: str) -> Subagent:
        """Give a subagent another name, which must have the form of one."""
        try:
            with self._source.connection() as connection:
                row = _hold(connection, name)
                connection.execute(RENAME, [new_name, row["id"]])
                refresh_search(connection, row["id"])
                return _now(connection, new_name)
        except psycopg.errors.UniqueViolation:
            raise CannotChange(f"{new_name} is the name of another subagent") from None

    def add(self, name: str, definition: Definition, examples: Sequence[str], note: str = "") -> Subagent:
        """Store a subagent of the owner's own, active at once."""
        with self._source.connection() as connection:
            created = connection.execute(INSERT, [name, Origin.BUILT]).fetchone()
            if created is None:
                raise CannotChange(f"{name} is the name of another subagent")
            insert_version(connection, created["id"], 1, Author.OWNER, definition, note)
            add_examples(connection, created["id"], examples, Author.OWNER)
            return _now(connection, name)

    def replace(
        self, name: str, definition: Definition, examples: Sequence[str], *, based_on: int, note: str = ""
    ) -> Subagent:
        """As `edit`, and add the examples that it does not know yet."""
        with self._source.connection() as connection:
            row = _hold(connection, name, based_on)
            _write(connection, row, definition, note)
            add_examples(connection, row["id"], examples, Author.OWNER)
            return _now(connection, name)

    def examples(self, name: str) -> list[tuple[str, Author]]:
        """The tasks that a subagent is known to take, and where each came from; the most useful ones first."""
        with self._source.connection() as connection:
            return [(row["task"], Author(row["source"])) for row in connection.execute(EXAMPLES, [name])]


def _hold(connection: Connection, name: str, based_on: int | None = None) -> DictRow:
    """The locked subagent with its current version, which must be `based_on` if that is given."""
    row = locked(connection, name)
    if row is None:
        raise UnknownSubagent(f"there is no subagent {name}")
    if based_on is not None and row["version"] != based_on:
        raise CannotChange(
            f"{name} has changed meanwhile: its current version is {row['version']}, and this was made from version "
            f"{based_on}; look at the new one and make the change again"
        )
    return row


def _write(connection: Connection, held: DictRow, definition: Definition, note: str) -> bool:
    """Write the owner's version and make it the current one; False if that would change nothing."""
    if definition == definition_of(held):
        return False
    version = held["version"] + 1
    insert_version(connection, held["id"], version, Author.OWNER, definition, note)
    connection.execute(MAKE_CURRENT, [version, held["id"]])
    refresh_search(connection, held["id"])
    return True


def _now(connection: Connection, name: str) -> Subagent:
    row = locked(connection, name)
    assert row is not None, "locked by this transaction"
    return subagent_of(row)
