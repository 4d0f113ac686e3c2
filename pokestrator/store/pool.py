"""Where connections to PostgreSQL come from: the pool of a process, and lines beside it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from pokestrator.errors import StoreUnavailable
from pokestrator.store.connection import (
    AWAY,
    OPERATION_SECONDS,
    STATEMENT_SECONDS,
    Connection,
    Deadline,
    NoAnswer,
    connecting_within,
    reason_of,
)

__all__ = ["Connection", "ConnectionSource", "Database", "Line", "reason_of"]

CONNECT_SECONDS = 3
WAIT_FOR_CONNECTION_SECONDS = 1.5
LEAST_SECONDS = 0.05  # one who gets a connection later than that before the deadline would only break it
LISTEN_CHECK_SECONDS = 5.0
# How long the pool tries by itself after a connection has failed. Its waits double, up to minutes, and in the meantime
# it opens nothing for those who ask; once it has given up, the next one who asks makes it try.
RECONNECT_SECONDS = 1.0
# Compiling a query takes longer than any of ours runs.
OPTIONS = f"-c statement_timeout={STATEMENT_SECONDS:g}s -c lock_timeout=3s -c jit=off"
# A process that stands still in the midst of a transaction holds its rows locked: well under the time of a lease.
IDLE_SECONDS = 8
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 10_000}


class ConnectionSource(Protocol):
    """Where a store gets its connections from: the pool, or a line of its own."""

    def connection(self, within: float | None = None) -> AbstractContextManager[Connection]: ...


class Database:
    """The pool of one process, and connections beside it. Nothing is opened before `open`."""

    def __init__(
        self,
        url: str,
        *,
        min_size: int = 1,
        max_size: int = 5,
        idle_seconds: int = IDLE_SECONDS,
        schema: str | None = None,
    ) -> None:
        """`idle_seconds`: how long a transaction may stand still before the server ends it.

        `schema`: where its tables are; None: where the server's own setting says.
        """
        self.url = url
        self._connect: dict[str, Any] = {
            "row_factory": dict_row,
            "autocommit": True,  # each block begins its own transaction
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "pokestrator",
            "options": f"{OPTIONS} -c idle_in_transaction_session_timeout={idle_seconds}s"
            + (f" -c search_path={schema}" if schema else ""),
            **KEEPALIVES,
        }
        self._lock = threading.Lock()
        self._in_use = 0
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            url,
            connection_class=Connection,
            min_size=min_size,
            max_size=max_size,
            open=False,
            reconnect_timeout=RECONNECT_SECONDS,
            kwargs=self._connect,
        )

    def open(self) -> None:
        """Start the pool; does not wait for the server."""
        self._pool.open(wait=False)

    def close(self) -> None:
        self._pool.close(timeout=2)

    @contextmanager
    def connection(self, within: float | None = None) -> Iterator[Connection]:
        """A pooled connection in a transaction: commits at the end, rolls back on any error.

        `within`: seconds that all of it may take, from the wait for the pool to the COMMIT. Without it the pool gets
        WAIT_FOR_CONNECTION_SECONDS and then each operation OPERATION_SECONDS.

        Raises StoreUnavailable; its `maybe_committed` says that COMMIT was sent, or may have been, and not answered.
        """
        connection = self._begun(within)
        try:
            with connection.rest_of_transaction(self.url):
                yield connection
        finally:
            self._give_back(connection)

    def connect(self, *, within: float | None = None, operation_seconds: float = OPERATION_SECONDS) -> Connection:
        """A connection of one's own, outside the pool, in autocommit mode. Raises StoreUnavailable.

        `within`: seconds that connecting may take; `operation_seconds`: what each operation on it may take.
        """
        deadline = Deadline(OPERATION_SECONDS if within is None else within)
        try:
            with connecting_within(deadline):
                connection = Connection.connect(self.url, **self._connect)
        except psycopg.Error as error:  # also a URL that libpq cannot read
            raise StoreUnavailable(reason_of(error, self.url)) from None
        connection.operation_seconds = operation_seconds
        return connection

    def line(self) -> Line:
        return Line(self)

    def notifications(self, channel: str, stop: threading.Event) -> Iterator[str]:
        """Payloads of NOTIFY on `channel` until `stop` is set; the first item, "", says that it listens.

        Raises StoreUnavailable; a server that falls silent is noticed within LISTEN_CHECK_SECONDS + OPERATION_SECONDS.
        """
        try:
            with self.connect() as connection:
                connection.execute(f"LISTEN {channel}".encode())
                yield ""
                checked = time.monotonic()
                while not stop.is_set():
                    for notification in connection.notifies(timeout=1):
                        yield notification.payload
                    if time.monotonic() - checked > LISTEN_CHECK_SECONDS:
                        connection.execute("SELECT 1")
                        checked = time.monotonic()
        except AWAY as error:
            raise StoreUnavailable(reason_of(error, self.url)) from error

    def _begun(self, within: float | None) -> Connection:
        """A connection from the pool that has answered to BEGIN. Raises StoreUnavailable.

        A restarted server leaves dead connections behind: they are replaced until one answers or the time is over.
        """
        wait = Deadline(WAIT_FOR_CONNECTION_SECONDS if within is None else within)
        patience = OPERATION_SECONDS if within is None else within / 2  # the other half is for a new connection
        fault: psycopg.Error | None = None
        while True:
            connection = self._take(wait, fault)
            asked = time.monotonic()
            try:
                self._begin(connection, patience, wait if within is not None else None)
                return connection
            except BaseException as error:
                self._give_back(connection)
                if not isinstance(error, psycopg.Error):
                    raise
                fault = error
                if time.monotonic() - asked >= patience:
                    self._pool.drain()  # the other idle ones are as old: nobody should wait for each of them

    def _begin(self, connection: Connection, patience: float, deadline: Deadline | None) -> None:
        connection.operation_seconds = patience
        try:
            connection.begin(deadline)
        finally:
            connection.operation_seconds = OPERATION_SECONDS

    def _take(self, wait: Deadline, fault: psycopg.Error | None) -> Connection:
        try:
            connection = self._pool.getconn(max(wait.left() - LEAST_SECONDS, 0))
        except (PoolTimeout, PoolClosed) as error:
            busy = fault is None and isinstance(error, PoolTimeout) and self._is_exhausted()
            raise StoreUnavailable(self._why_none(error, wait, fault), is_busy=busy) from (fault or error)
        with self._lock:
            self._in_use += 1
        return connection

    def _give_back(self, connection: Connection) -> None:
        connection.deadline = None
        with self._lock:
            self._in_use -= 1
        self._pool.putconn(connection)

    def _is_exhausted(self) -> bool:
        return self._in_use >= self._pool.max_size

    def _why_none(self, error: PoolTimeout | PoolClosed, wait: Deadline, fault: psycopg.Error | None) -> str:
        if isinstance(error, PoolClosed):
            return reason_of(error, self.url)
        if isinstance(fault, NoAnswer):
            return str(NoAnswer(wait.seconds, asked=True))
        if fault is not None:
            return reason_of(fault, self.url)
        if self._is_exhausted():
            return f"no connection was free within {wait.seconds:g} s: all {self._pool.max_size} are in use"
        return f"no connection could be opened within {wait.seconds:g} s"


class Line:
    """One connection for one thread, opened again after a fault: heartbeats do not wait for the pool."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None

    @contextmanager
    def connection(self, within: float | None = None) -> Iterator[Connection]:
        """The connection in a transaction. `within` and errors as those of Database.connection."""
        deadline = None if within is None else Deadline(within)
        if self._connection is None or self._connection.closed:
            self._connection = self._database.connect(within=within)
        connection = self._connection
        try:
            connection.begin(deadline)
        except psycopg.Error as error:
            raise StoreUnavailable(reason_of(error, self._database.url)) from error
        with connection.rest_of_transaction(self._database.url):
            yield connection

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
