"""Looks after jobs whose owner is gone, and after what else only time brings: called about once a second.

An owner that died on this machine is known by its lock at once. Any other is taken for gone when its lease has run out,
which is no sign of death if nobody could renew: after an outage, a jump of the database's clock or a standstill of
this process, leases get their full time first.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Job
from pokestrator.liveness import Liveness
from pokestrator.store.recovery import Recovered, Recovery
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

SWEEP_SECONDS = 5.0  # between two looks at leases
LOOK_SECONDS = 2.0  # between two looks at owners' locks
CLOCK_JUMP_SECONDS = 5.0  # more than a lease loses between two heartbeats
REMOVE_SECONDS = 600.0  # between two removals of what is old
REMOVE_AT_ONCE = 500  # jobs in one statement


class Sweeper:
    """One instance's sweeper. `owner` is its own name, `lease_seconds` what leases are given."""

    def __init__(
        self, recovery: Recovery, liveness: Liveness, *, owner: str, lease_seconds: float, retention_days: int
    ) -> None:
        self._recovery = recovery
        self._liveness = liveness
        self._owner = owner
        self._lease_seconds = lease_seconds
        self._retention_days = retention_days
        self._worked_at = time.monotonic()
        self._sweep_at = self._worked_at + lease_seconds
        self._look_at = self._remove_at = 0.0
        self._remove_at_once = REMOVE_AT_ONCE
        self._clocks: tuple[float, float] | None = None  # the database's and ours, when last compared

    def database_back(self, away_seconds: float, held: Sequence[Job]) -> None:
        """The database answers again: owners could not renew, and answers to our own claims may be lost."""
        for job_id in self._recovery.release_unknown(self._owner, held):
            log.warning("released", request_id=str(job_id), reason="the answer to its claim was lost")
        self._clock_is_steady()  # it may have jumped meanwhile
        if away_seconds > self._lease_seconds / 4:  # a shorter absence costs nobody a lease
            self._wait_a_lease("until now, owners may have been unable to renew theirs")

    def work(self, held: Sequence[Job]) -> None:
        """Do what is due; `held` are this instance's own runs. Raises StoreUnavailable."""
        now = time.monotonic()
        if now - self._worked_at > self._lease_seconds / 2:
            self._wait_a_lease("this process stood still")
        self._worked_at = now
        for job_id in self._recovery.end_cancelled():
            log.info("cancelled", request_id=str(job_id))
        if now >= self._look_at:
            self._look_at = now + LOOK_SECONDS
            self._take_from_the_dead(held)
        if now >= self._sweep_at:
            self._sweep_at = now + SWEEP_SECONDS
            if brought := self._recovery.bring_forward():
                log.warning("queue_brought_forward", jobs=len(brought))
            if self._clock_is_steady():
                self._tell(self._recovery.sweep(held, expired=True), "its lease ran out")
        if now >= self._remove_at:
            self._remove_old(now)

    def _take_from_the_dead(self, held: Sequence[Job]) -> None:
        dead = [owner for owner in self._recovery.owners() if self._liveness.is_dead(owner)]
        if dead:
            self._tell(self._recovery.sweep(held, dead_owners=dead), "its owner died")

    def _clock_is_steady(self) -> bool:
        """Whether the database's clock has gone as fast as ours since the last look."""
        clocks = self._recovery.clock(), time.monotonic()
        before = clocks if self._clocks is None else self._clocks
        jump = (clocks[0] - before[0]) - (clocks[1] - before[1])
        is_steady = abs(jump) <= CLOCK_JUMP_SECONDS
        if not is_steady:
            if jump < 0:
                self._recovery.shorten_leases(self._lease_seconds)
            self._wait_a_lease(f"the database's clock jumped by {jump:.0f} s")
        self._clocks = clocks  # last: a jump that could not be answered is still there at the next look
        return is_steady

    def _wait_a_lease(self, reason: str) -> None:
        log.info("sweep_waits", seconds=self._lease_seconds, reason=reason)
        self._sweep_at = time.monotonic() + self._lease_seconds

    def _tell(self, recovered: Recovered, reason: str) -> None:
        for job_id in recovered.requeued:
            log.warning("interrupted", request_id=str(job_id), outcome="queued again", reason=reason)
        for job_id in recovered.ended:
            log.error("interrupted", request_id=str(job_id), outcome="ended", reason=reason)

    def _remove_old(self, now: float) -> None:
        self._remove_at = now + REMOVE_SECONDS
        try:
            removed = self._recovery.remove_old(self._retention_days, self._remove_at_once)
        except StoreUnavailable as error:  # there is no haste, and it must not keep the dispatcher from its runs
            self._remove_at_once = max(1, self._remove_at_once // 2)
            log.warning("not_removed", reason=str(error), next_time=self._remove_at_once)
            return
        if removed == self._remove_at_once:
            self._remove_at = now  # there is more
        if removed:
            log.info("removed_old", jobs=removed, days=self._retention_days)
