"""The PostgreSQL of the harness: a managed database, as far as the service can tell, that can be broken and mended."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

import psycopg

from pokestrator.claude import processes
from pokestrator.errors import StoreUnavailable
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Database
from tests.acceptance.processes import children, eventually
from tests.chaos.watcher import connected

NAME = "chaos"
STOP_SECONDS = 20.0
START_TRIES = 3

# Every now() of the service and of the columns' defaults is this one: a clock that can be set.
CLOCK = """
CREATE TABLE public.chaos_clock (shift interval NOT NULL);
INSERT INTO public.chaos_clock VALUES ('0');
CREATE FUNCTION public.now() RETURNS timestamptz LANGUAGE sql STABLE AS
    $$ SELECT pg_catalog.now() + (SELECT shift FROM public.chaos_clock) $$;
ALTER DATABASE chaos SET search_path = public, pg_catalog;
"""

# What no writer may do, however late it comes. Each instance has a role of its own, so that it is seen who writes: one
# whose claim was lost, and who writes without its fence, does what an owner would do.
GUARDS = """
CREATE TABLE public.chaos_violations (
    at timestamptz NOT NULL DEFAULT clock_timestamp(), job_id uuid NOT NULL, what text NOT NULL);
CREATE TABLE public.chaos_claims (
    job_id uuid NOT NULL, claim_seq bigint NOT NULL, role name NOT NULL, PRIMARY KEY (job_id, claim_seq));
CREATE FUNCTION public.chaos_guard_job() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE what text;
    is_owner boolean := OLD.state <> 'running' OR EXISTS (
        SELECT FROM public.chaos_claims
        WHERE job_id = OLD.id AND claim_seq = OLD.claim_seq AND role = session_user);
BEGIN
    IF OLD.state = 'queued' AND NEW.state = 'running' THEN
        INSERT INTO public.chaos_claims VALUES (NEW.id, NEW.claim_seq, session_user) ON CONFLICT DO NOTHING;
    END IF;
    what := CASE
        -- Others may end a run that was cancelled or interrupted too often, or queue one again as interrupted.
        WHEN NOT is_owner AND NEW.state = 'succeeded' THEN 'a result by another than its owner'
        WHEN NOT is_owner AND NEW.state = 'failed' AND NEW.error_kind <> 'interrupted'
            THEN 'a failure by another than its owner'
        WHEN NOT is_owner AND NEW.state = 'queued' AND NEW.interruptions = OLD.interruptions
            THEN 'a release by another than its owner'
        WHEN NOT is_owner AND NEW.state = 'running' AND (NEW.lease_until > OLD.lease_until OR NEW.runs <> OLD.runs
            OR NEW.route IS DISTINCT FROM OLD.route) THEN 'its run was written to by another than its owner'
        WHEN OLD.finished_at IS NOT NULL AND NEW.state <> OLD.state THEN 'left ' || OLD.state || ' for ' || NEW.state
        WHEN OLD.finished_at IS NOT NULL AND NEW.result IS DISTINCT FROM OLD.result THEN 'the result of an end changed'
        WHEN OLD.finished_at IS NOT NULL AND NEW.claim_seq <> OLD.claim_seq THEN 'an ended job was claimed'
        WHEN NEW.claim_seq < OLD.claim_seq THEN 'the fence went back'
        WHEN OLD.state = 'running' AND NEW.state = 'running' AND NEW.claim_seq = OLD.claim_seq
            AND NEW.owner <> OLD.owner THEN 'the owner changed without a claim'
    END;
    IF what IS NOT NULL THEN
        INSERT INTO public.chaos_violations (job_id, what) VALUES (NEW.id, what);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER chaos_guard BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION public.chaos_guard_job();
CREATE FUNCTION public.chaos_guard_callback() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.state = 'delivered' AND (NEW.state <> 'delivered' OR NEW.attempts <> OLD.attempts) THEN
        INSERT INTO public.chaos_violations (job_id, what)
            VALUES (NEW.job_id, 'a delivered callback became ' || NEW.state);
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER chaos_guard BEFORE UPDATE ON callbacks FOR EACH ROW EXECUTE FUNCTION public.chaos_guard_callback();
"""


class Postgres:
    """A server in `folder` with the database `chaos`, migrated and guarded. `url` reaches it directly."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = EmbeddedPostgres(folder)
        own = urlsplit(self._server.url)
        self.socket = f"{parse_qs(own.query)['host'][0]}/.s.PGSQL.5432"
        self.url = urlunsplit(own._replace(path=f"/{NAME}"))
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {NAME}".encode())
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(CLOCK.encode())
        migrate(Database(self.url))
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(GUARDS.encode())
            row = connection.execute("SHOW server_version").fetchone()
        self.version = str(row[0]) if row else ""

    def url_through(self, port: int, role: str) -> str:
        """The same database by TCP on a loopback port, for a role that is made where there is none."""
        with connected(self.url) as connection:
            make_role(connection, role)
        own = urlsplit(self.url)
        return urlunsplit(own._replace(netloc=f"{role}@127.0.0.1:{port}", query="sslmode=disable&gssencmode=disable"))

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        return int((Path(self.socket).parent / "postmaster.pid").read_text().split()[0])

    def end(self, how: signal.Signals) -> None:
        """SIGKILL (a crash), SIGQUIT (immediate) or SIGINT (fast), and wait until no process of it is left."""
        pid = self.pid
        backends = children(pid)
        os.kill(pid, how)
        if not eventually(lambda: not _alive(pid) and not any(map(_alive, backends)), STOP_SECONDS):
            raise RuntimeError(f"PostgreSQL has not ended {STOP_SECONDS:.0f} s after {how.name}")
        with suppress(ChildProcessError):  # it was started by a process that has left it to us
            os.waitpid(pid, 0)

    def start(self) -> None:
        before, self._server = self._server, self._started()
        before.leave()  # the new one holds the folder now

    def _started(self) -> EmbeddedPostgres:
        for _ in range(START_TRIES - 1):
            # On a busy machine a recovery can take longer than the package waits for it; it goes on meanwhile.
            with suppress(StoreUnavailable):
                return EmbeddedPostgres(self._folder)
        return EmbeddedPostgres(self._folder)

    def signal_all(self, number: signal.Signals) -> None:
        """To the postmaster and every backend."""
        pid = self.pid
        for each in [pid, *children(pid)]:
            with suppress(ProcessLookupError):
                os.kill(each, number)

    def terminate_connections(self) -> int:
        """End every session but ours; returns how many there were."""
        query = (
            "SELECT count(pg_terminate_backend(pid)) AS n FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name <> 'chaos' AND pid <> pg_backend_pid()"
        )
        with connected(self.url) as connection:
            row = connection.execute(query.encode()).fetchone()
        return int(row["n"]) if row else 0

    def jump(self, seconds: float) -> None:
        """Put the clock forward, or back."""
        with connected(self.url) as connection:
            connection.execute("UPDATE public.chaos_clock SET shift = shift + make_interval(secs => %s)", [seconds])

    def leave(self) -> None:
        self._server.leave()


def make_role(connection: psycopg.Connection[Any], role: str) -> None:
    """A role that may do everything, with a name of its own in what the guards see."""
    known = connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [role]).fetchone()
    if known is None:
        connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN".encode())


def _alive(pid: int) -> bool:
    process = processes.look_up(pid)
    return process is not None and process.alive
