"""How a task comes into the jobs table: once, however often it is sent, and within its caller's limits.

All of it happens in one transaction under advisory locks, which hold for every worker and instance of a database.
"""

from __future__ import annotations

import uuid

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.errors import TooManyTasks
from pokestrator.intake import TaskLimits
from pokestrator.jobs import Channel, NewJob
from pokestrator.store.pool import Connection
from pokestrator.store.rows import WAKE_CHANNEL, write_event

# Until the transaction ends, nobody else can look for this key or store a job with it, or count this caller's tasks. A
# statement of its own: the next one sees what others committed before it got the locks.
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(held, 0)) FROM unnest(%s::text[]) AS held"

# Seconds until the caller may send again; NULL while the limit is not reached. Whoever got the lock before us may have
# begun after us; rows from further ahead were written before the clock went back, and count for nothing.
_UNTIL = """(
    SELECT extract(epoch FROM created_at + interval '1 {unit}' - now())::float8 FROM jobs
    WHERE %(is_limited)s AND coalesce(caller, '') = %(sender)s AND channel <> 'none'
        AND created_at BETWEEN now() - interval '1 {unit}' AND now() + interval '10 seconds'
    ORDER BY created_at DESC OFFSET %(per_{unit})s - 1 LIMIT 1)"""

# Look for an earlier one, count, write row and first event, wake: one statement, because the person who waits for the
# ack waits for each round trip. Who sends the same words again after having cancelled them wants them done after all.
ACCEPT = f"""
WITH earlier AS (
    SELECT id FROM jobs WHERE id = %(id)s
    UNION ALL (
        SELECT id FROM jobs
        WHERE idempotency_key = %(key)s AND created_at > now() - make_interval(secs => %(seconds)s)
            AND (NOT %(while_unfinished)s OR (finished_at IS NULL AND NOT cancel_requested))
        ORDER BY created_at DESC LIMIT 1)
    LIMIT 1
), used AS (
    SELECT {_UNTIL.format(unit="minute")} AS minute, {_UNTIL.format(unit="day")} AS day, EXISTS (
        SELECT FROM jobs
        WHERE %(is_limited)s AND coalesce(caller, '') = %(sender)s AND channel <> 'none' AND finished_at IS NULL
        OFFSET %(unfinished)s - 1) AS unfinished
), job AS (
    INSERT INTO jobs (id, task, metadata, caller, channel, callback_url, callback_token, idempotency_key)
    SELECT %(id)s, %(task)s, %(metadata)s, %(caller)s, %(channel)s::channel, %(callback_url)s, %(callback_token)s,
        %(key)s
    FROM used WHERE minute IS NULL AND day IS NULL AND NOT unfinished AND NOT EXISTS (SELECT FROM earlier)
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), event AS (
    INSERT INTO job_events (job_id, kind, text) SELECT id, 'accepted', 'waiting to run' FROM job
)
SELECT (SELECT id FROM earlier) AS earlier, minute, day, unfinished, (SELECT pg_notify(%(wake)s, '') FROM job)
FROM used"""

# The newest address is the one that Poke listens on.
READDRESS = """
WITH job AS (
    UPDATE jobs SET channel = 'callback', callback_url = %(url)s, callback_token = %(token)s WHERE id = %(id)s
    RETURNING id
)
UPDATE callbacks SET channel = 'callback', state = 'pending', ended_at = NULL, next_attempt_at = now(),
    begun_at = now(), attempts_before = attempts
FROM job WHERE job_id = job.id AND state IN ('pending', 'dead')"""


def insert(connection: Connection, job: NewJob, limits: TaskLimits | None) -> uuid.UUID:
    """Store a job as queued, in the connection's transaction; returns its id, or that of the one which it repeats.

    Raises TooManyTasks, and stores nothing, when its caller has used up one of `limits`. Neither a repetition nor a
    terminal's job is ever refused.
    """
    if job.channel is Channel.NONE:
        limits = None
    if locks := _locks(job, limits):
        connection.execute(LOCK, [locks])
    row = connection.execute(ACCEPT, _values(job, limits)).fetchone()
    assert row is not None
    earlier: uuid.UUID | None = row["earlier"]
    if earlier is not None:
        if earlier != job.id:
            _repeat(connection, earlier, job)
        return earlier
    if limits is not None:
        _refuse_beyond(limits, row)
    return job.id


def _locks(job: NewJob, limits: TaskLimits | None) -> list[str]:
    """What to lock, always in this order."""
    key = [job.idempotency.key] if job.idempotency else []
    return key if limits is None else [*key, f"tasks of {job.caller or ''}"]


def _values(job: NewJob, limits: TaskLimits | None) -> dict[str, object]:
    repeats = job.idempotency
    return {
        "id": job.id,
        "task": job.task,
        "metadata": Jsonb(job.metadata),
        "caller": job.caller,
        "channel": job.channel,
        "callback_url": job.callback.url if job.callback else None,
        "callback_token": job.callback.token if job.callback else None,
        "key": repeats.key if repeats else None,
        "seconds": repeats.seconds if repeats else 0.0,
        "while_unfinished": repeats is not None and repeats.while_unfinished,
        "is_limited": limits is not None,
        "sender": job.caller or "",
        "per_minute": limits.per_minute if limits else 1,
        "per_day": limits.per_day if limits else 1,
        "unfinished": limits.unfinished if limits else 1,
        "wake": WAKE_CHANNEL,
    }


def _refuse_beyond(limits: TaskLimits, used: DictRow) -> None:
    """Raise TooManyTasks for the limit that lasts longest of those which were reached."""
    if used["day"] is not None:
        raise TooManyTasks("day", limits.per_day, used["day"])
    if used["unfinished"]:
        raise TooManyTasks("unfinished", limits.unfinished, None)
    if used["minute"] is not None:
        raise TooManyTasks("minute", limits.per_minute, used["minute"])


def _repeat(connection: Connection, earlier: uuid.UUID, job: NewJob) -> None:
    if job.callback is not None:
        connection.execute(READDRESS, {"id": earlier, "url": job.callback.url, "token": job.callback.token})
    write_event(connection, earlier, "repeated", "the same call came again")
