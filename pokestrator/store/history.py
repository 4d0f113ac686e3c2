"""What has become of a job: its timeline, its route, its end; and what its caller may ask about it.

All functions raise StoreUnavailable when PostgreSQL cannot be reached.
"""

from __future__ import annotations

import uuid
from typing import Any

from psycopg.rows import DictRow

from pokestrator.intake import Action, Question
from pokestrator.jobs import CANCELLED, CallbackState, JobEvent, JobState, JobStatus, Outcome, Route, Verdict
from pokestrator.runs import ErrorKind
from pokestrator.store.learning import judge
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.rows import end_job, wake_all, write_event

# Callers see their own jobs only; those without a name, each other's, if they know the id. A terminal's are nobody's.
BY_ID = """
SELECT id FROM jobs WHERE id = %(id)s AND caller IS NOT DISTINCT FROM %(caller)s AND channel <> 'none'"""

LATEST = """
SELECT id FROM jobs WHERE caller = %(caller)s AND channel <> 'none' ORDER BY created_at DESC LIMIT 1"""

# Whoever says that it was good or bad has the message in mind that came last. Among the newest 200, for which there is
# an index: only somebody who has as many under way at once could mean an older one.
LATEST_ENDED = """
SELECT id FROM (
    SELECT id, finished_at, created_at FROM jobs WHERE caller = %(caller)s AND channel <> 'none'
    ORDER BY created_at DESC LIMIT 200) AS newest
WHERE finished_at IS NOT NULL ORDER BY finished_at DESC, created_at DESC LIMIT 1"""

STATUS = """
SELECT jobs.id, jobs.state, jobs.task, cancel_requested, result, verdict, callbacks.state AS delivery,
    greatest(extract(epoch FROM now() - jobs.created_at), 0)::float8 AS age,
    CASE WHEN jobs.state = 'queued' THEN greatest(extract(epoch FROM run_at - now()), 0)::float8 ELSE 0 END AS waits,
    latest.at, latest.kind, latest.text
FROM jobs LEFT JOIN callbacks ON callbacks.job_id = jobs.id
    LEFT JOIN LATERAL (
        SELECT at, kind, text FROM job_events WHERE job_id = jobs.id ORDER BY job_events.id DESC LIMIT 1
    ) latest ON true
WHERE jobs.id = %s"""


class History:
    """Jobs as those see them who look back."""

    def __init__(self, source: ConnectionSource) -> None:
        self._source = source

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

    def decision(self, job_id: uuid.UUID) -> dict[str, Any] | None:
        """How the job was routed and why, or None where that is not known."""
        with self._source.connection() as connection:
            row = connection.execute("SELECT decision FROM jobs WHERE id = %s", [job_id]).fetchone()
        return row["decision"] if row else None

    def outcome(self, job_id: uuid.UUID) -> Outcome | None:
        """How the job ended, or None while it has not."""
        with self._source.connection() as connection:
            query = "SELECT * FROM jobs WHERE id = %s AND finished_at IS NOT NULL"
            row = connection.execute(query, [job_id]).fetchone()
        if row is None:
            return None
        error = ErrorKind(row["error_kind"]) if row["error_kind"] else None
        return Outcome(JobState(row["state"]), row["result"] or "", error, row["error_detail"] or "")

    def answer(self, question: Question, within: float | None = None) -> JobStatus | None:
        """The status of the caller's job that is asked about, after it was cancelled or judged if that was asked.

        None when the caller has no such job. A running job is only marked as cancelled: its owner ends it and tells the
        person. One that has not succeeded is not judged. Without a request_id the caller's latest job is meant, for a
        verdict the one that ended last.
        """
        with self._source.connection(within) as connection:
            values = {"id": question.request_id, "caller": question.caller}
            latest = LATEST_ENDED if question.action is Action.FEEDBACK else LATEST
            found = connection.execute(latest if question.request_id is None else BY_ID, values).fetchone()
            if found is None:
                return None
            if question.action is Action.CANCEL:
                _cancel(connection, found["id"])
            elif question.action is Action.FEEDBACK:
                assert question.verdict is not None, "intake has checked it"
                judge(connection, found["id"], question.verdict, question.note)
            return _status(connection, found["id"])

    def judge(self, job_id: uuid.UUID, verdict: Verdict, note: str) -> JobStatus | None:
        """Write the owner's verdict on anybody's job; None when there is no such job. One that has not succeeded is
        not judged: its status says so."""
        with self._source.connection() as connection:
            if connection.execute("SELECT FROM jobs WHERE id = %s", [job_id]).fetchone() is None:
                return None
            judge(connection, job_id, verdict, note)
            return _status(connection, job_id)


def _cancel(connection: Connection, job_id: uuid.UUID) -> None:
    row = connection.execute("SELECT state, cancel_requested FROM jobs WHERE id = %s FOR UPDATE", [job_id]).fetchone()
    assert row is not None
    if row["state"] == JobState.QUEUED:
        end_job(connection, job_id, Outcome(JobState.CANCELLED, CANCELLED))
    elif row["state"] == JobState.RUNNING and not row["cancel_requested"]:
        connection.execute("UPDATE jobs SET cancel_requested = true WHERE id = %s", [job_id])
        write_event(connection, job_id, "cancelling", "as its caller asked")
        wake_all(connection)


def _status(connection: Connection, job_id: uuid.UUID) -> JobStatus | None:
    """None when it has just been removed, as those are that ended long ago."""
    row = connection.execute(STATUS, [job_id]).fetchone()
    return _status_of(row) if row else None


def _status_of(row: DictRow) -> JobStatus:
    return JobStatus(
        request_id=row["id"],
        state=JobState(row["state"]),
        task=row["task"],
        age_seconds=row["age"],
        cancel_requested=row["cancel_requested"],
        waits_seconds=row["waits"],
        latest=JobEvent(row["at"], row["kind"], row["text"]) if row["kind"] else None,
        result=row["result"],
        delivery=CallbackState(row["delivery"]) if row["delivery"] else None,
        verdict=Verdict(row["verdict"]) if row["verdict"] else None,
    )
