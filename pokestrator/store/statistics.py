"""How many subagents know each word: counted in the background, for the search in shortlist.py."""

from __future__ import annotations

import time

from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.shortlist import SMALL

LOCK_KEY = 0x706F6B65 + 1  # one instance counts at a time
LOOK_SECONDS = 5.0  # between two looks whether to count
COUNT_SECONDS = 600.0  # between two counts of many subagents, which take seconds
COUNTING_SECONDS = 120  # a count may take

# The newest is one look into an index; for EXISTS (… >= counted_at) PostgreSQL would rather read the whole table.
IS_DUE = """
SELECT (subagents <= %(small)s OR counted_at < now() - make_interval(secs => %(pause)s) OR counted_at > now())
    AND coalesce((SELECT max(search_made_at) FROM subagents) >= counted_at, false) AS due
FROM search_statistics"""

# What has not changed is not written again: this happens every few seconds while tasks are done.
COUNT = """
WITH counted AS MATERIALIZED (
    SELECT word, ndoc FROM ts_stat('SELECT search FROM subagents WHERE state <> ''archived''')
), gone AS (
    DELETE FROM lexeme_statistics WHERE NOT EXISTS (SELECT FROM counted WHERE word = lexeme)
)
INSERT INTO lexeme_statistics AS kept (lexeme, subagents) SELECT word, ndoc FROM counted
ON CONFLICT (lexeme) DO UPDATE SET subagents = excluded.subagents WHERE kept.subagents <> excluded.subagents"""
SUM = """
UPDATE search_statistics SET counted_at = now(), subagents = found.subagents, mean_length = found.mean_length
FROM (SELECT count(*) AS subagents, coalesce(avg(search_length), 60) AS mean_length FROM subagents
    WHERE state <> 'archived') found"""


class Statistics:
    """Keeps the counts near the truth. Raises StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source
        self._look_at = 0.0

    def keep(self) -> None:
        """Count again if subagents have changed: a few at once, many every ten minutes. Cheap to call often."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + LOOK_SECONDS
        with self._source.connection() as connection:
            row = connection.execute(IS_DUE, {"pause": COUNT_SECONDS, "small": SMALL}).fetchone()
        if row is not None and row["due"]:
            self.count()

    def count(self) -> None:
        """Count now, unless another instance is doing so."""
        with self._source.connection(COUNTING_SECONDS) as connection:
            if _is_mine(connection):
                connection.operation_seconds = COUNTING_SECONDS  # the pool sets it back
                connection.execute(f"SET LOCAL statement_timeout = '{COUNTING_SECONDS}s'".encode())
                for step in (COUNT, SUM):
                    connection.execute(step)


def _is_mine(connection: Connection) -> bool:
    row = connection.execute("SELECT pg_try_advisory_xact_lock(%s) AS mine", [LOCK_KEY]).fetchone()
    return row is not None and bool(row["mine"])
