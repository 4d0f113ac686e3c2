"""Jobs in PostgreSQL: one function per transition of the picture in pokestrator/jobs.py, each SQL beside its function.

Every write that ends or renews a run names the fence (`claim_seq`) of its claim. No row means that the lease was
lost: LeaseLost. All functions raise StoreUnavailable when PostgreSQL cannot be reached. How a task comes in stands in
accepting.py, what befalls runs whose owner is gone in recovery.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from psycopg.rows import DictRow
from psycopg.types.json import Jsonb

from pokestrator.errors import LeaseLost
from pokestrator.intake import TaskLimits
from pokestrator.jobs import Job, JobState, NewJob, Outcome, Route, ending
from pokestrator.runs import ErrorKind, Usage, sentence
from pokestrator.store import accepting
from pokestrator.store.learning import learn
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.rows import (
    end_job,
    job_of,
    spend,
    spend_reserved,
    storable,
    usage_values,
    wake_all,
    write_event,
)
from pokestrator.store.secrets import Vault

MAX_INTERRUPTIONS = 3

# A claim makes the run's owner, its lease and its fence in one step; rows that others are claiming are passed over.
# ARRAY(…) has the subquery run once. As `id IN (SELECT … LIMIT …)` the planner may run it again for each row, and the
# limit is not kept. No wait is longer than two minutes: a run_at beyond that was written before the clock went back. A
# terminal's job (channel none) is claimed by its terminal, by id.
CLAIM = """
UPDATE jobs SET state = 'running', claim_seq = claim_seq + 1, owner = %(owner)s, reserved_usd = 0,
    lease_until = now() + make_interval(secs => %(lease)s), started_at = coalesce(started_at, now())
WHERE id = ANY (ARRAY(
    SELECT id FROM jobs
    WHERE state = 'queued' AND (run_at <= now() OR run_at > now() + interval '2 minutes') AND NOT cancel_requested
        AND (id = %(id)s OR (%(id)s::uuid IS NULL AND channel <> 'none'))
    ORDER BY run_at LIMIT %(limit)s FOR UPDATE SKIP LOCKED))
RETURNING *"""

# A row that somebody else has locked is passed over: one that hangs must not cost all the others their leases.
RENEW = """
UPDATE jobs SET lease_until = now() + make_interval(secs => %(lease)s)
WHERE id = ANY (ARRAY(
    SELECT jobs.id FROM jobs
        JOIN unnest(%(ids)s::uuid[], %(fences)s::bigint[]) AS mine (id, claim_seq) USING (id, claim_seq)
    WHERE state = 'running' FOR UPDATE OF jobs SKIP LOCKED))"""

OWNED = """
SELECT id, claim_seq FROM jobs
    JOIN unnest(%(ids)s::uuid[], %(fences)s::bigint[]) AS mine (id, claim_seq) USING (id, claim_seq)
WHERE state = 'running'"""

# What comes back is not younger than before: it keeps its place in the queue.
RELEASE = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL, run_at = least(created_at, now())
FROM unnest(%(ids)s::uuid[], %(fences)s::bigint[]) AS mine (id, claim_seq)
WHERE jobs.id = mine.id AND jobs.claim_seq = mine.claim_seq AND state = 'running'
RETURNING jobs.id"""

HOLD = """
SELECT cancel_requested, runs, interruptions, route, subagent_id, subagent_version FROM jobs
WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
FOR UPDATE"""

# Only for a row that is held.
REQUEUE = """
UPDATE jobs SET state = 'queued', owner = NULL, lease_until = NULL,
    run_at = CASE WHEN %(wait)s > 0 THEN now() + make_interval(secs => %(wait)s) ELSE least(created_at, now()) END,
    interruptions = interruptions + %(interruptions)s, api_retries = api_retries + %(api_retries)s,
    cost_usd = cost_usd + %(cost_usd)s, input_tokens = input_tokens + %(input_tokens)s,
    output_tokens = output_tokens + %(output_tokens)s, turns = turns + %(turns)s
WHERE id = %(id)s"""

# Which subagent an earlier run was routed to says nothing of this one.
RECORD_ROUTE = """
UPDATE jobs SET route = %(route)s, route_reason = %(reason)s, decision = %(decision)s, subagent_id = NULL,
    subagent_version = NULL
WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
RETURNING id"""

