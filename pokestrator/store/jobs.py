"""Jobs in PostgreSQL: one function per transition of the picture in pokestrator/jobs.py, each SQL beside its function.

Every write that ends or renews a run names the fence (`claim_seq`) of its claim. No row means that the lease was
lost: LeaseLost. All functions raise StoreUnavailable when PostgreSQL cannot be reached.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.errors import LeaseLost
from pokestrator.jobs import CallbackTarget, Channel, Job, JobEvent, JobState, NewJob, Outcome, Route, callback_content
from pokestrator.runs import ErrorKind, sentence
from pokestrator.store.pool import Connection, ConnectionSource

WAKE_CHANNEL = "pokestrator_jobs"
MAX_INTERRUPTIONS = 3

# Row, first event and wake-up in one statement: the person who waits for the ack waits for each round trip.
INSERT = """
WITH job AS (
    INSERT INTO jobs (id, task, metadata, caller, channel, callback_url, callback_token)
    VALUES (%(id)s, %(task)s, %(metadata)s, %(caller)s, %(channel)s, %(callback_url)s, %(callback_token)s)
    ON CONFLICT (id) DO NOTHING
    RETURNING id
), event AS (
    INSERT INTO job_events (job_id, kind, text) SELECT id, 'accepted', 'waiting to run' FROM job
)
SELECT pg_notify(%(wake)s, '')"""

# A claim makes the run's owner, its lease and its fence in one step; rows that others are claiming are passed over.
# ARRAY(…) has the subquery run once. As `id IN (SELECT … LIMIT …)` the planner may run it again for each row, and the
# limit is not kept.
CLAIM = """
UPDATE jobs SET state = 'running', claim_seq = claim_seq + 1, owner = %(owner)s,
    lease_until = now() + make_interval(secs => %(lease)s), started_at = coalesce(started_at, now())
