"""Among a million ended jobs, what runs all the time reads a handful of rows: every statement of it is explained."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from pokestrator.errors import TooManyTasks
from pokestrator.intake import Action, Question, TaskLimits, new_job
from pokestrator.jobs import CallbackTarget, Channel, Job, JobState, Outcome, Route, Verdict
from pokestrator.runs import Usage
from pokestrator.store.budgets import Budgets
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.recovery import Recovery
from pokestrator.store.rows import job_of
from pokestrator.sweeping import REMOVE_AT_ONCE
from tests.conftest import database_named

MOST_ROWS = 500  # that a statement may read at one place: all that is queued, running or waits, or is removed at once
DAYS = 30
LIMITS = TaskLimits(per_minute=20, per_day=MOST_ROWS, unfinished=50)
# psycopg prepares what it has sent five times, and PostgreSQL may plan what it has planned five times for all values.
TIMES = 7
TABLES = ("jobs", "callbacks", "job_events", "spending")
TYPES = {bool: "boolean", int: "integer", float: "float8", uuid.UUID: "uuid"}

# A job each five seconds, so that half of them are older than DAYS; its number is the end of its id. Indexes are made
# afterwards, and nobody looks for the job of each callback, since all of it should take no longer than it must.
ID = "('00000000-0000-4000-8000-' || lpad(n::text, 12, '0'))::uuid"
FILL = f"""
SET session_replication_role = replica;
CREATE TEMP TABLE indexes AS SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition
FROM pg_index WHERE indrelid = 'jobs'::regclass AND NOT indisunique;
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT i.name FROM indexes AS i LOOP EXECUTE 'DROP INDEX ' || name; END LOOP;
END $$;

INSERT INTO jobs (id, task, metadata, caller, channel, state, result, idempotency_key, claim_seq, runs,
    created_at, run_at, started_at, finished_at)
SELECT {ID}, 'Task ' || n, '{{}}', CASE WHEN n % 60 > 0 THEN 'u-' || n % 5000 END, 'api_message', 'succeeded', 'Done.',
    CASE WHEN n % 3 > 0 THEN md5(n::text) END, 1, 1, at, at, at, at
FROM generate_series(1, 1000000) AS n, LATERAL (SELECT now() - n * interval '5 seconds' AS at) AS times;
INSERT INTO callbacks (id, job_id, content, channel, state, attempts, created_at, next_attempt_at, ended_at)
SELECT id, id, 'Done.', 'api_message', 'delivered', 1, finished_at, finished_at, finished_at FROM jobs;
INSERT INTO job_events (job_id, kind, text)
SELECT {ID}, 'finished', 'succeeded' FROM generate_series(1, 200000) AS n;

UPDATE callbacks SET state = 'dead', last_error = 'HTTP 400'
WHERE id IN (SELECT {ID} FROM generate_series(1, 20000, 400) AS n);
UPDATE callbacks SET state = 'pending', ended_at = NULL,
    next_attempt_at = now() + (random() - 0.3) * interval '5 hours'
WHERE id IN (SELECT {ID} FROM generate_series(2, 20000, 100) AS n);

INSERT INTO jobs (id, task, metadata, caller, channel, cancel_requested, run_at)
SELECT {ID}, 'Task ' || n, '{{}}', 'u-' || n % 5000, 'api_message', n % 100 = 0,
    now() + (n % 10 - 8) * interval '1 second'
FROM generate_series(1000001, 1000300) AS n;
INSERT INTO jobs (id, task, metadata, caller, channel, cancel_requested, state, owner, lease_until, claim_seq)
SELECT {ID}, 'Task ' || n, '{{}}', 'u-' || n % 5000, 'api_message', n % 20 = 0, 'running', 'owner:' || n % 5,
    now() + (n % 10 - 3) * interval '1 second', 1
