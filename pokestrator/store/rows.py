"""What several stores read and write alike: a job's row, a line of its timeline, its end with the message about it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from psycopg.rows import DictRow

from pokestrator.jobs import Channel, Job, JobState, Outcome, callback_content
from pokestrator.runs import Usage
from pokestrator.store.pool import Connection

WAKE_CHANNEL = "pokestrator_jobs"

EVENT = "INSERT INTO job_events (job_id, kind, text) VALUES (%s, %s, %s)"
CALLBACK = "INSERT INTO callbacks (job_id, content, channel) VALUES (%s, %s, %s)"

SPEND = """
INSERT INTO spending (day, caller, usd)
SELECT (now() AT TIME ZONE 'UTC')::date, coalesce(caller, ''), %(usd)s FROM jobs WHERE id = %(id)s
ON CONFLICT (day, caller) DO UPDATE SET usd = spending.usd + excluded.usd"""

# In the order of the rows that it locks: two transactions that do this must not wait for each other.
SPEND_RESERVED = """
INSERT INTO spending (day, caller, usd)
SELECT (now() AT TIME ZONE 'UTC')::date, coalesce(caller, ''), sum(reserved_usd) FROM jobs
WHERE id = ANY (%(ids)s) AND reserved_usd > 0 GROUP BY 2 ORDER BY 2
ON CONFLICT (day, caller) DO UPDATE SET usd = spending.usd + excluded.usd"""

# Only for a row that this transaction has locked and found to be the caller's to end.
END = """
UPDATE jobs SET state = %(state)s, owner = NULL, lease_until = NULL, finished_at = now(), result = %(text)s,
    error_kind = %(error)s, error_detail = %(detail)s, interruptions = interruptions + %(interruptions)s,
    cost_usd = cost_usd + %(cost_usd)s, input_tokens = input_tokens + %(input_tokens)s,
    output_tokens = output_tokens + %(output_tokens)s, turns = turns + %(turns)s
WHERE id = %(id)s
RETURNING channel"""


def end_job(connection: Connection, job_id: uuid.UUID, outcome: Outcome, *, interruptions: int = 0) -> None:
    """End a job and put the message about it into the outbox."""
    values = {
        "id": job_id,
        "state": outcome.state,
        "text": storable(outcome.text),
        "error": outcome.error,
        "detail": storable(outcome.detail) or None,
        "interruptions": interruptions,
        **usage_values(outcome.usage),
    }
    row = connection.execute(END, values).fetchone()
    assert row is not None, "the caller has locked this row"
    spend(connection, job_id, outcome.usage)
    why = f": {outcome.error}" if outcome.error else ""
    write_event(connection, job_id, "finished", f"{outcome.state}{why}")
    if row["channel"] != Channel.NONE:
        connection.execute(CALLBACK, [job_id, callback_content(storable(outcome.text)), row["channel"]])


def spend(connection: Connection, job_id: uuid.UUID, usage: Usage) -> None:
    """Write down what a run has cost, on today's account."""
    if usage.cost_usd > 0:
        connection.execute(SPEND, {"id": job_id, "usd": usage.cost_usd})


def spend_reserved(connection: Connection, job_ids: Sequence[uuid.UUID]) -> None:
    """What runs have cost that can no longer say it counts as all that they had reserved."""
    connection.execute(SPEND_RESERVED, {"ids": list(job_ids)})


def write_event(connection: Connection, job_id: uuid.UUID, kind: str, text: str) -> None:
    """Add a line to a job's timeline."""
    connection.execute(EVENT, [job_id, kind, storable(text)])


def wake_all(connection: Connection) -> None:
    """Wake every instance's dispatcher once this transaction has committed."""
    connection.execute("SELECT pg_notify(%s, '')", [WAKE_CHANNEL])


def usage_values(usage: Usage) -> dict[str, float]:
    return {
        "cost_usd": usage.cost_usd,
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "turns": usage.turns,
    }


def storable(text: str) -> str:
    """What an agent wrote, without the characters that PostgreSQL's text refuses (NUL, lone surrogates)."""
    return text.replace("\x00", "").encode(errors="replace").decode()


def job_of(row: DictRow) -> Job:
    """A whole row of jobs as its runner sees it."""
    return Job(
        id=row["id"],
        task=row["task"],
        metadata=row["metadata"],
        caller=row["caller"],
        channel=Channel(row["channel"]),
        state=JobState(row["state"]),
        claim_seq=row["claim_seq"],
        interruptions=row["interruptions"],
        api_retries=row["api_retries"],
        created_at=row["created_at"],
    )
