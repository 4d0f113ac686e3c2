"""One run from beginning to end: load and faults, then quiet, then the verdict."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.acceptance.processes import eventually
from tests.chaos.client import Client, tasks
from tests.chaos.faults import KINDS, Kind
from tests.chaos.report import details
from tests.chaos.schedule import Runner, plan
from tests.chaos.stand import KEY, Stand, standing
from tests.chaos.verdict import Found, Verdict, judge
from tests.chaos.watcher import Watcher, connected

SETTLE_SECONDS = 150.0  # without progress
LONGEST_SETTLE_SECONDS = 900.0
PATIENCE_SECONDS = 15.0  # of settling, before retries that wait longer are brought forward
LOOK_SECONDS = 2.0
FAULTS_BEGIN = 3.0  # after the load

COUNT_OPEN = "SELECT count(*) AS n FROM jobs WHERE finished_at IS NULL"
COUNT_PENDING = "SELECT count(*) AS n FROM callbacks WHERE state = 'pending'"
# Only what the schedule of tries explains: a longer wait was left by a jump of the clock, and is the service's to mend.
BRING_FORWARD = """
UPDATE callbacks SET next_attempt_at = now()
WHERE state = 'pending' AND next_attempt_at > now() + interval '5 seconds'
    AND next_attempt_at < now() + interval '1 hour' RETURNING id"""


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    jobs: int
    faults: int
    seconds: float
    seed: int
    kinds: Sequence[Kind] = KINDS


@dataclass(frozen=True)
class Result:
    verdict: Verdict
    details: str
    postgres_version: str

    @property
    def passed(self) -> bool:
        return not self.verdict.failures


def run(asked: Plan, say: Callable[[str], None] = print) -> Result:
    """Break and judge. Bounded: the asked seconds, the last fault's end, and LONGEST_SETTLE_SECONDS."""
    random.seed(asked.seed)
    with standing() as stand:
        say(f"two instances on PostgreSQL {stand.postgres.version}: {', '.join(stand.urls().values())}")
        watcher = Watcher(stand.postgres.url, stand.ledgers)
        began = time.time()
        watcher.start()
        client = Client(tasks(asked.jobs, asked.seed, stand.callback_url), asked.jobs, asked.seconds, stand.urls, KEY)
        client.start(stand.ledgers)
        room = asked.seconds - FAULTS_BEGIN
        runner = Runner(stand, plan(asked.seed, asked.faults, room, asked.kinds), room)
        time.sleep(FAULTS_BEGIN)  # the first tasks are under way before anything breaks
        runner.start()
        runner.join()
        broken = time.time()
        say(f"{len(stand.ledgers.faults)} faults, {len(stand.ledgers.acks)} acks; settling")
        eventually(lambda: client.done, max(began + asked.seconds - broken, 0) + 30)
        client.stop()
        forward, pending = settle(stand, say)
        watcher.stop()
        found = look(stand)
        processes_left, folders_left = stand.stop_instances()
        posts = stand.inbox.received
        verdict = judge(stand.ledgers, posts, found, len(client.unanswered), (began, time.time()))
        verdict.rows += [
            ("settled after", f"{time.time() - broken:.0f} s, {pending} jobs or callbacks still open"),
            ("callbacks whose next try was brought forward", str(forward)),
        ]
        verdict.must_be_none("processes of the service after SIGTERM", processes_left)
        verdict.rows.append(("folders of runs left in the end", str(folders_left)))
        if runner.dropped:
            verdict.rows.append(("faults dropped for want of time", str(runner.dropped)))
        database = (Path(stand.postgres.socket).parent / "log").read_text(errors="replace")[-20_000:]
        text = details(verdict, stand.ledgers, posts, found, database, stand.logs())
        return Result(verdict, text, stand.postgres.version)


def settle(stand: Stand, say: Callable[[str], None]) -> tuple[int, int]:
    """Wait until nothing is open; (callbacks whose next try was brought forward, what is still open)."""
    began = deadline = time.monotonic()
    least = None
    patience = time.monotonic() + PATIENCE_SECONDS
    forward = 0
    while True:
        still = _count(stand, COUNT_OPEN) + _count(stand, COUNT_PENDING)
        if least is None or still < least:  # as long as the backlog of a long run is worked off
            least, deadline = still, min(time.monotonic() + SETTLE_SECONDS, began + LONGEST_SETTLE_SECONDS)
        if not still or time.monotonic() > deadline:
            return forward, still
        if time.monotonic() > patience:
            forward += len(query(stand, BRING_FORWARD))
        say(f"  {still} jobs or callbacks open")
        time.sleep(LOOK_SECONDS)


def look(stand: Stand) -> Found:
    """The database's side of the story."""
    return Found(
        jobs=query(stand, "SELECT * FROM jobs"),
        callbacks=query(stand, "SELECT * FROM callbacks"),
        events=query(stand, "SELECT * FROM job_events ORDER BY id"),
        violations=query(stand, "SELECT * FROM chaos_violations"),
    )


def query(stand: Stand, sql: str) -> list[dict[str, Any]]:
    with connected(stand.postgres.url) as connection:
        connection.execute("SET statement_timeout = '30s'")
        return connection.execute(sql.encode()).fetchall()


def _count(stand: Stand, sql: str) -> int:
    try:
        return int(query(stand, sql)[0]["n"])
    except psycopg.Error:
        return 1  # not to be seen, so not settled
