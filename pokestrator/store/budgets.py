"""The daily ceilings on what is spent on Claude, across all instances. A day ends at midnight UTC.

Before a run begins, all that it may spend is reserved on its job; when it ends, what it has spent is written into
`spending` in its place. A reservation counts while its job is running. Raises StoreUnavailable.
"""

from __future__ import annotations

from enum import StrEnum

from pokestrator.errors import LeaseLost
from pokestrator.jobs import Job
from pokestrator.store.pool import ConnectionSource

# Held until the transaction ends: nobody reserves what somebody else has just found free.
LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('pokestrator budgets', 0))"

SPENT = """
SELECT coalesce(sum(usd), 0) AS by_all, coalesce(sum(usd) FILTER (WHERE caller = %(caller)s), 0) AS by_caller
FROM spending WHERE day = (now() AT TIME ZONE 'UTC')::date"""

RESERVED = """
SELECT coalesce(sum(reserved_usd), 0) AS by_all,
    coalesce(sum(reserved_usd) FILTER (WHERE coalesce(caller, '') = %(caller)s), 0) AS by_caller
FROM jobs WHERE state = 'running' AND id <> %(id)s"""

RESERVE = """
UPDATE jobs SET reserved_usd = %(usd)s WHERE id = %(id)s AND claim_seq = %(fence)s AND state = 'running'
RETURNING id"""

ROUNDING = 1e-9  # dollars: sums of floats


class Reservation(StrEnum):
    MADE = "made"
    MUST_WAIT = "must wait"  # what is left is reserved by runs that may spend less
    TOO_LATE = "too late"  # it is spent


class Budgets:
    """What may be spent a day, in US dollars: by all, and by each caller."""

    def __init__(self, source: ConnectionSource, daily_usd: float, caller_daily_usd: float) -> None:
        self._source = source
        self._daily_usd = daily_usd
        self._caller_daily_usd = caller_daily_usd

    @property
    def most_usd(self) -> float:
        """No single run can be allowed more."""
        return min(self._daily_usd, self._caller_daily_usd)

    def reserve(self, job: Job, usd: float) -> Reservation:
        """Reserve `usd` for a running job in place of what it had reserved. Raises LeaseLost."""
        values = {"id": job.id, "fence": job.claim_seq, "usd": usd, "caller": job.caller or ""}
        with self._source.connection() as connection:
            connection.execute(LOCK)
            spent = connection.execute(SPENT, values).fetchone()
            reserved = connection.execute(RESERVED, values).fetchone()
            assert spent is not None and reserved is not None
            for ceiling, whose in ((self._daily_usd, "by_all"), (self._caller_daily_usd, "by_caller")):
                if spent[whose] + usd > ceiling + ROUNDING:
                    return Reservation.TOO_LATE
                if spent[whose] + reserved[whose] + usd > ceiling + ROUNDING:
                    return Reservation.MUST_WAIT
            if connection.execute(RESERVE, values).fetchone() is None:
                raise LeaseLost(f"job {job.id} has another owner or has ended")
        return Reservation.MADE
