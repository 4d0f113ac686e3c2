"""Connections to PostgreSQL, and the one place where the driver's errors become ours."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.rows import DictRow, dict_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout

from pokestrator.errors import StoreUnavailable

Connection = psycopg.Connection[DictRow]

# What the server's absence looks like; a table that is missing means that another process has yet to migrate.
AWAY = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.UndefinedTable,
    psycopg.errors.ReadOnlySqlTransaction,  # a standby, after a failover
    psycopg.errors.InsufficientPrivilege,
)

CONNECT_SECONDS = 3
WAIT_FOR_CONNECTION_SECONDS = 1.5  # an accept answers in under 2 s
# How long the pool tries by itself after a connection has failed. Its waits double, up to minutes, and in the meantime
# it opens nothing for those who ask; once it has given up, the next one who asks makes it try.
RECONNECT_SECONDS = 1.0
# A server that hangs must not hang us: the client gives up on silent connections, the server on slow statements.
OPTIONS = "-c statement_timeout=10s -c lock_timeout=5s -c idle_in_transaction_session_timeout=30s"
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 10_000}


class ConnectionSource(Protocol):
    """Where a store gets its connections from: the pool, or a line of its own."""

    def connection(self) -> AbstractContextManager[Connection]: ...


class Database:
    """The pool of one process, and connections beside it. Nothing is opened before `open`."""

    def __init__(self, url: str, *, min_size: int = 1, max_size: int = 5) -> None:
        self._url = url
        self._connect: dict[str, Any] = {
            "row_factory": dict_row,
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "pokestrator",
            "options": OPTIONS,
            **KEEPALIVES,
        }
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            url,
            min_size=min_size,
            max_size=max_size,
            open=False,
            timeout=WAIT_FOR_CONNECTION_SECONDS,
            reconnect_timeout=RECONNECT_SECONDS,
            check=ConnectionPool.check_connection,  # a restarted server leaves dead connections behind
            kwargs=self._connect,
        )

    def open(self) -> None:
        """Start the pool; does not wait for the server."""
        self._pool.open(wait=False)

    def close(self) -> None:
        self._pool.close(timeout=2)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A pooled connection in a transaction: commits at the end, rolls back on any error.

        Raises StoreUnavailable; its `maybe_committed` is False when no statement can have reached the server.
        """
        reached = False
        try:
            with self._pool.connection() as connection:
                reached = True
                yield connection
        except (*AWAY, PoolTimeout, PoolClosed) as error:
            raise StoreUnavailable(reason_of(error, self._url), maybe_committed=reached) from error

    def connect(self, *, autocommit: bool = True) -> Connection:
        """A connection of one's own, outside the pool. Raises StoreUnavailable."""
        try:
            return psycopg.Connection[DictRow].connect(self._url, autocommit=autocommit, **self._connect)
        except psycopg.Error as error:  # also a URL that libpq cannot read
            raise StoreUnavailable(reason_of(error, self._url)) from None

    def line(self) -> Line:
        return Line(self)

    def notifications(self, channel: str, stop: threading.Event) -> Iterator[str]:
        """Payloads of NOTIFY on `channel` until `stop` is set; the first item, "", says that it listens."""
        try:
            with self.connect() as connection:
                connection.execute(f"LISTEN {channel}")
                yield ""
                while not stop.is_set():
                    for notification in connection.notifies(timeout=1):
                        yield notification.payload
        except AWAY as error:
            raise StoreUnavailable(reason_of(error, self._url)) from error


class Line:
    """One connection for one thread, opened again after a fault: heartbeats do not wait for the pool."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._connection: Connection | None = None

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """The connection in a transaction. Raises StoreUnavailable."""
        if self._connection is None or self._connection.closed:
            self._connection = self._database.connect()
        try:
            with self._connection.transaction():
                yield self._connection
        except AWAY as error:
            self.close()
            raise StoreUnavailable(reason_of(error), maybe_committed=True) from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def reason_of(error: Exception, url: str = "") -> str:
    """The driver's text on one line, without the parts of `url` that are nobody's business."""
    reason = " ".join(str(error).split()) or type(error).__name__
    authority = urlsplit(url).netloc
    credentials, _, _ = authority.rpartition("@")
    # A password with a bare "@" or a bad escape comes back in pieces: as part of a host name, or as a token.
    pieces = [piece for piece in re.split(r"[:@]", credentials)[1:] if piece]
    for secret in sorted({*pieces, *map(unquote, pieces)}, key=len, reverse=True):
        reason = reason.replace(secret, "…")
    return reason