FROM generate_series(1000301, 1000340) AS n;
INSERT INTO spending (day, caller, usd)
SELECT current_date - n / 400, 'u-' || n, 0.5 FROM generate_series(1, 12800) AS n;
INSERT INTO jobs (id, task, metadata, caller, channel)
SELECT {ID}, 'Task ' || n, '{{}}', 'u-busy', 'api_message' FROM generate_series(1000341, 1000390) AS n;
INSERT INTO job_events (job_id, kind, text)
SELECT {ID}, 'accepted', 'waiting to run' FROM generate_series(1000001, 1000340) AS n;

DO $$ DECLARE definition text; BEGIN
    FOR definition IN SELECT i.definition FROM indexes AS i LOOP EXECUTE definition; END LOOP;
END $$;
SET session_replication_role = origin;
ANALYZE"""


def number(n: int) -> uuid.UUID:
    return uuid.UUID(f"00000000-0000-4000-8000-{n:012}")


ENDED, SENT, DEAD, PENDING, QUEUED, RUNNING = (number(n) for n in (99, 100, 401, 102, 1_000_011, 1_000_301))


@pytest.fixture(scope="module")
def connection(postgres: EmbeddedPostgres, migrated: str) -> Iterator[psycopg.Connection[Any]]:
    """To a database of its own, with a million ended jobs and their callbacks."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated} STRATEGY FILE_COPY".encode())
        with psycopg.connect(database_named(postgres, name), autocommit=True, row_factory=dict_row) as connection:
            connection.execute(FILL.encode())
            yield connection
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


class Explained:
    """A source of connections, for the stores, that explains each statement as it is run. `plans` has them all."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self.plans: list[tuple[str, dict[str, Any]]] = []

    @contextmanager
    def connection(self, within: float | None = None) -> Iterator[Explained]:
        yield self

    def execute(self, query: str, values: Mapping[str, Any] | Sequence[Any] = ()) -> psycopg.Cursor[Any]:
        self._explain(query, values)
        return self._connection.execute(query.encode(), values or None)

    def _explain(self, query: str, values: Mapping[str, Any] | Sequence[Any]) -> None:
        """As it is planned with these values at first, and as it is planned once it is run all the time."""
        prepared, arguments = numbered(query, values)
        name = f"explained_{uuid.uuid4().hex}"
        types = f"({', '.join(map(type_of, arguments))})" if arguments else ""
        self._connection.execute(f"PREPARE {name}{types} AS {prepared}".encode())
        execute = sql.SQL("EXECUTE {}").format(sql.Identifier(name))
        if arguments:
            literals = sql.SQL(", ").join(sql.Literal(each) for each in arguments)
            execute = sql.SQL("{}({})").format(execute, literals)
        for _ in range(TIMES):
            with self._connection.transaction(force_rollback=True):
                found = self._connection.execute(
                    sql.SQL("EXPLAIN (ANALYZE, FORMAT JSON) {}").format(execute)
                ).fetchone()
            self.plans.append((query, found["QUERY PLAN"][0]["Plan"]))


def numbered(query: str, values: Mapping[str, Any] | Sequence[Any]) -> tuple[str, list[Any]]:
    """A query with $1, $2, … for its placeholders, and their values."""
    arguments: dict[str, Any] = {}

    def place(match: re.Match[str]) -> str:
        name = match[1] or str(len(arguments))
        arguments.setdefault(name, values[match[1] if isinstance(values, Mapping) else int(name)])  # type: ignore[call-overload]
        return f"${list(arguments).index(name) + 1}"

    return re.sub(r"%(?:\((\w+)\))?s", place, query), [
        str(value) if isinstance(value, StrEnum) else value for value in arguments.values()
    ]


def type_of(value: object) -> str:
    if isinstance(value, list):
        return "uuid[]" if value and isinstance(value[0], uuid.UUID) else "unknown" if not value else "text[]"
    return TYPES.get(type(value), "unknown")


def scans(plan: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Each reading of one of our tables: how, which, and the number of rows."""
    if plan.get("Relation Name") in TABLES and "Scan" in plan["Node Type"]:
        removed = plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        yield plan["Node Type"], plan["Relation Name"], (plan["Actual Rows"] + removed) * plan["Actual Loops"]
    for part in plan.get("Plans", ()):
        yield from scans(part)


