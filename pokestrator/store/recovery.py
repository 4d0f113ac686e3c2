"""What becomes of jobs without their owner: orphans, claims nobody knows of, cancelled ones, and those long ended.

All functions raise StoreUnavailable when PostgreSQL cannot be reached.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from psycopg.rows import DictRow

from pokestrator.jobs import CANCELLED, Channel, Job, JobState, Outcome, ending
from pokestrator.runs import ErrorKind, sentence
from pokestrator.store.jobs import MAX_INTERRUPTIONS, fences
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.rows import end_job, spend_reserved, wake_all, write_event

# No lease is longer than an hour: one that ends after two was written before the clock went back.
EXPIRED = "lease_until < now() OR lease_until > now() + interval '2 hours'"

ORPHANS = f"""
SELECT id, channel, interruptions, cancel_requested, runs FROM jobs
WHERE state = 'running' AND NOT (id, claim_seq) IN (SELECT * FROM unnest(%(ids)s::uuid[], %(fences)s::bigint[]))
    AND (owner = ANY (%(dead)s) OR (%(expired)s AND ({EXPIRED})))
ORDER BY lease_until LIMIT 100 FOR UPDATE SKIP LOCKED"""

REQUEUE = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, run_at = least(created_at, now()),
    interruptions = interruptions + 1
WHERE id = %s"""

# A claim whose COMMIT was answered to nobody: its owner does not know of it.
RELEASE_UNKNOWN = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, run_at = least(created_at, now())
WHERE state = 'running' AND owner = %(owner)s
    AND NOT (id, claim_seq) IN (SELECT * FROM unnest(%(ids)s::uuid[], %(fences)s::bigint[]))
RETURNING id"""

# No wait is longer than two minutes. Claimed in the order of run_at, such a job would come after all that arrive later.
BRING_FORWARD = """
UPDATE jobs SET run_at = now() WHERE state = 'queued' AND run_at > now() + interval '2 minutes'
RETURNING id"""

SHORTEN_LEASES = """
UPDATE jobs SET lease_until = now() + make_interval(secs => %(seconds)s)
WHERE state = 'running' AND lease_until > now() + make_interval(secs => %(seconds)s)"""

TO_CANCEL = """
SELECT id FROM jobs WHERE cancel_requested AND finished_at IS NULL AND state = 'running' AND owner = %s"""

CANCELLED_WHILE_QUEUED = """
SELECT id FROM jobs WHERE cancel_requested AND finished_at IS NULL AND state = 'queued'
LIMIT 100 FOR UPDATE SKIP LOCKED"""

# Dead letters are kept, and what waits to be sent.
REMOVE_OLD = """
DELETE FROM jobs WHERE id = ANY (ARRAY(
    SELECT id FROM jobs
    WHERE finished_at < now() - make_interval(days => %(days)s) AND NOT EXISTS (
        SELECT FROM callbacks
        WHERE job_id = jobs.id AND (state <> 'delivered' OR ended_at >= now() - make_interval(days => %(days)s)))
    ORDER BY finished_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))"""

REMOVE_OLD_SPENDING = "DELETE FROM spending WHERE day < current_date - %(days)s::integer"


@dataclass(frozen=True)
class Recovered:
    """What a sweep has done: jobs queued again, and jobs ended for good (interrupted too often, or cancelled)."""

    requeued: tuple[uuid.UUID, ...]
    ended: tuple[uuid.UUID, ...]


class Recovery:
    """The jobs table as the dispatcher's sweeper sees it."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def clock(self) -> float:
        """The database's clock, in seconds."""
        with self._source.connection() as connection:
            row = connection.execute("SELECT extract(epoch FROM now())::float8 AS now").fetchone()
        assert row is not None
        now: float = row["now"]
        return now

    def owners(self) -> set[str]:
        """Who owns a running job."""
        with self._source.connection() as connection:
            return {row["owner"] for row in connection.execute("SELECT owner FROM jobs WHERE state = 'running'")}

    def sweep(self, held: Sequence[Job], *, dead_owners: Collection[str] = (), expired: bool = False) -> Recovered:
        """Take up to 100 jobs from owners that are dead or (`expired`) have let the lease run out.

        `held` are the caller's own runs: whatever their leases say, they live.
        """
        requeued: list[uuid.UUID] = []
        ended: list[uuid.UUID] = []
        with self._source.connection() as connection:
            values = {**fences(held), "dead": list(dead_owners), "expired": expired}
            for row in connection.execute(ORPHANS, values).fetchall():
                (requeued if _requeue(connection, row) else ended).append(row["id"])
            spend_reserved(connection, [*requeued, *ended])
            if requeued:
                wake_all(connection)
        return Recovered(tuple(requeued), tuple(ended))

    def release_unknown(self, owner: str, held: Sequence[Job]) -> list[uuid.UUID]:
        """Give back, unpunished, what `owner` has claimed without having heard of it. Only for the owner itself."""
        with self._source.connection() as connection:
            rows = connection.execute(RELEASE_UNKNOWN, {"owner": owner, **fences(held)}).fetchall()
            for row in rows:
                write_event(connection, row["id"], "released", "back in the queue; the claim's answer was lost")
            spend_reserved(connection, [row["id"] for row in rows])
            return [row["id"] for row in rows]

    def bring_forward(self) -> list[uuid.UUID]:
        """Let queued jobs that were to wait beyond any wait, because the clock went back, run now."""
        with self._source.connection() as connection:
            return [row["id"] for row in connection.execute(BRING_FORWARD)]

    def shorten_leases(self, seconds: float) -> None:
        """Let no lease last longer than this. For a clock that went back: a dead owner's would last until then."""
        with self._source.connection() as connection:
            connection.execute(SHORTEN_LEASES, {"seconds": seconds})

    def to_cancel(self, owner: str, within: float | None = None) -> set[uuid.UUID]:
        """Running jobs of `owner` whose callers have cancelled them."""
        with self._source.connection(within) as connection:
            return {row["id"] for row in connection.execute(TO_CANCEL, [owner])}

    def end_cancelled(self) -> list[uuid.UUID]:
        """End jobs that came back to the queue after they had been cancelled."""
        with self._source.connection() as connection:
            ids = [row["id"] for row in connection.execute(CANCELLED_WHILE_QUEUED)]
            for job_id in ids:
                end_job(connection, job_id, Outcome(JobState.CANCELLED, CANCELLED))
            return ids

    def remove_old(self, days: int, limit: int) -> int:
        """Delete up to `limit` jobs that ended more than `days` days ago, with timeline and delivered callback."""
        with self._source.connection() as connection:
            connection.execute(REMOVE_OLD_SPENDING, {"days": days})
            return connection.execute(REMOVE_OLD, {"days": days, "limit": limit}).rowcount


def _requeue(connection: Connection, row: DictRow) -> bool:
    """Whether an orphan was queued again; else it was ended."""
    of_terminal = row["channel"] == Channel.NONE
    if row["cancel_requested"] or of_terminal or row["interruptions"] + 1 >= MAX_INTERRUPTIONS:
        kind = ErrorKind.INTERRUPTED
        detail = "the terminal that asked for it is gone" if of_terminal else "its run was interrupted too often"
        outcome = Outcome(JobState.FAILED, sentence(kind), kind, detail)
        final = ending(outcome, cancel_requested=row["cancel_requested"], runs=row["runs"])
        end_job(connection, row["id"], final, interruptions=1)
        return False
    connection.execute(REQUEUE, [row["id"]])
    write_event(connection, row["id"], "interrupted", "its owner is gone; it will run again")
    return True