WHERE id = ANY (ARRAY(
    SELECT id FROM jobs
    WHERE state = 'queued' AND run_at <= now() AND (%(id)s::uuid IS NULL OR id = %(id)s)
    ORDER BY run_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
RETURNING *"""

RENEW = """
UPDATE jobs SET lease_until = now() + make_interval(secs => %(lease)s)
FROM unnest(%(ids)s::uuid[], %(fences)s::bigint[]) AS mine (id, claim_seq)
WHERE jobs.id = mine.id AND jobs.claim_seq = mine.claim_seq AND state = 'running'
RETURNING jobs.id"""

RELEASE = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, run_at = now()
FROM unnest(%(ids)s::uuid[], %(fences)s::bigint[]) AS mine (id, claim_seq)
WHERE jobs.id = mine.id AND jobs.claim_seq = mine.claim_seq AND state = 'running'
RETURNING jobs.id"""

REQUEUE_EXPIRED = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, run_at = now(), interruptions = interruptions + 1
WHERE id = ANY (ARRAY(
    SELECT id FROM jobs WHERE state = 'running' AND lease_until < now()
        AND interruptions + 1 < %(most)s AND channel <> 'none'
    ORDER BY lease_until LIMIT 100 FOR UPDATE SKIP LOCKED))
RETURNING id"""

FAIL_INTERRUPTED = """
UPDATE jobs SET state = 'failed', owner = NULL, lease_until = NULL, finished_at = now(),
    interruptions = interruptions + 1, result = %(text)s, error_kind = 'interrupted',
    error_detail = CASE WHEN channel = 'none' THEN 'the terminal that asked for it is gone'
        ELSE 'its run was interrupted too often' END
WHERE id = ANY (ARRAY(
    SELECT id FROM jobs WHERE state = 'running' AND lease_until < now()
        AND (interruptions + 1 >= %(most)s OR channel = 'none')
    ORDER BY lease_until LIMIT 100 FOR UPDATE SKIP LOCKED))
RETURNING id, channel"""

FINISH = """
UPDATE jobs SET state = %(state)s, owner = NULL, lease_until = NULL, finished_at = now(), result = %(text)s,
    error_kind = %(error)s, error_detail = %(detail)s, cost_usd = cost_usd + %(cost_usd)s,
    input_tokens = input_tokens + %(input_tokens)s, output_tokens = output_tokens + %(output_tokens)s,
    turns = turns + %(turns)s
WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
RETURNING channel"""

RECORD_ROUTE = """
UPDATE jobs SET route = %(route)s, route_reason = %(reason)s, subagent_id = %(subagent_id)s,
    subagent_version = %(version)s
WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
RETURNING id"""

EVENT = "INSERT INTO job_events (job_id, kind, text) VALUES (%s, %s, %s)"
CALLBACK = "INSERT INTO callbacks (job_id, content, channel) VALUES (%s, %s, %s)"


class Jobs:
    """The jobs table, its timeline, and the outbox rows that a job's end writes."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

    def insert(self, job: NewJob) -> None:
        """Store a job as queued and wake every instance. When this returns, it is committed.

        The same job may be inserted again, after a COMMIT whose answer was lost: it is stored once.
        """
        with self._source.connection() as connection:
            _insert(connection, job)

    def insert_claimed(self, job: NewJob, owner: str, lease_seconds: float) -> Job:
        """Store a job that its inserter runs itself; no other instance ever sees it queued."""
        with self._source.connection() as connection:
            _insert(connection, job)
            return _claim(connection, owner, lease_seconds, limit=1, job_id=job.id)[0]

    def claim(self, owner: str, lease_seconds: float, limit: int) -> list[Job]:
        """Take up to `limit` queued jobs, oldest first, that no other instance is taking."""
        with self._source.connection() as connection:
            return _claim(connection, owner, lease_seconds, limit)

    def claim_one(self, job_id: uuid.UUID, owner: str, lease_seconds: float) -> Job | None:
        """Take this one job, or None when somebody else has it."""
        with self._source.connection() as connection:
            claimed = _claim(connection, owner, lease_seconds, 1, job_id)
        return claimed[0] if claimed else None

    def renew(self, held: Sequence[Job], lease_seconds: float) -> set[uuid.UUID]:
        """Renew the leases of `held`; returns the ids still owned. A missing one is lost for good."""
        with self._source.connection() as connection:
            rows = connection.execute(RENEW, {**_fences(held), "lease": lease_seconds})
            return {row["id"] for row in rows}

    def release(self, held: Sequence[Job]) -> set[uuid.UUID]:
        """Give unfinished jobs back to the queue, unpunished, and wake the other instances."""
        with self._source.connection() as connection:
            released = {row["id"] for row in connection.execute(RELEASE, _fences(held))}
            for job_id in released:
                connection.execute(
                    EVENT, [job_id, "released", "back in the queue; its run ended early through no fault of its own"]
                )
            connection.execute("SELECT pg_notify(%s, '')", [WAKE_CHANNEL])
        return released

    def requeue_expired(self) -> tuple[list[uuid.UUID], list[uuid.UUID]]:
        """Jobs whose owner let the lease run out: (queued again, failed for the third interruption)."""
        with self._source.connection() as connection:
            values: dict[str, Any] = {"most": MAX_INTERRUPTIONS, "text": sentence(ErrorKind.INTERRUPTED)}
            failed = connection.execute(FAIL_INTERRUPTED, values).fetchall()
            requeued = [row["id"] for row in connection.execute(REQUEUE_EXPIRED, values)]
            for job_id in requeued:
                connection.execute(EVENT, [job_id, "interrupted", "its owner is gone; it will run again"])
            for row in failed:
                connection.execute(EVENT, [row["id"], "finished", "failed: interrupted three times"])
                _callback(connection, row["id"], row["channel"], values["text"])
        return requeued, [row["id"] for row in failed]

    def record_route(self, job: Job, route: Route, reason: str, subagent: tuple[int, int] | None) -> None:
        """Write the decision on the job; `subagent` is (id, version). Raises LeaseLost."""
        subagent_id, version = subagent or (None, None)
        with self._source.connection() as connection:
            values = {"route": route, "reason": reason, "subagent_id": subagent_id, "version": version}
            row = connection.execute(RECORD_ROUTE, {**values, "id": job.id, "fence": job.claim_seq}).fetchone()
            if row is None:
                raise LeaseLost(f"job {job.id} has another owner or has ended")
            connection.execute(EVENT, [job.id, "routed", f"{route}: {reason}"])

    def finish(self, job: Job, outcome: Outcome) -> None:
        """End the job and put its callback into the outbox, in one transaction. Raises LeaseLost."""
        usage = outcome.usage
        values = {
            "id": job.id,
            "fence": job.claim_seq,
            "state": outcome.state,
            "text": _storable(outcome.text),
            "error": outcome.error,
            "detail": _storable(outcome.detail) or None,
            "cost_usd": usage.cost_usd,
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "turns": usage.turns,
        }
        with self._source.connection() as connection:
            row = connection.execute(FINISH, values).fetchone()
            if row is None:
                raise LeaseLost(f"job {job.id} has another owner or has ended")
            why = f": {outcome.error}" if outcome.error else ""
            connection.execute(EVENT, [job.id, "finished", f"{outcome.state}{why}"])
            _callback(connection, job.id, row["channel"], _storable(outcome.text))

    def add_event(self, job_id: uuid.UUID, kind: str, text: str) -> None:
        """Add a line to the job's timeline."""
        with self._source.connection() as connection:
            connection.execute(EVENT, [job_id, kind, _storable(text)])

    def timeline(self, job_id: uuid.UUID) -> list[JobEvent]:
        with self._source.connection() as connection:
            query = "SELECT at, kind, text FROM job_events WHERE job_id = %s ORDER BY id"
            return [JobEvent(**row) for row in connection.execute(query, [job_id])]

    def road(self, job_id: uuid.UUID) -> tuple[Route | None, str | None]:
        """Which route the job took, and the name of its subagent."""
        query = "SELECT route, s.name FROM jobs LEFT JOIN subagents s ON s.id = subagent_id WHERE jobs.id = %s"
        with self._source.connection() as connection:
            row = connection.execute(query, [job_id]).fetchone()
        return (Route(row["route"]), row["name"]) if row and row["route"] else (None, None)

    def outcome(self, job_id: uuid.UUID) -> Outcome | None:
        """How the job ended, or None while it has not."""
        with self._source.connection() as connection:
            query = "SELECT * FROM jobs WHERE id = %s AND finished_at IS NOT NULL"
            row = connection.execute(query, [job_id]).fetchone()
        if row is None:
            return None
        error = ErrorKind(row["error_kind"]) if row["error_kind"] else None
        return Outcome(JobState(row["state"]), row["result"] or "", error, row["error_detail"] or "")


def _insert(connection: Connection, job: NewJob) -> None:
    values = {
        "id": job.id,
        "task": job.task,
        "metadata": Jsonb(job.metadata),
        "caller": job.caller,
        "channel": job.channel,
        "callback_url": job.callback.url if job.callback else None,
        "callback_token": job.callback.token if job.callback else None,
        "wake": WAKE_CHANNEL,
    }
    connection.execute(INSERT, values)


def _claim(
    connection: Connection, owner: str, lease_seconds: float, limit: int, job_id: uuid.UUID | None = None
) -> list[Job]:
    values = {"owner": owner, "lease": lease_seconds, "limit": limit, "id": job_id}
    jobs = [_job(row) for row in connection.execute(CLAIM, values)]
    for job in jobs:
        connection.execute(EVENT, [job.id, "claimed", f"by {owner}"])
    return sorted(jobs, key=lambda job: job.created_at)


def _callback(connection: Connection, job_id: uuid.UUID, channel: str, content: str) -> None:
    if channel != Channel.NONE:
        connection.execute(CALLBACK, [job_id, callback_content(content), channel])


def _storable(text: str) -> str:
    """What an agent wrote, without the characters that PostgreSQL's text refuses (NUL, lone surrogates)."""
    return text.replace("\x00", "").encode(errors="replace").decode()


def _fences(held: Sequence[Job]) -> Mapping[str, Any]:
    return {"ids": [job.id for job in held], "fences": [job.claim_seq for job in held]}


def _job(row: DictRow) -> Job:
    url, token = row["callback_url"], row["callback_token"]
    return Job(
        id=row["id"],
        task=row["task"],
        metadata=row["metadata"],
        caller=row["caller"],
        channel=Channel(row["channel"]),
        callback=CallbackTarget(url, token) if url else None,
        state=JobState(row["state"]),
        claim_seq=row["claim_seq"],
        interruptions=row["interruptions"],
        created_at=row["created_at"],
    )
