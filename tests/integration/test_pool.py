"""No call on PostgreSQL hangs, and what is known of a COMMIT is told exactly: on a server of our own that we freeze."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from pokestrator.errors import StoreUnavailable
from pokestrator.store import pool as pool_module
from pokestrator.store.migrate import Migration, migrate
from pokestrator.store.pool import Connection, ConnectionSource, Database, Line
from tests.integration.freezing import FreezablePostgres

WITHIN = 1.2
GRACE = 1.0  # of a busy machine; what does not keep its time takes twice as long, or 2 s to connect
POOL_SIZE = 5

# At COMMIT each row does its deed.
SCHEMA = """
CREATE TABLE items (id integer PRIMARY KEY, deed text NOT NULL DEFAULT 'none',
    other integer REFERENCES items DEFERRABLE INITIALLY DEFERRED);
CREATE FUNCTION do_deed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    CASE NEW.deed
        WHEN 'sleep' THEN PERFORM pg_sleep(2.5);
        WHEN 'terminate' THEN PERFORM pg_terminate_backend(pg_backend_pid());
        WHEN 'conflict' THEN RAISE EXCEPTION 'could not serialize' USING ERRCODE = '40001';
        ELSE NULL;
    END CASE;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER deeds AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION do_deed()"""


@pytest.fixture(scope="module")
def server() -> Iterator[FreezablePostgres]:
    folder = Path(tempfile.mkdtemp(prefix="pokestrator-tests-"))
    server = FreezablePostgres(folder)
    try:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(SCHEMA)
        yield server
    finally:
        server.leave()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def database(server: FreezablePostgres) -> Iterator[Database]:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("TRUNCATE items")
    database = Database(server.url, max_size=POOL_SIZE)
    database.open()
    with database.connection():
        pass  # the pool's first connection is there
    try:
        yield database
    finally:
        database.close()


@pytest.fixture
def line(database: Database) -> Iterator[Line]:
    line = database.line()
    yield line
    line.close()


@pytest.fixture(params=["pool", "line"])
def source(request: pytest.FixtureRequest, database: Database, line: Line) -> ConnectionSource:
    return database if request.param == "pool" else line


def insert(connection: Connection, number: int = 1, deed: str = "none") -> None:
    connection.execute("INSERT INTO items (id, deed) VALUES (%s, %s)", [number, deed])


def store(source: ConnectionSource, number: int = 1, deed: str = "none", within: float | None = WITHIN) -> None:
    with source.connection(within) as connection:
        insert(connection, number, deed)


def stored(server: FreezablePostgres) -> list[int]:
    """The rows there are, once the server has ended what it did for clients that have left."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        for _ in range(500):
            busy = "SELECT 1 FROM pg_stat_activity WHERE application_name = 'pokestrator' AND state <> 'idle'"
            if connection.execute(busy).fetchone() is None:
                return [row[0] for row in connection.execute("SELECT id FROM items ORDER BY id")]
            time.sleep(0.02)
    raise AssertionError("the server is still busy")


def warm(database: Database, count: int = POOL_SIZE) -> list[int]:
    """Open `count` connections of the pool; the process ids of their backends."""
    with ExitStack() as held:
        connections = [held.enter_context(database.connection(10)) for _ in range(count)]
        return [connection.info.backend_pid for connection in connections]


