"""One connection to PostgreSQL: no call on it hangs, and what is known of a COMMIT is told exactly.

A deadline of the server's (`statement_timeout`) does not help against a server that is frozen, or a network that
swallows packets; so each operation has one of the client's. A connection whose deadline has passed is closed: what
its server still does is unknown.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from urllib.parse import unquote, urlsplit

import psycopg
from psycopg.abc import PQGen, PQGenConn
from psycopg.pq import TransactionStatus
from psycopg.rows import DictRow

from pokestrator.errors import StoreUnavailable

T = TypeVar("T")

OPERATION_SECONDS = 6.0
# The server gives up first, where it can: then it says why, and the connection stays whole.
STATEMENT_SECONDS = 5.0
SERVER_FIRST_SECONDS = 0.1

# What the server's absence looks like; what is missing in its tables means that another process has yet to migrate.
AWAY = (
    psycopg.OperationalError,
    psycopg.InterfaceError,
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.UndefinedObject,
    psycopg.errors.ReadOnlySqlTransaction,  # a standby, after a failover
    psycopg.errors.InsufficientPrivilege,
)

# Given up by the server itself.
BUSY = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled)

# psycopg's own limit for connecting is at least two seconds and counted per address; this thread's is kept here.
_connecting = threading.local()


class NoAnswer(psycopg.OperationalError):
    """The time that was allowed has passed. `asked`: the operation had been sent, at least in part."""

    def __init__(self, seconds: float, *, asked: bool) -> None:
        self.asked = asked
        super().__init__(f"PostgreSQL did not answer within {seconds:g} s")


@dataclass(frozen=True)
class Deadline:
    """`seconds` from its making; several operations can share one."""

    seconds: float
    made: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds; not above zero once it has passed."""
        return self.made + self.seconds - time.monotonic()


class Connection(psycopg.Connection[DictRow]):
    """A connection each of whose operations ends within `operation_seconds`, and all within `deadline`, if there is
    one. When the time has passed, the connection is closed and NoAnswer raised."""

    operation_seconds = OPERATION_SECONDS
    deadline: Deadline | None = None

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        """What every operation goes through."""
        if timeout is not None:  # notifies(), for which an end without an answer is no fault
            return super().wait(gen, interval, timeout)
        limit = allowed = self.operation_seconds
        if self.deadline is not None and self.deadline.left() < limit:
            limit, allowed = self.deadline.left(), self.deadline.seconds
        if limit <= 0:
            self.close()
            raise NoAnswer(allowed, asked=False)
        try:
            return super().wait(gen, interval, limit)
        except psycopg.errors._WaitTimeout:
            self.close()
            raise NoAnswer(allowed, asked=True) from None

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> PQGenConn[Connection]:
        steps = super()._connect_gen(conninfo)
        deadline: Deadline | None = getattr(_connecting, "deadline", None)
        try:
            wanted = next(steps)
            while deadline is None or deadline.left() > 0:
                wanted = steps.send((yield wanted))
        except StopIteration as done:
            connected: Connection = done.value
            return connected
        steps.close()
        raise NoAnswer(deadline.seconds, asked=True)

    def begin(self, deadline: Deadline | None) -> None:
        """Begin a transaction all of which shares `deadline`. Raises psycopg.Error, and is closed then."""
        self.deadline = deadline
        statement = "BEGIN"
        if deadline is not None:
            seconds = min(max(deadline.left() - SERVER_FIRST_SECONDS, SERVER_FIRST_SECONDS), STATEMENT_SECONDS)
            statement += f"; SET LOCAL statement_timeout = {round(1000 * seconds)}"
        try:
            self.execute(statement.encode())
        except BaseException:
            self.close()
            raise

    @contextmanager
    def rest_of_transaction(self, url: str) -> Iterator[None]:
        """COMMIT at the end, ROLLBACK on any error. A connection that can do neither is closed.

        Raises StoreUnavailable; its `maybe_committed` says that COMMIT was sent, or may have been, and not answered.
        Other errors of psycopg, such as a broken constraint, pass: nothing was committed then either.
        """
        committing = False
        try:
            yield
            self._refuse_to_commit_nothing()
            committing = True
            self.commit()
        except BaseException as error:
            unanswered = committing and _is_unanswered(error, self)
            away = isinstance(error, AWAY) or (isinstance(error, psycopg.Error) and self.closed)
            self._abandon()
            if away:
                raise StoreUnavailable(
                    reason_of(error, url), maybe_committed=unanswered, is_busy=isinstance(error, BUSY)
                ) from error
            raise

    def _refuse_to_commit_nothing(self) -> None:
        # The block has swallowed an error. The server would answer such a COMMIT with a ROLLBACK, and psycopg not tell.
        if self.closed:
            raise psycopg.OperationalError("the connection was lost before COMMIT")
        if self.pgconn.transaction_status == TransactionStatus.INERROR:
            raise psycopg.errors.InFailedSqlTransaction("a statement has failed, so there is nothing to commit")

    def _abandon(self) -> None:
        if self.closed:
            return
        try:
            self.rollback()
        except psycopg.Error:
            self.close()


@contextmanager
def connecting_within(deadline: Deadline) -> Iterator[None]:
    """Let connects of this thread end at `deadline`."""
    _connecting.deadline = deadline
    try:
        yield
    finally:
        _connecting.deadline = None


def _is_unanswered(error: BaseException, connection: Connection) -> bool:
    """Whether a COMMIT that has raised `error` may have happened: a plain ERROR of the server is its answer, no."""
    if isinstance(error, NoAnswer):
        return error.asked
    if isinstance(error, psycopg.Error) and error.diag.severity_nonlocalized == "ERROR":
        return False
    return connection.closed


def reason_of(error: BaseException, url: str = "") -> str:
    """The driver's text on one line, without the parts of `url` that are nobody's business."""
    reason = " ".join(str(error).split()) or type(error).__name__
    authority = urlsplit(url).netloc
    credentials, _, _ = authority.rpartition("@")
    # A password with a bare "@" or a bad escape comes back in pieces: as part of a host name, or as a token.
    pieces = [piece for piece in re.split(r"[:@]", credentials)[1:] if piece]
    for secret in sorted({*pieces, *map(unquote, pieces)}, key=len, reverse=True):
        reason = reason.replace(secret, "…")
    return reason
