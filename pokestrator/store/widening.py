"""Widening: a stored subagent takes one more kind of task, by a new version that the drafter wrote."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from pokestrator.jobs import Job
from pokestrator.store.examples import add_examples
from pokestrator.store.pool import ConnectionSource
from pokestrator.store.subagents import hold_claim
from pokestrator.store.versions import CURRENT, insert_version, subagent_of
from pokestrator.subagents import Author, Definition, Subagent

# What a stranger's task may never have reworded: what the owner or a template said last, what is given credentials,
# what may reach every host.
MAY_BE_WIDENED = """
s.state <> 'archived' AND v.author = 'drafter' AND v.credentials = '{}' AND v.optional_credentials = '{}'
AND NOT '*' = ANY (v.hosts)"""

WIDENABLE = f"""
{CURRENT} WHERE s.name = ANY (%(names)s) AND length(v.system_prompt) <= %(longest)s AND {MAY_BE_WIDENED}
ORDER BY array_position(%(names)s::text[], s.name) LIMIT %(limit)s"""

DESCRIPTIONS = f"""
SELECT name, description FROM ({CURRENT} WHERE s.name = ANY (%s) AND s.created_at < %s AND s.state <> 'archived') c"""

# After a roll-back the current version need not be the last one.
NEXT_VERSION = "SELECT max(version) + 1 AS next FROM subagent_versions WHERE subagent_id = %s"

# By its id: its name may be another one's by now.
LOCK = "SELECT id FROM subagents WHERE id = %s FOR UPDATE"

WIDEN = "UPDATE subagents SET version = %s, state = 'probation' WHERE id = %s"


class Widening:
    """Which subagents may be widened, and how one is. All functions raise StoreUnavailable."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def widenable(self, names: Sequence[str], *, limit: int, longest_prompt: int) -> list[Subagent]:
        """The first `limit` of these, in their order, that a draft may widen."""
        values = {"names": list(names), "limit": limit, "longest": longest_prompt}
        with self._source.connection() as connection:
            return [subagent_of(row) for row in connection.execute(WIDENABLE, values)]

    def descriptions(self, names: Sequence[str], *, before: datetime) -> dict[str, str]:
        """What those of these say that were there before this time, and are not archived."""
        with self._source.connection() as connection:
            rows = connection.execute(DESCRIPTIONS, [list(names), before])
            return {row["name"]: row["description"] for row in rows}

    def widen(
        self, seen: Subagent, definition: Definition, examples: Sequence[str], *, note: str, claim: Job
    ) -> Subagent | None:
        """Give a subagent this new version, on probation, and these examples; for a job that still is the caller's.

        None, and nothing is changed, when it is not the version any more that the drafter has `seen`, or may not be
        widened any more. Raises LeaseLost.
        """
        with self._source.connection() as connection:
            hold_claim(connection, claim)
            connection.execute(LOCK, [seen.id])
            current = f"{CURRENT} WHERE s.id = %s AND s.version = %s AND {MAY_BE_WIDENED}"
            if connection.execute(current, [seen.id, seen.version]).fetchone() is None:
                return None
            found = connection.execute(NEXT_VERSION, [seen.id]).fetchone()
            assert found is not None, "an aggregate has one row"
            insert_version(connection, seen.id, found["next"], Author.DRAFTER, definition, note)
            connection.execute(WIDEN, [found["next"], seen.id])
            add_examples(connection, seen.id, examples, Author.DRAFTER)
            row = connection.execute(f"{CURRENT} WHERE s.id = %s", [seen.id]).fetchone()
            assert row is not None, "locked above"
        return subagent_of(row)