def backends(server: FreezablePostgres) -> set[int]:
    """The process ids of all connections that are ours."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        rows = connection.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'pokestrator'").fetchall()
        return {row[0] for row in rows}


def works_again(work: Callable[[], object], seconds: float) -> float:
    """Seconds until `work` succeeds."""
    started = time.monotonic()
    while True:
        try:
            work()
            return time.monotonic() - started
        except StoreUnavailable:
            assert time.monotonic() - started < seconds
            time.sleep(0.05)


class Stopwatch:
    """The seconds that a block took."""

    seconds = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started


# a frozen server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connections", [1, POOL_SIZE])
def test_eight_callers_of_a_frozen_server_are_all_answered_in_time_and_nothing_is_stored(
    server: FreezablePostgres, database: Database, connections: int
) -> None:
    warm(database, connections)

    def attempt(number: int) -> tuple[StoreUnavailable, float]:
        with Stopwatch() as watch, pytest.raises(StoreUnavailable) as raised:
            store(database, number)
        return raised.value, watch.seconds

    with server.frozen(), ThreadPoolExecutor(8) as callers:
        answers = [*callers.map(attempt, range(8)), *callers.map(attempt, range(8, 16))]
    assert max(seconds for _, seconds in answers) < WITHIN + GRACE
    assert not any(error.maybe_committed for error, _ in answers)
    assert works_again(lambda: store(database, 99), 10) < 5
    assert stored(server) == [99]


def test_a_freeze_in_the_middle_of_the_block_means_certainly_not_committed(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with (
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match=r"did not answer within 1\.2 s") as raised,
        ExitStack() as frozen,
        source.connection(WITHIN) as connection,
    ):
        frozen.enter_context(server.frozen())
        insert(connection)
    assert not raised.value.maybe_committed
    assert watch.seconds < WITHIN + GRACE
    assert stored(server) == []


def test_a_freeze_before_commit_means_maybe_committed_and_indeed_it_is_later(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with (
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match=r"did not answer within 1\.2 s") as raised,
        ExitStack() as frozen,
        source.connection(WITHIN) as connection,
    ):
        insert(connection)
        frozen.enter_context(server.frozen())
    assert raised.value.maybe_committed
    assert watch.seconds < WITHIN + GRACE
    assert stored(server) == [1]


def test_without_a_time_of_its_own_each_operation_has_six_seconds(server: FreezablePostgres, line: Line) -> None:
    with (
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match="did not answer within 6 s") as raised,
        ExitStack() as frozen,
        line.connection() as connection,
    ):
        insert(connection)
        frozen.enter_context(server.frozen())
        insert(connection, 2)
    assert 5.9 < watch.seconds < 6 + GRACE
    assert not raised.value.maybe_committed
    store(line, 3)
    assert stored(server) == [3]


def test_a_line_connects_within_the_time_allowed(server: FreezablePostgres, line: Line) -> None:
    with server.frozen(), Stopwatch() as watch, pytest.raises(StoreUnavailable, match=r"within 0\.7 s") as raised:
        store(line, within=0.7)
    assert watch.seconds < 0.7 + GRACE
    assert not raised.value.maybe_committed
    store(line)


def test_after_a_long_freeze_everything_works_within_seconds(
    server: FreezablePostgres, database: Database, line: Line
) -> None:
    warm(database, 3)
    store(line, 1)
    with server.frozen():
        deadline = time.monotonic() + 9  # longer than the pool tries by itself
        while time.monotonic() < deadline:
            with pytest.raises(StoreUnavailable):
                store(database, 2)
        with pytest.raises(StoreUnavailable):
            store(line, 2)
    assert works_again(lambda: store(database, 3), 10) < 5
    assert works_again(lambda: store(line, 4), 10) < 5
    assert stored(server) == [1, 3, 4]
    assert len(set(warm(database))) == POOL_SIZE, "the pool is whole again"


def test_closing_while_the_server_is_frozen_leaves_no_thread(server: FreezablePostgres) -> None:
    before = set(threading.enumerate())
    database = Database(server.url, max_size=POOL_SIZE)
    database.open()
    warm(database, 3)
    with server.frozen():
        with pytest.raises(StoreUnavailable):
            store(database)
        with Stopwatch() as watch:
            database.close()
        assert watch.seconds < 3
        for thread in set(threading.enumerate()) - before:
            thread.join(8)
            assert not thread.is_alive(), thread.name


def test_a_listener_notices_a_frozen_server_and_hears_again_afterwards(
    server: FreezablePostgres, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LISTEN_CHECK_SECONDS", 0.5)
    stop = threading.Event()
    heard = database.notifications("poked", stop)
    assert next(heard) == ""
    with database.connection() as connection:
        connection.execute("NOTIFY poked, 'one'")
    assert next(heard) == "one"
    with (
        server.frozen(),
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match="did not answer within 6 s"),
    ):
        next(heard)
    assert watch.seconds < 9
    again = database.notifications("poked", stop)
    assert next(again) == ""
    works_again(lambda: _notify(database, "two"), 10)
    assert next(again) == "two"
    stop.set()
    assert list(again) == []


def test_a_notification_that_comes_during_the_listeners_check_is_heard(
    server: FreezablePostgres, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LISTEN_CHECK_SECONDS", -1.0)
    heard = database.notifications("poked", threading.Event())
    next(heard)
    for number in range(20):
        _notify(database, str(number))
        assert next(heard) == str(number)


def _notify(database: Database, payload: str) -> None:
    with database.connection(WITHIN) as connection:
        connection.execute("SELECT pg_notify('poked', %s)", [payload])


# broken connections, on a server that is well ------------------------------------------------------------------------


def test_when_every_connection_was_terminated_the_next_caller_notices_nothing(
    server: FreezablePostgres, database: Database
) -> None:
    pids = warm(database)
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid, 5000) FROM unnest(%s::integer[]) AS pid", [pids])
    with ThreadPoolExecutor(8) as callers:
        list(callers.map(lambda number: store(database, number), range(8)))
    assert stored(server) == list(range(8))


def test_when_the_lines_connection_was_terminated_it_says_so_once(server: FreezablePostgres, line: Line) -> None:
    store(line, 1)
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE application_name = 'pokestrator'"
        )
    with pytest.raises(StoreUnavailable, match="terminating connection") as raised:
        store(line, 2)
    assert not raised.value.maybe_committed
    store(line, 3)
    assert stored(server) == [1, 3]


def test_when_the_network_has_forgotten_the_connections_a_new_one_is_made_in_time(
    server: FreezablePostgres, database: Database
) -> None:
    with server.frozen_backends(warm(database)), Stopwatch() as watch:
        store(database, 1)
    assert watch.seconds < WITHIN + GRACE
    with Stopwatch() as watch:
        store(database, 2)
    assert watch.seconds < WITHIN / 2, "one caller has waited for all of them"
    assert stored(server) == [1, 2]


# a slow server, a busy pool -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("within", "most"), [(WITHIN, WITHIN), (None, 6.0)])
def test_a_slow_statement_is_ended_and_the_connection_is_kept(
    server: FreezablePostgres, source: ConnectionSource, within: float | None, most: float
) -> None:
    store(source, 99)
    before = backends(server)
    with (
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match="canceling statement due to statement timeout") as raised,
        source.connection(within) as connection,
    ):
        insert(connection)
        connection.execute("SELECT pg_sleep(30)")
    assert watch.seconds < most + GRACE
    assert not raised.value.maybe_committed
    assert before <= backends(server)
    assert stored(server) == [99]


def test_many_statements_share_the_time_allowed(server: FreezablePostgres, source: ConnectionSource) -> None:
    with (
        Stopwatch() as watch,
        pytest.raises(StoreUnavailable, match=r"within 1\.2 s") as raised,
        source.connection(WITHIN) as connection,
    ):
        for number in range(10):
            insert(connection, number)
            connection.execute("SELECT pg_sleep(0.5)")
    assert watch.seconds < WITHIN + GRACE
    assert not raised.value.maybe_committed
    assert stored(server) == []


def test_a_lock_that_another_holds_is_not_waited_for_longer_than_allowed(
    server: FreezablePostgres, database: Database, line: Line
) -> None:
    with line.connection() as holder:
        insert(holder)
        with Stopwatch() as watch, pytest.raises(StoreUnavailable, match="lock timeout") as raised:
            store(database, 1, within=None)
        assert 2.9 < watch.seconds < 3 + GRACE
        with Stopwatch() as watch, pytest.raises(StoreUnavailable, match="statement timeout") as raised:
            store(database, 1)
        assert watch.seconds < WITHIN + GRACE
    assert not raised.value.maybe_committed
    assert stored(server) == [1]


@pytest.mark.parametrize(("within", "told"), [(0.5, "0.5"), (None, "1.5")])
def test_an_exhausted_pool_says_so_in_time(
    server: FreezablePostgres, database: Database, within: float | None, told: str
) -> None:
    with ExitStack() as held:
        for _ in range(POOL_SIZE):
            held.enter_context(database.connection(10))
        expected = f"^no connection was free within {told} s: all 5 are in use$"
        with Stopwatch() as watch, pytest.raises(StoreUnavailable, match=expected) as raised:
            store(database, within=within)
    assert watch.seconds < float(told) + GRACE
    assert not raised.value.maybe_committed
    store(database)
    assert stored(server) == [1]


def test_a_caller_with_no_time_at_all_is_refused_and_breaks_no_connection(
    server: FreezablePostgres, database: Database
) -> None:
    before = backends(server)
    for within in (0.0, 0.01, -1.0):
        with pytest.raises(StoreUnavailable):
            store(database, within=within)
    assert before <= backends(server)


def test_a_server_that_is_not_there_is_told_without_its_password(tmp_path: Path) -> None:
    database = Database(f"postgresql://postgres:hush@/postgres?host={tmp_path}")
    database.open()
    try:
        with Stopwatch() as watch, pytest.raises(StoreUnavailable, match="no connection could be opened") as raised:
            store(database)
        assert watch.seconds < WITHIN + GRACE
        assert not raised.value.maybe_committed
        with pytest.raises(StoreUnavailable, match="No such file") as refused:
            store(database.line())
        assert "hush" not in str(raised.value) + str(refused.value)
    finally:
        database.close()


def test_a_migration_may_take_longer_than_other_operations(server: FreezablePostgres) -> None:
    assert migrate(Database(server.url), [Migration(9001, "9001_slow", "SELECT pg_sleep(7)")]) == ["9001_slow"]


# what is known of a COMMIT --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deed", "reason", "maybe_committed", "is_stored"),
    [
        ("conflict", "could not serialize", False, False),  # the server has answered: no
        ("terminate", "terminating connection", True, False),  # that is no answer
        ("sleep", r"did not answer within 1\.2 s", True, True),  # statement_timeout spares the end of a COMMIT
    ],
)
def test_a_commit_that_fails_says_whether_it_was_answered(
    server: FreezablePostgres,
    source: ConnectionSource,
    deed: str,
    reason: str,
    maybe_committed: bool,
    is_stored: bool,
) -> None:
    with Stopwatch() as watch, pytest.raises(StoreUnavailable, match=reason) as raised:
        store(source, 1, deed)
    assert raised.value.maybe_committed is maybe_committed
    assert watch.seconds < WITHIN + GRACE
    store(source, 2)
    assert stored(server) == ([1, 2] if is_stored else [2])


def test_a_constraint_that_is_broken_at_commit_passes_as_it_is(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with pytest.raises(psycopg.errors.ForeignKeyViolation), source.connection(WITHIN) as connection:
        connection.execute("INSERT INTO items (id, other) VALUES (1, 7)")
    store(source, 2)
    assert stored(server) == [2]


def test_a_connection_that_ends_inside_the_block_means_certainly_not_committed(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with pytest.raises(StoreUnavailable) as raised, source.connection(WITHIN) as connection:
        insert(connection)
        connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert not raised.value.maybe_committed
    store(source, 2)
    assert stored(server) == [2]


def test_an_idle_transaction_that_the_server_has_ended_is_told_as_its_absence(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    # So it is for a process that was itself frozen for longer than the server bears an idle transaction.
    with pytest.raises(StoreUnavailable) as raised, source.connection() as connection:
        connection.execute("SET LOCAL idle_in_transaction_session_timeout = '100ms'")
        insert(connection)
        time.sleep(0.4)
        insert(connection, 2)
    assert not raised.value.maybe_committed
    store(source, 3)
    assert stored(server) == [3]


def test_when_the_time_is_over_before_commit_it_is_not_sent(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with pytest.raises(StoreUnavailable, match=r"within 0\.4 s") as raised, source.connection(0.4) as connection:
        insert(connection)
        time.sleep(0.5)
    assert not raised.value.maybe_committed
    store(source, 2)
    assert stored(server) == [2]


def test_a_lost_connection_that_the_block_has_not_noticed_means_certainly_not_committed(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with pytest.raises(StoreUnavailable, match="before COMMIT") as raised, source.connection(WITHIN) as connection:
        insert(connection)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert not raised.value.maybe_committed
    assert stored(server) == []


def test_a_block_that_swallows_a_failed_statement_is_told_that_nothing_was_committed(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    with pytest.raises(psycopg.errors.InFailedSqlTransaction), source.connection(WITHIN) as connection:
        insert(connection)
        with pytest.raises(psycopg.errors.UniqueViolation):
            insert(connection)
    assert stored(server) == []


def test_an_error_of_the_blocks_own_rolls_back_and_keeps_the_connection(
    server: FreezablePostgres, source: ConnectionSource
) -> None:
    store(source, 99)
    before = backends(server)
    with pytest.raises(ValueError, match="mine"), source.connection(WITHIN) as connection:
        insert(connection)
        raise ValueError("mine")
    assert before <= backends(server)
    assert stored(server) == [99]
