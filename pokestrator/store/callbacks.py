"""The outbox in PostgreSQL: callbacks that wait, are being sent, were delivered or are dead letters.

A claim counts an attempt and holds the row for a while; the attempt's number is the fence of what is written
about it, so that a sender which was too late changes nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from psycopg.rows import DictRow

from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.store.pool import ConnectionSource

HOLD_SECONDS = 90  # longer than one POST takes

# ARRAY(…) has the subquery run once; with IN the planner may run it for each row, and the limit is not kept.
CLAIM_DUE = """
UPDATE callbacks SET attempts = attempts + 1, lease_until = now() + make_interval(secs => %(hold)s)
FROM jobs
WHERE jobs.id = callbacks.job_id AND callbacks.id = ANY (ARRAY(
    SELECT id FROM callbacks
    WHERE state = 'pending' AND next_attempt_at <= now() AND (lease_until IS NULL OR lease_until < now())
        AND channel = ANY (%(channels)s::channel[]) AND (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s)
    ORDER BY next_attempt_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
RETURNING callbacks.*, jobs.callback_url, jobs.callback_token, left(jobs.task, 200) AS task"""

DELIVERED = """
UPDATE callbacks SET state = 'delivered', ended_at = now(), lease_until = NULL, last_status = %(status)s,
    last_error = NULL
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending'"""

DEAD = """
UPDATE callbacks SET state = 'dead', ended_at = now(), lease_until = NULL, last_status = %(status)s,
    last_error = %(error)s
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending'"""

RETRY = """
UPDATE callbacks SET lease_until = NULL, next_attempt_at = now() + make_interval(secs => %(wait)s),
    channel = %(channel)s, last_status = %(status)s, last_error = %(error)s
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending'"""


@dataclass(frozen=True)
class Callback:
    """One claimed attempt to deliver a job's result. `attempt` counts from 1."""

    id: uuid.UUID
    job_id: uuid.UUID
    task: str
    content: str
    channel: Channel
    target: CallbackTarget | None
    attempt: int


class Callbacks:
    """The callbacks table. All functions raise StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def claim_due(self, channels: Sequence[Channel], limit: int, job_id: uuid.UUID | None = None) -> list[Callback]:
        """Take up to `limit` callbacks whose time has come, on these channels; with `job_id`, only that job's."""
        values = {"hold": HOLD_SECONDS, "channels": [str(c) for c in channels], "limit": limit, "job_id": job_id}
        with self._source.connection() as connection:
            return [_callback(row) for row in connection.execute(CLAIM_DUE, values)]

    def delivered(self, callback: Callback, status: int | None) -> None:
        self._write(
            DELIVERED, callback, status=status, event=("delivered", f"{callback.channel}: {status or 'dry run'}")
        )

    def dead(self, callback: Callback, status: int | None, error: str) -> None:
        """The dead letters: kept with the reason, replayable."""
        self._write(DEAD, callback, status=status, error=error, event=("callback dead", error))

    def retry(
        self, callback: Callback, status: int | None, error: str, *, wait_seconds: float, channel: Channel
    ) -> None:
        """Try again after `wait_seconds`, on `channel`."""
        event = ("callback failed", f"{error}; next try in {wait_seconds:.0f} s")
        self._write(RETRY, callback, status=status, error=error, wait=wait_seconds, channel=channel, event=event)

    def _write(self, sql: str, callback: Callback, *, event: tuple[str, str], **values: object) -> None:
        with self._source.connection() as connection:
            done = connection.execute(sql, {"id": callback.id, "attempt": callback.attempt, **values})
            if done.rowcount:
                connection.execute(
                    "INSERT INTO job_events (job_id, kind, text) VALUES (%s, %s, %s)", [callback.job_id, *event]
                )


def _callback(row: DictRow) -> Callback:
    url, token = row["callback_url"], row["callback_token"]
    return Callback(
        id=row["id"],
        job_id=row["job_id"],
        task=row["task"],
        content=row["content"],
        channel=Channel(row["channel"]),
        target=CallbackTarget(url, token) if url else None,
        attempt=row["attempts"],
    )