NOTE = """
INSERT INTO job_events (job_id, kind, text)
SELECT id, %(kind)s, %(text)s FROM jobs WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'"""

BEGIN_RUN = """
UPDATE jobs SET runs = runs + 1, subagent_id = %(subagent_id)s, subagent_version = %(version)s, run_began_at = now()
WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
RETURNING id"""


class Jobs:
    """The jobs table as those see it who accept tasks and run them."""

    def __init__(self, source: ConnectionSource, vault: Vault | None = None, limits: TaskLimits | None = None) -> None:
        """`vault`: what callback tokens are encrypted with; without one they are stored as they come.

        `limits`: of each caller; None: there are none.
        """
        self._source = source
        self._vault = vault or Vault()
        self._limits = limits

    def insert(self, job: NewJob, within: float | None = None) -> uuid.UUID:
        """Store a job as queued and wake every instance. When this returns, it is committed.

        Returns the job's id, or that of the earlier one which it repeats. The same job may be inserted again, after a
        COMMIT whose answer was lost: it is stored once. `within`: seconds after which it gives up. Raises TooManyTasks.
        """
        with self._source.connection(within) as connection:
            return accepting.insert(connection, self._sealed(job), self._limits)

    def insert_claimed(self, job: NewJob, owner: str, lease_seconds: float) -> Job:
        """Store a job that its inserter runs itself; no other instance ever sees it queued."""
        with self._source.connection() as connection:
            accepting.insert(connection, self._sealed(job), self._limits)
            return _claim(connection, owner, lease_seconds, limit=1, job_id=job.id)[0]

    def claim(self, owner: str, lease_seconds: float, limit: int) -> list[Job]:
        """Take up to `limit` queued jobs, oldest first, that no other instance is taking."""
        with self._source.connection() as connection:
            return _claim(connection, owner, lease_seconds, limit)

    def claim_one(self, job_id: uuid.UUID, owner: str, lease_seconds: float) -> Job | None:
        """Take this one job, or None when somebody else has it or it is not to run now."""
        with self._source.connection() as connection:
            claimed = _claim(connection, owner, lease_seconds, 1, job_id)
        return claimed[0] if claimed else None

    def renew(self, held: Sequence[Job], lease_seconds: float) -> set[tuple[uuid.UUID, int]]:
        """Renew the leases of `held`; returns the claims still owned, as (id, claim_seq). Others are lost for good."""
        with self._source.connection() as connection:
            connection.execute(RENEW, {**fences(held), "lease": lease_seconds})
            return {(row["id"], row["claim_seq"]) for row in connection.execute(OWNED, fences(held))}

    def release(self, held: Sequence[Job], within: float | None = None) -> set[uuid.UUID]:
        """Give unfinished jobs back to the queue, unpunished, and wake the other instances."""
        with self._source.connection(within) as connection:
            released = {row["id"] for row in connection.execute(RELEASE, fences(held))}
            spend_reserved(connection, list(released))
            for job_id in released:
                write_event(connection, job_id, "released", "back in the queue; its run ended early, not by its fault")
            wake_all(connection)
        return released

    def interrupt(self, job: Job, detail: str, usage: Usage) -> Outcome | None:
        """Queue a job again whose run was cut short here. Its third interruption ends it, a cancellation too: then how.

        Raises LeaseLost.
        """
        with self._source.connection() as connection:
            held = _hold(connection, job)
            if held["interruptions"] + 1 >= MAX_INTERRUPTIONS or held["cancel_requested"]:
                text = sentence(ErrorKind.INTERRUPTED)
                outcome = Outcome(JobState.FAILED, text, ErrorKind.INTERRUPTED, detail, usage)
                return _end(connection, job, held, outcome, interruptions=1)
            _requeue(connection, job, usage, interruptions=1)
            write_event(connection, job.id, "interrupted", f"it will run again: {detail}")
            return None

    def retry(self, job: Job, wait_seconds: float, detail: str, usage: Usage, *, counts: bool = True) -> Outcome | None:
        """Queue a job again for after `wait_seconds`, because the API had trouble. A cancelled one ends: then how.

        Not `counts`: it was no trouble, it only has to wait. Raises LeaseLost.
        """
        with self._source.connection() as connection:
            held = _hold(connection, job)
            if held["cancel_requested"]:
                return _end(connection, job, held, Outcome(JobState.FAILED, "", detail=detail, usage=usage))
            _requeue(connection, job, usage, wait=wait_seconds, api_retries=int(counts))
            write_event(connection, job.id, "retry" if counts else "waits", f"in {wait_seconds:.0f} s: {detail}")
            return None

    def record_route(self, job: Job, route: Route, reason: str, decision: Mapping[str, Any] | None = None) -> None:
        """Write the decision on the job, and the whole of it as data. Raises LeaseLost."""
        with self._source.connection() as connection:
            values: dict[str, Any] = {"id": job.id, "fence": job.claim_seq, "route": route, "reason": storable(reason)}
            values["decision"] = Jsonb(decision) if decision else None
            _only_owner(job, connection.execute(RECORD_ROUTE, values).fetchone())
            write_event(connection, job.id, "routed", f"{route}: {reason}")

    def begin_run(self, job: Job, subagent_id: int, version: int, note: str) -> None:
        """Count a run of an agent, before it is started: what comes of a second one says so. Raises LeaseLost."""
        with self._source.connection() as connection:
            values = {"id": job.id, "fence": job.claim_seq, "subagent_id": subagent_id, "version": version}
            _only_owner(job, connection.execute(BEGIN_RUN, values).fetchone())
            write_event(connection, job.id, "running", note)

    def note(self, job: Job, kind: str, text: str) -> None:
        """Add a line to the timeline of a job that still is the caller's; a late owner's is dropped."""
        values = {"id": job.id, "fence": job.claim_seq, "kind": kind, "text": storable(text)}
        with self._source.connection() as connection:
            connection.execute(NOTE, values)

    def finish(self, job: Job, outcome: Outcome) -> Outcome:
        """End the job and put its callback into the outbox, in one transaction; returns how it really ended. What it
        did well, its subagent remembers.

        Raises LeaseLost.
        """
        with self._source.connection() as connection:
            return _end(connection, job, _hold(connection, job), outcome)

    def _sealed(self, job: NewJob) -> NewJob:
        """The job with its callback token as it is stored."""
        if job.callback is None:
            return job
        return replace(job, callback=replace(job.callback, token=self._vault.seal(job.callback.token)))


