"""A gunicorn worker none of whose threads waits for a client.

gthread gives a connection to a thread, which waits for the request: whoever sends slowly on as many connections as
there are threads keeps everybody else out. Here the main loop gathers each request, and a thread gets it when it is
whole; who takes too long is refused. Nor does the main loop wait for anybody: it parts from clients in the same way.
"""

from __future__ import annotations

import errno
import io
import itertools
import select
import selectors
import socket
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import Any

from gunicorn import http
from gunicorn.http import errors
from gunicorn.workers.gthread import STOP_KEEPALIVE_LINGER, TConn, ThreadWorker

from pokestrator.telemetry import get_logger
from pokestrator.web.arrival import Arrival, Progress
from pokestrator.web.mcp import MAX_BODY_BYTES
from pokestrator.web.refusals import CONTINUE, refusal

log = get_logger(__name__)

READ_SECONDS = 10  # for a whole request, from the connection or its first byte
WRITE_SECONDS = 10  # for a whole answer
LEAVE_SECONDS = 2  # for the client to take the last answer and close
MAX_BUFFERED_BYTES = 32 * 1024 * 1024  # of requests that have not arrived in full, in all
RECEIVE_BYTES = 64 * 1024
MAX_DISCARDED_BYTES = 8 * 1024 * 1024  # of what is sent by somebody who has been refused

# What gunicorn's parser raises, and how it is answered: the first that fits.
REFUSED = {
    errors.UnsupportedTransferCoding: 501,
    errors.LimitRequestLine: 414,
    errors.LimitRequestHeaders: 431,
    errors.ExpectationFailed: 417,
    errors.ParseException: 400,
}


class Client(TConn):
    """A connection, with what it has sent of its next request."""

    timeout: Any  # the time, of the monotonic clock, that ends what it is at

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)  # type: ignore[no-untyped-call]
        self.arrival = Arrival(MAX_BODY_BYTES)

    def hand_over(self) -> None:
        """Let gunicorn's parser have the request that has arrived."""
        self.parser = http.get_parser(self.cfg, self.arrival.take(), self.client)  # type: ignore[no-untyped-call]
        self.initialized = True

    def receive(self) -> bytes | None:
        """What has come; empty: it has ended; None: nothing yet."""
        try:
            piece: bytes = self.sock.recv(RECEIVE_BYTES)
            return piece
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, answer: bytes) -> None:
        """Send a few bytes, if they can be sent at once."""
        try:
            self.sock.send(answer)
        except OSError as error:
            log.debug("not_sent", reason=str(error))

    def takes_more(self) -> bool:
        """Whether it has room for an answer: one that reads none fills up."""
        waiting = select.poll()
        waiting.register(self.sock, select.POLLOUT)
        return bool(waiting.poll(0))


