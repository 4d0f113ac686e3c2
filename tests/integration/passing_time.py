"""Time that passes in no time: for the sweeper, and for a database whose clock can also jump by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

import psycopg
import pytest

from pokestrator import sweeping
from pokestrator.jobs import Job
from pokestrator.liveness import Liveness
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from pokestrator.sweeping import Sweeper
from tests.integration.flow import rows

LEASE = 20.0
HEARTBEAT = 5.0
DAYS = 30  # that ended jobs are kept

# What our statements call now() is looked for in this schema first. Defaults were bound when the tables were made.
CLOCK = """
CREATE SCHEMA chaos;
CREATE TABLE chaos.clock (ahead interval NOT NULL);
INSERT INTO chaos.clock VALUES ('0');
CREATE FUNCTION chaos.now() RETURNS timestamptz LANGUAGE sql STABLE AS
    'SELECT pg_catalog.now() + ahead FROM chaos.clock';
DO $$
DECLARE c record;
BEGIN
    FOR c IN SELECT table_name AS t, column_name AS n FROM information_schema.columns
        WHERE table_schema = 'public' AND column_default = 'now()'
    LOOP EXECUTE format('ALTER TABLE %I ALTER %I SET DEFAULT chaos.now()', c.t, c.n); END LOOP;
END $$"""


class World:
    """A database and all the instances on it."""

    def __init__(self, url: str, database: Database) -> None:
        self.url = url
        self.database = database
        self.jobs, self.recovery = Jobs(database), Recovery(database)
        self.second = 0
        self._began = time.monotonic()
        self._passed = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._passed

    def pass_by(self, seconds: float) -> None:
        """Everybody's clock goes on; nobody does anything."""
        self._passed += seconds
        self.jump(seconds)

    def jump(self, seconds: float) -> None:
        """Only the database's clock, forward or back."""
        with self.database.connection() as connection:
            connection.execute("UPDATE chaos.clock SET ahead = ahead + make_interval(secs => %s)", [seconds])

    def live(self, seconds: int, *instances: Instance) -> None:
        """So many seconds, in each of which every instance does what it would."""
        for _ in range(seconds):
            self.pass_by(1)
            self.second += 1
            for instance in instances:
                instance.live(self.second)

    def seconds_until(self, state: str, job: Job, *instances: Instance, at_most: int = 60) -> int:
        """How long `instances` live until the job has this state; fails after `at_most`."""
        for seconds in range(at_most + 1):
            if self.state(job) == state:
                return seconds
            self.live(1, *instances)
        raise AssertionError(f"after {at_most} s it is {self.state(job)}")

    def state(self, job: Job) -> str:
        return str(self.row(job)["state"])

    def row(self, job: Job) -> dict[str, object]:
        with self.database.connection() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = %s", [job.id]).fetchone()
        assert row is not None
        return row


class Instance:
    """A dispatcher's heartbeat and sweeper, a second at a time, without its threads. `phase` shifts its heartbeats."""

    def __init__(self, world: World, owner: str, liveness: Liveness, phase: int = 0) -> None:
        self._world = world
        self._phase = phase
        self.owner = owner
        self.held: list[Job] = []
        self.has_heartbeat = True
        self.sweeper = Sweeper(world.recovery, liveness, owner=owner, lease_seconds=LEASE, retention_days=DAYS)

    def live(self, second: int) -> None:
        if self.has_heartbeat and (second + self._phase) % HEARTBEAT == 0:
            self._world.jobs.renew(self.held, LEASE)
        self.sweeper.work(self.held)


@contextmanager
def passing_time(url: str, patch: pytest.MonkeyPatch) -> Iterator[World]:
    name = urlsplit(url).path.removeprefix("/")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CLOCK)
    rows(url, f"ALTER DATABASE {name} SET search_path = chaos, pg_catalog, public")
    database = Database(url)
    database.open()
    world = World(url, database)
    patch.setattr(sweeping, "time", SimpleNamespace(monotonic=world.monotonic))
    try:
        yield world
    finally:
        database.close()