def _claim(
    connection: Connection, owner: str, lease_seconds: float, limit: int, job_id: uuid.UUID | None = None
) -> list[Job]:
    values = {"owner": owner, "lease": lease_seconds, "limit": limit, "id": job_id}
    jobs = [job_of(row) for row in connection.execute(CLAIM, values)]
    for job in jobs:
        write_event(connection, job.id, "claimed", f"by {owner}")
    return sorted(jobs, key=lambda job: job.created_at)


def _hold(connection: Connection, job: Job) -> DictRow:
    """Lock the row of a job that is still the caller's. Raises LeaseLost."""
    return _only_owner(job, connection.execute(HOLD, {"id": job.id, "fence": job.claim_seq}).fetchone())


def _only_owner(job: Job, row: DictRow | None) -> DictRow:
    if row is None:
        raise LeaseLost(f"job {job.id} has another owner or has ended")
    return row


def _end(connection: Connection, job: Job, held: DictRow, outcome: Outcome, interruptions: int = 0) -> Outcome:
    final = ending(outcome, cancel_requested=held["cancel_requested"], runs=held["runs"])
    end_job(connection, job.id, final, interruptions=interruptions)
    if final.state is JobState.SUCCEEDED:
        learn(connection, job, held, holds_secret=outcome.holds_secret)
    return final


def _requeue(
    connection: Connection, job: Job, usage: Usage, *, wait: float = 0.0, interruptions: int = 0, api_retries: int = 0
) -> None:
    counts = {"wait": wait, "interruptions": interruptions, "api_retries": api_retries}
    connection.execute(REQUEUE, {"id": job.id, **counts, **usage_values(usage)})
    spend(connection, job.id, usage)
    wake_all(connection)


def fences(held: Sequence[Job]) -> Mapping[str, Any]:
    """Claims as parameters: `ids` and `fences`, side by side."""
    return {"ids": [job.id for job in held], "fences": [job.claim_seq for job in held]}
