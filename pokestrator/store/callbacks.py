"""The outbox in PostgreSQL: callbacks that wait, are being sent, were delivered or are dead letters.

A claim counts an attempt and holds the row for a while; the attempt's number, which only ever grows, is the fence of
what is written about it, so that a sender which was too late changes nothing. All times are the database's.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from psycopg.rows import DictRow

from pokestrator.errors import SecretKeyError
from pokestrator.jobs import CallbackState, CallbackTarget, Channel
from pokestrator.store.pool import Connection, ConnectionSource
from pokestrator.store.rows import storable, write_event
from pokestrator.store.secrets import Vault

HOLD_SECONDS = 90  # a POST takes 45 at most, and what came of it is still to be written after an outage of half that
UNSENDABLE_HOURS = 76  # as long as tries last
HOST_IN_URL = "//(?:[^/?#]*@)?([^/?#]*)"  # with its port; Python and PostgreSQL read it alike

# ARRAY(…) has the subquery run once; with IN the planner may run it for each row, and the limit is not kept.
# A hold further ahead than any claim makes it was written before the clock went back.
CLAIM_DUE = """
UPDATE callbacks SET attempts = attempts + 1, lease_until = now() + make_interval(secs => %(hold)s)
FROM jobs
WHERE jobs.id = callbacks.job_id AND callbacks.id = ANY (ARRAY(
    SELECT due.id FROM callbacks AS due JOIN jobs AS job ON job.id = due.job_id
    WHERE due.state = 'pending' AND due.next_attempt_at <= now()
        AND (due.lease_until IS NULL OR due.lease_until < now() OR due.lease_until > now() + interval '10 minutes')
        AND due.channel = ANY (%(channels)s::channel[])
        AND (%(job_id)s::uuid IS NULL OR due.job_id = %(job_id)s)
        AND NOT due.id = ANY (%(not_ids)s::uuid[])
        AND NOT (due.channel = 'callback' AND (job.callback_url = ANY (%(busy)s::text[])
            OR lower(substring(job.callback_url FROM %(host)s)) = ANY (%(busy_hosts)s::text[])))
    ORDER BY due.next_attempt_at LIMIT %(limit)s FOR UPDATE OF due SKIP LOCKED))
RETURNING callbacks.*, attempts - attempts_before AS tries, extract(epoch FROM now() - begun_at)::float AS age_seconds,
    jobs.callback_url, jobs.callback_token, left(jobs.task, 200) AS task"""

DELIVERED = """
UPDATE callbacks SET state = 'delivered', ended_at = now(), lease_until = NULL, last_status = %(status)s,
    last_error = NULL
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending'"""

DEAD = """
UPDATE callbacks SET state = 'dead', ended_at = now(), lease_until = NULL, last_status = %(status)s,
    last_error = %(error)s
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending' AND attempts_before < %(attempt)s"""

RETRY = """
UPDATE callbacks SET lease_until = NULL, next_attempt_at = now() + make_interval(secs => %(wait)s),
    channel = %(channel)s, last_status = %(status)s, last_error = %(error)s
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending' AND attempts_before < %(attempt)s"""

# The job was given a new address, or was replayed, while this attempt was made: its schedule has begun anew, and what
# the old address said ends nothing and puts nothing off. attempts_before never shrinks, so this can come second.
FAILED_BEFORE_ITS_SCHEDULE = """
UPDATE callbacks SET lease_until = NULL, last_status = %(status)s, last_error = %(error)s
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending' AND attempts_before >= %(attempt)s"""

# Not counted as a try, and once: a COMMIT whose answer was lost has cleared the hold.
GIVE_BACK = """
UPDATE callbacks SET lease_until = NULL, next_attempt_at = now(), attempts_before = least(attempts_before + 1, attempts)
WHERE id = %(id)s AND attempts = %(attempt)s AND state = 'pending' AND lease_until IS NOT NULL"""

# Only for a row that this transaction has claimed; not counted as a try.
FALL_BACK = """
UPDATE callbacks SET channel = 'api_message', lease_until = NULL, last_error = %s,
    attempts_before = least(attempts_before + 1, attempts) WHERE id = %s"""

# The longest waits, with some to spare: none before the first try, an hour after the next ones (if the receiver asks
# for it), 29 hours after the last but one.
BRING_FORWARD = """
UPDATE callbacks SET next_attempt_at = now()
WHERE state = 'pending' AND next_attempt_at > now() + interval '1 minute'
    AND next_attempt_at > now() + CASE
        WHEN attempts = attempts_before THEN interval '1 minute'
        WHEN attempts - attempts_before <= 5 THEN interval '2 hours'
        ELSE interval '30 hours' END"""