def faults(plans: Sequence[tuple[str, Mapping[str, Any]]], most_rows: float = MOST_ROWS) -> list[str]:
    found = []
    for query, plan in plans:
        for how, table, number_of_rows in scans(plan):
            if how == "Seq Scan" or number_of_rows > most_rows:
                found.append(f"{how} on {table}, {number_of_rows:.0f} rows: {query}")
    return found


class Stores:
    def __init__(self, source: Any, held: list[Job]) -> None:
        self.jobs, self.history = Jobs(source, limits=LIMITS), History(source)
        self.recovery, self.callbacks = Recovery(source), Callbacks(source)
        self.budgets = Budgets(source, 20.0, 10.0)
        self.held, self.job = held, held[0]


@pytest.fixture
def explained(connection: psycopg.Connection[Any]) -> Iterator[Explained]:
    """Whatever is done with it is undone."""
    with connection.transaction(force_rollback=True):
        yield Explained(connection)


@pytest.fixture
def stores(connection: psycopg.Connection[Any], explained: Explained) -> Stores:
    running = connection.execute("SELECT * FROM jobs WHERE state = 'running' AND owner = 'owner:1' ORDER BY id")
    return Stores(explained, [job_of(row) for row in running])


DONE = Outcome(JobState.SUCCEEDED, "Done.")
COSTLY = replace(DONE, usage=Usage(cost_usd=0.1))
POKE = list(Channel)[:2]
AT = CallbackTarget("https://poke.invalid/1", "token")
BUSY = {"busy": [AT.url], "busy_hosts": ["poke.invalid"], "not_ids": [ENDED]}
OWN_KEY = {"idempotency_key": "key-1"}


def insert_twice(stores: Stores, metadata: object, **more: Any) -> None:
    for _ in range(2):
        stores.jobs.insert(new_job("A new task", metadata, **more))


def refuse(stores: Stores) -> None:
    """A call of somebody who has as many tasks under way as may be."""
    with pytest.raises(TooManyTasks):
        stores.jobs.insert(new_job("A new task", caller="u-busy"))


def repeat_ended(stores: Stores) -> None:
    """A call with its own key, whose job has ended and whose callback waits."""
    job = new_job("A new task", OWN_KEY, caller="u-1")
    stores.jobs.insert(job)
    claimed = stores.jobs.claim_one(job.id, "me", 20)
    assert claimed is not None
    stores.jobs.finish(claimed, DONE)
    stores.jobs.insert(new_job("A new task", OWN_KEY, caller="u-1", callback=AT))


def send(stores: Stores, end: Callable[[Callbacks, Any], None]) -> None:
    [claimed] = stores.callbacks.claim_due(POKE, 1, **BUSY)
    end(stores.callbacks, claimed)


