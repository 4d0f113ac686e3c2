"""What a subagent learns from how its jobs end, and from what people say of the results."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg.rows import DictRow

from pokestrator.jobs import Job, JobState, Route, Verdict
from pokestrator.store.connection import reason_of
from pokestrator.store.examples import forget, praise, remember
from pokestrator.store.pool import Connection
from pokestrator.store.rows import storable, write_event
from pokestrator.subagents import State
from pokestrator.telemetry import get_logger, one_line

log = get_logger(__name__)

GOOD_RUNS = 2  # of its current version, that end a subagent's probation
LEARNED_ROUTES = (Route.MATCH, Route.TEMPLATE)  # what was built for a task knows it already

# Whoever locks both a job and its subagent locks the job first. Not FOR UPDATE: jobs that begin refer to the row.
HOLD_SUBAGENT = "SELECT name, state, version FROM subagents WHERE id = %s FOR NO KEY UPDATE"

MARK_SECRET = "UPDATE jobs SET holds_secret = true WHERE id = %s"

TRUST = """
UPDATE subagents SET state = 'active'
WHERE id = %(id)s AND state = 'probation' AND %(good_runs)s <= (
    SELECT count(*) FROM (
        SELECT FROM jobs
        WHERE subagent_id = %(id)s AND subagent_version = %(version)s AND state = 'succeeded'
            AND verdict IS DISTINCT FROM 'bad'
        LIMIT %(good_runs)s) AS good)
RETURNING name"""

# Of the drafter's own words alone: what the owner or a template says was trusted from the start.
DISTRUST = """
UPDATE subagents SET state = 'probation'
FROM subagent_versions v
WHERE subagents.id = %(id)s AND state = 'active' AND v.subagent_id = subagents.id AND v.version = subagents.version
    AND subagents.version = %(version)s AND v.author = 'drafter' AND %(good_runs)s > (
        SELECT count(*) FROM jobs
        WHERE subagent_id = %(id)s AND subagent_version = %(version)s AND state = 'succeeded'
            AND verdict IS DISTINCT FROM 'bad')
RETURNING name"""

HOLD_JOB = """
SELECT state, task, route, subagent_id, subagent_version, holds_secret, verdict, coalesce(verdict_note, '') AS note
FROM jobs WHERE id = %s FOR UPDATE"""

JUDGE = """
UPDATE jobs SET verdict = %(verdict)s, verdict_note = nullif(%(note)s, ''), verdict_at = now() WHERE id = %(id)s"""

# The rest of the transaction is a job's end. It goes on after whatever fails here, and waits for nobody for long.
BEGIN_OPTIONAL = b"SAVEPOINT optional; SET LOCAL lock_timeout = '200ms'"
END_OPTIONAL = b"RELEASE SAVEPOINT optional"
UNDO_OPTIONAL = b"ROLLBACK TO SAVEPOINT optional"


def learn(connection: Connection, job: Job, held: DictRow, *, holds_secret: bool) -> None:
    """Let the subagent learn from a job that has just succeeded in this transaction. Nothing here makes that fail.

    `held`: the job's `route`, `subagent_id` and `subagent_version`. `holds_secret`: the task is not to be remembered.
    """
    if holds_secret:
        connection.execute(MARK_SECRET, [job.id])
    if held["subagent_id"] is None:
        return
    with _optional(connection, job.id):
        subagent = connection.execute(HOLD_SUBAGENT, [held["subagent_id"]]).fetchone()
        if subagent is None:
            return
        if held["route"] in LEARNED_ROUTES and not holds_secret:
            remember(connection, held["subagent_id"], job.id, job.task)
        _trust(connection, job.id, held, subagent)


def judge(connection: Connection, job_id: uuid.UUID, verdict: Verdict, note: str) -> None:
    """Write what a person says of a job's result, and let its subagent learn from it. The last verdict counts.

    Of a job that has not succeeded there is none: then nothing happens.
    """
    job = connection.execute(HOLD_JOB, [job_id]).fetchone()
    if job is None or job["state"] != JobState.SUCCEEDED:
        return
    note = storable(note)
    if job["verdict"] == verdict and note in ("", job["note"]):
        return
    connection.execute(JUDGE, {"id": job_id, "verdict": verdict, "note": note})
    write_event(connection, job_id, "feedback", f"{verdict}: {one_line(note)}" if note else verdict)
    if job["verdict"] != verdict and job["subagent_id"] is not None:
        _learn_from(connection, job_id, job, verdict)


def _learn_from(connection: Connection, job_id: uuid.UUID, job: DictRow, verdict: Verdict) -> None:
    subagent_id = job["subagent_id"]
    subagent = connection.execute(HOLD_SUBAGENT, [subagent_id]).fetchone()
    assert subagent is not None, "a job refers to none that is not there"
    if job["route"] in LEARNED_ROUTES and not job["holds_secret"]:
        if verdict is Verdict.BAD:
            forget(connection, subagent_id, job_id, job["task"])
        else:
            if job["verdict"] == Verdict.BAD:  # it was counted when it ended, until then
                remember(connection, subagent_id, job_id, job["task"])
            praise(connection, subagent_id, job_id, job["task"])
    if verdict is Verdict.GOOD:
        _trust(connection, job_id, job, subagent)
    else:
        _distrust(connection, job_id, job)


def _trust(connection: Connection, job_id: uuid.UUID, job: DictRow, subagent: DictRow) -> None:
    """End the subagent's probation, if enough runs of its current version went well."""
    if subagent["state"] != State.PROBATION or subagent["version"] != job["subagent_version"]:
        return
    values = {"id": job["subagent_id"], "version": subagent["version"], "good_runs": GOOD_RUNS}
    if connection.execute(TRUST, values).fetchone() is not None:
        write_event(connection, job_id, "trusted", f"{subagent['name']} is active: {GOOD_RUNS} of its runs went well")
        log.info("trusted", request_id=str(job_id), subagent=subagent["name"])


def _distrust(connection: Connection, job_id: uuid.UUID, job: DictRow) -> None:
    """Begin the subagent's probation again, where too few of its runs are left that nobody has rejected."""
    values = {"id": job["subagent_id"], "version": job["subagent_version"], "good_runs": GOOD_RUNS}
    if (row := connection.execute(DISTRUST, values).fetchone()) is not None:
        write_event(connection, job_id, "distrusted", f"{row['name']} is on probation: too few of its runs went well")


@contextmanager
def _optional(connection: Connection, job_id: uuid.UUID) -> Iterator[None]:
    """A part of a transaction that the rest can do without: when a statement of it fails, it alone is undone."""
    connection.execute(BEGIN_OPTIONAL)
    try:
        yield
    except psycopg.Error as error:
        if connection.closed:
            raise
        connection.execute(UNDO_OPTIONAL)
        log.warning("not_learned", request_id=str(job_id), reason=reason_of(error))
    else:
        connection.execute(END_OPTIONAL)