END_UNSENDABLE = """
WITH dead AS (
    UPDATE callbacks SET state = 'dead', ended_at = now(), last_status = NULL, last_error = %(reason)s
    WHERE state = 'pending' AND next_attempt_at < now() - make_interval(hours => %(hours)s) AND lease_until IS NULL
        AND NOT channel = ANY (%(channels)s::channel[])
    RETURNING job_id
), event AS (
    INSERT INTO job_events (job_id, kind, text) SELECT job_id, 'callback dead', %(reason)s FROM dead
)
SELECT count(*) FROM dead"""

DEAD_LETTERS = """
SELECT job_id, ended_at, attempts - attempts_before AS tries, last_status, last_error, content FROM callbacks
WHERE state = 'dead' ORDER BY ended_at DESC LIMIT %s"""

STATE = "SELECT state FROM callbacks WHERE id = %(id)s OR job_id = %(id)s FOR UPDATE"

REPLAY = """
WITH replayed AS (
    UPDATE callbacks SET state = 'pending', ended_at = NULL, begun_at = now(), next_attempt_at = now(),
        attempts_before = attempts
    WHERE state = 'dead' AND (%(id)s::uuid IS NULL OR id = %(id)s OR job_id = %(id)s)
    RETURNING job_id
), event AS (
    INSERT INTO job_events (job_id, kind, text) SELECT job_id, 'replayed', 'its tries begin anew' FROM replayed
)
SELECT count(*) FROM replayed"""

DISCARD = """
WITH discarded AS (
    DELETE FROM callbacks WHERE state = 'dead' AND (%(id)s::uuid IS NULL OR id = %(id)s OR job_id = %(id)s)
    RETURNING job_id
), event AS (
    INSERT INTO job_events (job_id, kind, text)
    SELECT job_id, 'dead letter discarded', 'it was never delivered' FROM discarded
)
SELECT count(*) FROM discarded"""


@dataclass(frozen=True)
class Callback:
    """One claimed attempt to deliver a job's result."""

    id: uuid.UUID
    job_id: uuid.UUID
    task: str
    content: str
    channel: Channel
    target: CallbackTarget | None  # for Channel.CALLBACK
    attempt: int  # the fence
    tries: int  # the number of this one in its schedule, from 1
    age_seconds: float  # since the schedule began; negative when the clock went back


@dataclass(frozen=True)
class DeadLetter:
    """A callback that was given up. It is kept until it is replayed or discarded."""

    request_id: uuid.UUID
    at: datetime
    tries: int
    status: int | None  # of the last answer, if there was one
    reason: str
    content: str