CALLS: dict[str, Callable[[Stores], object]] = {
    "accept with an own key": lambda its: insert_twice(its, OWN_KEY, caller="u-2", callback=AT),
    "accept": lambda its: insert_twice(its, ""),
    "accept of a new caller": lambda its: insert_twice(its, "", caller="u-new"),
    "accept of a named caller": lambda its: insert_twice(its, "", caller="u-1"),
    "accept of what has ended": repeat_ended,
    "refusal": refuse,
    "insert claimed": lambda its: its.jobs.insert_claimed(new_job("A task", channel=Channel.NONE), "me", 20),
    "claim": lambda its: its.jobs.claim("me", 20, 4),
    "claim nothing": lambda its: its.jobs.claim("me", 20, 0),
    "claim one": lambda its: its.jobs.claim_one(QUEUED, "me", 20),
    "renew": lambda its: its.jobs.renew(its.held, 20),
    "release": lambda its: its.jobs.release(its.held),
    "record a route": lambda its: its.jobs.record_route(its.job, Route.MATCH, "it fits"),
    "note": lambda its: its.jobs.note(its.job, "tool", "Bash"),
    "reserve": lambda its: its.budgets.reserve(its.job, 1.0),
    "finish": lambda its: its.jobs.finish(its.job, DONE),
    "finish what has cost something": lambda its: its.jobs.finish(its.job, COSTLY),
    "interrupt": lambda its: its.jobs.interrupt(its.job, "the slot died", Usage()),
    "retry": lambda its: its.jobs.retry(its.job, 5.0, "HTTP 529", Usage()),
    "owners": lambda its: its.recovery.owners(),
    "sweep of the expired": lambda its: its.recovery.sweep(its.held, expired=True),
    "sweep of the dead": lambda its: its.recovery.sweep(its.held, dead_owners=["owner:2", "owner:7"]),
    "release of unknown claims": lambda its: its.recovery.release_unknown("owner:1", its.held[2:]),
    "look for cancelled runs": lambda its: its.recovery.to_cancel("owner:0"),
    "end of the cancelled": lambda its: its.recovery.end_cancelled(),
    "removal of the old": lambda its: its.recovery.remove_old(DAYS, REMOVE_AT_ONCE),
    "removal when nothing is old": lambda its: its.recovery.remove_old(3_650, REMOVE_AT_ONCE),
    "status by id": lambda its: its.history.answer(Question(Action.STATUS, RUNNING, "u-301")),
    "status of the latest": lambda its: its.history.answer(Question(Action.STATUS, None, "u-7")),
    "status of nothing": lambda its: its.history.answer(Question(Action.STATUS, None, "nobody")),
    "cancel of a queued one": lambda its: its.history.answer(Question(Action.CANCEL, QUEUED, "u-11")),
    "cancel of a running one": lambda its: its.history.answer(Question(Action.CANCEL, RUNNING, "u-301")),
    "verdict by id": lambda its: its.history.answer(Question(Action.FEEDBACK, ENDED, "u-99", Verdict.BAD, "no")),
    "verdict on the latest": lambda its: its.history.answer(Question(Action.FEEDBACK, None, "u-7", Verdict.GOOD)),
    "timeline": lambda its: its.history.timeline(ENDED),
    "outcome": lambda its: its.history.outcome(ENDED),
    "road": lambda its: its.history.road(ENDED),
    "claim of callbacks": lambda its: its.callbacks.claim_due(POKE, 1, **BUSY),
    "claim of a job's callback": lambda its: its.callbacks.claim_due(POKE, 1, PENDING),
    "delivered": lambda its: send(its, lambda callbacks, claimed: callbacks.delivered(claimed, 200)),
    "dead": lambda its: send(its, lambda callbacks, claimed: callbacks.dead(claimed, 400, "HTTP 400")),
    "send again": lambda its: send(
        its, lambda callbacks, claimed: callbacks.retry(claimed, 503, "HTTP 503", wait_seconds=5.0, channel=POKE[1])
    ),
    "give back": lambda its: send(its, lambda callbacks, claimed: callbacks.give_back(claimed)),
    "bring forward": lambda its: its.callbacks.bring_forward(),
    "end of the unsendable": lambda its: its.callbacks.end_unsendable(POKE[:1], "no key"),
    "dead letters": lambda its: its.callbacks.dead_letters(20),
    "replay of one": lambda its: its.callbacks.replay(DEAD),
    "replay of all": lambda its: its.callbacks.replay_dead(),
    "discard of one": lambda its: its.callbacks.discard(DEAD),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_statement_of_the_hot_path_reads_what_has_ended(explained: Explained, stores: Stores, call: str) -> None:
    CALLS[call](stores)
    assert explained.plans
    assert faults(explained.plans) == []


@pytest.mark.parametrize("query", ["SELECT id FROM jobs WHERE task = %s", "SELECT id FROM jobs WHERE caller <> %s"])
def test_a_statement_that_does_is_found_out(explained: Explained, query: str) -> None:
    explained.execute(query, ["Task 1"])
    assert len(faults(explained.plans)) == TIMES