class GatheringWorker(ThreadWorker):
    """gthread, told apart by how it reads and by how it closes."""

    poller: Any

    def init_process(self) -> None:
        self._arriving: dict[Client, None] = {}  # in the order of their deadlines, as all of these are
        self._leaving: dict[Client, int] = {}  # with the bytes that were discarded
        super().init_process()  # type: ignore[no-untyped-call]

    # a request comes in ------------------------------------------------------------------------------------------

    def accept(self, listener: Any) -> None:
        """Called when somebody has connected."""
        try:
            client, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room()
            elif error.errno not in (errno.EAGAIN, errno.ECONNABORTED, errno.EWOULDBLOCK):
                raise
            return
        self.nr_conns += 1
        if self.nr_conns >= self.worker_connections:
            self._make_room()
        self._await_request(Client(self.cfg, client, address, listener.getsockname()))

    def on_client_socket_readable(self, conn: Client, client: Any) -> None:
        """Called when a kept connection speaks again."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._await_request(conn)

    def _await_request(self, conn: Client) -> None:
        conn.timeout = time.monotonic() + READ_SECONDS
        self._arriving[conn] = None
        self._watch(conn, self._arriving, self._receive)
        if conn.arrival.data:
            self._look_at(conn)

    def _receive(self, conn: Client) -> None:
        piece = conn.receive()
        if piece is None:
            return
        if not piece:
            self._end(conn)
            return
        conn.arrival.data += piece
        self._look_at(conn)
        while sum(len(each.arrival.data) for each in self._arriving) > MAX_BUFFERED_BYTES:
            self._refuse(max(self._arriving, key=lambda each: len(each.arrival.data)), 503)

    def _look_at(self, conn: Client) -> None:
        """Give the request to a thread if it is whole, refuse it if it is too large, or wait for more."""
        progress = conn.arrival.progress()
        if progress is Progress.HEAD_TOO_LARGE:
            self._refuse(conn, 431)
        elif progress is Progress.BODY_TOO_LARGE:
            self._refuse(conn, 413)
        elif progress is Progress.WHOLE:
            self._forget(conn)
            conn.hand_over()
            self.enqueue_req(conn)  # type: ignore[no-untyped-call]
        elif conn.arrival.expects_continue:
            conn.arrival.expects_continue = False
            conn.send(CONTINUE)

    def _make_room(self) -> None:
        """Close whoever has been leaving for longest, or else refuse whoever has been arriving for longest."""
        if leaving := next(iter(self._leaving), None):
            self._end(leaving)
        elif oldest := next(iter(self._arriving), None):
            _log_refusal(oldest, 503)
            oldest.send(refusal(503))
            self._end(oldest)

    # a thread answers it -----------------------------------------------------------------------------------------

    def handle_request(self, req: Any, conn: Client) -> bool:
        # A client that does not read what it asked for fills its connection up, and the thread would wait for it.
        if not conn.takes_more():
            return False
        req.body = io.BytesIO(req.body.read())  # all of it is here; a body that is malformed is answered with a 400
        conn.sock.settimeout(WRITE_SECONDS)
        try:
            return bool(super().handle_request(req, conn))  # type: ignore[no-untyped-call]
        except TimeoutError:
            return False

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: Exception) -> None:
        """Answer what gunicorn's parser has refused, and what nobody has foreseen, without a word of the request's."""
        status = next((status for kind, status in REFUSED.items() if isinstance(exc, kind)), 500)
        if status == 500:
            log.error("request_failed", exc_info=exc)
        else:
            log.warning("request_refused", status=status, reason=type(exc).__name__, address=addr[0])
        with suppress(OSError):  # it has gone, or takes nothing: it is closed in any case
            client.settimeout(0)
            client.send(refusal(status))

    def finish_request(self, conn: Client, fs: Any) -> None:
        """Called in the main loop when a thread is done with a connection; its future, whether to keep it."""
        if fs.cancelled() or fs.exception() is not None or not fs.result():
            self._part_from(conn)
        elif conn.arrival.data:
            self._await_request(conn)
        else:
            conn.set_timeout()  # type: ignore[no-untyped-call]
            if not self.alive:
                conn.timeout = min(conn.timeout, time.monotonic() + STOP_KEEPALIVE_LINGER)
            self.keepalived_conns.append(conn)
            conn.sock.setblocking(False)
            self.poller.register(conn.sock, selectors.EVENT_READ, partial(self.on_client_socket_readable, conn))

    # a connection ends -------------------------------------------------------------------------------------------

    def _refuse(self, conn: Client, status: int) -> None:
        """Answer without having read the request."""
        _log_refusal(conn, status)
        self._forget(conn)
        conn.send(refusal(status))
        self._part_from(conn)

    def _part_from(self, conn: Client) -> None:
        """Say that no more comes, and close when the client has; else what it still sends would lose it our answer."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(conn)
            return
        conn.timeout = time.monotonic() + LEAVE_SECONDS
        self._leaving[conn] = 0
        self._watch(conn, self._leaving, self._discard)

    def _discard(self, conn: Client) -> None:
        piece = conn.receive()
        if piece is None:
            return
        self._leaving[conn] += len(piece)
        if not piece or self._leaving[conn] > MAX_DISCARDED_BYTES:
            self._end(conn)

    def murder_pending(self) -> None:
        """Called about once a second."""
        now = time.monotonic()
        for conn in _expired(self._arriving, now):
            if conn.arrival.data:
                self._refuse(conn, 408)
            else:
                self._end(conn)
        for conn in _expired(self._leaving, now):
            self._end(conn)

    def _watch(self, conn: Client, place: Collection[Client], act: Callable[[Client], None]) -> None:
        """Have the main loop call `act` when there is something to receive, as long as the connection is in `place`."""

        def readable(_: object) -> None:
            if conn in place:  # and not moved on by what came before it in the same turn
                act(conn)

        conn.sock.setblocking(False)
        self.poller.register(conn.sock, selectors.EVENT_READ, readable)

    def _forget(self, conn: Client) -> None:
        self.poller.unregister(conn.sock)
        self._arriving.pop(conn, None)
        self._leaving.pop(conn, None)

    def _end(self, conn: Client) -> None:
        if conn in self._arriving or conn in self._leaving:
            self._forget(conn)
        self.nr_conns -= 1
        conn.close()  # type: ignore[no-untyped-call]


def _log_refusal(conn: Client, status: int) -> None:
    log.info("request_refused", status=status, reason=HTTPStatus(status).phrase, address=conn.client[0])


def _expired(conns: Iterable[Client], now: float) -> list[Client]:
    return list(itertools.takewhile(lambda conn: conn.timeout <= now, conns))