class Callbacks:
    """The callbacks table. All functions raise StoreUnavailable when PostgreSQL cannot be reached."""

    def __init__(self, source: ConnectionSource, vault: Vault | None = None) -> None:
        """`vault`: what callback tokens were encrypted with."""
        self._source = source
        self._vault = vault or Vault()

    # sending ---------------------------------------------------------------------------------------------------

    def claim_due(
        self,
        channels: Sequence[Channel],
        limit: int,
        job_id: uuid.UUID | None = None,
        *,
        busy: Sequence[str] = (),
        busy_hosts: Sequence[str] = (),
        not_ids: Sequence[uuid.UUID] = (),
    ) -> list[Callback]:
        """Take up to `limit` callbacks whose time has come, on these channels.

        None of them at a callback URL among `busy` or at a host (as `host_of` says it) among `busy_hosts`, and none
        among `not_ids`. With `job_id`, only that job's.
        """
        values = {
            "hold": HOLD_SECONDS,
            "channels": [str(channel) for channel in channels],
            "limit": limit,
            "job_id": job_id,
            "busy": list(busy),
            "busy_hosts": list(busy_hosts),
            "host": HOST_IN_URL,
            "not_ids": list(not_ids),
        }
        with self._source.connection() as connection:
            while rows := connection.execute(CLAIM_DUE, values).fetchall():
                if claimed := [each for row in rows if (each := self._opened(connection, row)) is not None]:
                    return claimed
        return []

    def _opened(self, connection: Connection, row: DictRow) -> Callback | None:
        """A claimed row, its token decrypted; None when it cannot be: the message API is next, as for a dead token."""
        if row["channel"] != Channel.CALLBACK:
            return _callback(row, None)
        try:
            return _callback(row, CallbackTarget(row["callback_url"], self._vault.unseal(row["callback_token"])))
        except SecretKeyError as error:
            reason = f"its callback token cannot be decrypted: {error}"
        connection.execute(FALL_BACK, [reason, row["id"]])
        write_event(connection, row["job_id"], "callback failed", reason)
        return None

    def delivered(self, callback: Callback, status: int | None) -> None:
        event = ("delivered", f"{callback.channel}: {status or 'dry run'}")
        with self._source.connection() as connection:
            if connection.execute(DELIVERED, {**_claim(callback), "status": status}).rowcount:
                write_event(connection, callback.job_id, *event)

    def dead(self, callback: Callback, status: int | None, error: str) -> None:
        """To the dead letters: kept with the reason, replayable. Its new address, if it was given one, is tried."""
        self._fail(DEAD, callback, {"status": status, "error": storable(error)}, ("callback dead", error))

    def retry(
        self, callback: Callback, status: int | None, error: str, *, wait_seconds: float, channel: Channel
    ) -> None:
        """Try again after `wait_seconds`, on `channel`; at its new address, if it was given one, at once."""
        values = {"status": status, "error": storable(error), "wait": wait_seconds, "channel": channel}
        self._fail(RETRY, callback, values, ("callback failed", f"{error}; next try in {wait_seconds:.0f} s"))

    def give_back(self, callback: Callback) -> None:
        """Due at once for any sender: nothing of it was sent, and the claim does not count as a try."""
        with self._source.connection() as connection:
            connection.execute(GIVE_BACK, _claim(callback))

    def _fail(self, sql: str, callback: Callback, failure: Mapping[str, object], event: tuple[str, str]) -> None:
        values = {**_claim(callback), **failure}
        with self._source.connection() as connection:
            if connection.execute(sql, values).rowcount:
                write_event(connection, callback.job_id, *event)
            elif connection.execute(FAILED_BEFORE_ITS_SCHEDULE, values).rowcount:
                text = f"{failure['error']}; its tries have begun anew meanwhile"
                write_event(connection, callback.job_id, "callback failed", text)

    # upkeep ----------------------------------------------------------------------------------------------------

    def bring_forward(self) -> int:
        """Make due what waits longer than any wait is, because the clock went back meanwhile; how many."""
        with self._source.connection() as connection:
            return connection.execute(BRING_FORWARD).rowcount

    def end_unsendable(self, channels: Sequence[Channel], reason: str) -> int:
        """Make dead letters of what was due for UNSENDABLE_HOURS on another channel than these; how many."""
        values = {"channels": [str(channel) for channel in channels], "hours": UNSENDABLE_HOURS, "reason": reason}
        return self._count(END_UNSENDABLE, values)

    # dead letters ------------------------------------------------------------------------------------------------

    def dead_letters(self, limit: int) -> list[DeadLetter]:
        """The newest ones, newest first."""
        with self._source.connection() as connection:
            return [_dead_letter(row) for row in connection.execute(DEAD_LETTERS, [limit])]

    def replay(self, wanted: uuid.UUID) -> CallbackState | None:
        """Send a dead letter again, with the whole schedule before it. `wanted` is the request_id or the callback's id.

        Returns the state it was found in: DEAD when it will be sent, any other when it was left alone, or None.
        """
        return self._of_one(REPLAY, wanted)

    def replay_dead(self) -> int:
        """Send all dead letters again; how many."""
        return self._count(REPLAY, {"id": None})

    def discard(self, wanted: uuid.UUID) -> CallbackState | None:
        """Delete a dead letter for good; otherwise as `replay`."""
        return self._of_one(DISCARD, wanted)

    def discard_dead(self) -> int:
        """Delete all dead letters for good; how many."""
        return self._count(DISCARD, {"id": None})

    def _of_one(self, sql: str, wanted: uuid.UUID) -> CallbackState | None:
        with self._source.connection() as connection:
            found = connection.execute(STATE, {"id": wanted}).fetchone()
            connection.execute(sql, {"id": wanted})
            return None if found is None else CallbackState(found["state"])

    def _count(self, sql: str, values: dict[str, object]) -> int:
        with self._source.connection() as connection:
            row = connection.execute(sql, values).fetchone()
            return 0 if row is None else int(row["count"])


def host_of(url: str) -> str:
    """The host of a URL with its port, in lower case; "" where there is none."""
    found = re.search(HOST_IN_URL, url)
    return found[1].lower() if found else ""


def _claim(callback: Callback) -> dict[str, object]:
    """Names a claim: what is written about another one changes nothing."""
    return {"id": callback.id, "attempt": callback.attempt}


def _callback(row: DictRow, target: CallbackTarget | None) -> Callback:
    return Callback(
        id=row["id"],
        job_id=row["job_id"],
        task=row["task"],
        content=row["content"],
        channel=Channel(row["channel"]),
        target=target,
        attempt=row["attempts"],
        tries=row["tries"],
        age_seconds=row["age_seconds"],
    )


def _dead_letter(row: DictRow) -> DeadLetter:
    return DeadLetter(
        request_id=row["job_id"],
        at=row["ended_at"],
        tries=row["tries"],
        status=row["last_status"],
        reason=row["last_error"] or "",
        content=row["content"],
    )
