"""The relay, the only address that agents reach: one port on loopback is Claude's API and the way out to listed hosts.

A run is let in by a token that is good for as long as it lasts. The owner's key stays in this process: the relay puts
it into the questions to Claude, and cuts everything of a run's that is still open when the run ends.
"""

from __future__ import annotations

import base64
import binascii
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

from pokestrator.claude.admission import Admission, Finished, digest_of
from pokestrator.claude.egress import Egress, tunnel
from pokestrator.claude.relay_http import Conversation, Refused
from pokestrator.claude.relay_messages import PATHS, relay
from pokestrator.claude.upstream import OWNERS, Connections, Upstream
from pokestrator.runs import RunEvent, RunRequest
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

MOST_STRANGERS = 64  # connections that have not said whose they are; the one that has waited longest makes room
SEND_SECONDS = 60.0  # that an agent may let an answer wait
LINGER_SECONDS = 1.0  # that a client may go on sending after its answer
PROXY_USER = "run"


def of_agents(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the owner's environment every agent may see: nothing that the relay is there to keep."""
    return {name: value for name, value in environment.items() if name not in OWNERS}


class Relay:
    """One process's. Nothing is opened before start(); start() and close() may be called again and again."""

    def __init__(self, upstream: Upstream, egress: Egress) -> None:
        self._upstream = upstream
        self._egress = egress
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._address = ""
        self._admissions: dict[bytes, tuple[Admission, Connections]] = {}
        self._strangers: dict[socket.socket, None] = {}

    def start(self) -> None:
        """Listen. Raises OSError."""
        self._upstream.prepare()
        with self._lock:
            if self._listener is None:
                self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
                self._address = "{}:{}".format(*self._listener.getsockname())
                threading.Thread(target=self._accept, args=(self._listener,), name="relay", daemon=True).start()

    def close(self) -> None:
        """End every run's connections, and listen no more."""
        with self._lock:
            listener, self._listener = self._listener, None
            admitted = [admission for admission, _ in self._admissions.values()]
            strangers = list(self._strangers)
        if listener is not None:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # ends accept()
            listener.close()
        for admission in admitted:
            admission.end()
        for each in strangers:
            _shut(each)

    @contextmanager
    def admit(
        self, request: RunRequest, on_event: Callable[[RunEvent], None]
    ) -> Iterator[tuple[Admission, RunRequest]]:
        """Let a run in for as long as the block lasts: how the relay sees it, and its request with the way in."""
        admission = Admission(request, on_event)
        connections = self._upstream.connections(admission.cuts)
        key = digest_of(admission.token)
        with self._lock:
            self._admissions[key] = admission, connections
        try:
            yield admission, replace(request, variables={**request.variables, **self._variables(admission)})
        finally:
            with self._lock:
                del self._admissions[key]
            admission.end()
            connections.close()

    def _variables(self, admission: Admission) -> dict[str, str]:
        proxy = f"http://{PROXY_USER}:{admission.token}@{self._address}"
        names = ("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy")
        variables = {"ANTHROPIC_BASE_URL": f"http://{self._address}", **dict.fromkeys(names, proxy)}
        variables["NODE_USE_ENV_PROXY"] = "1"  # Node's own fetch looks at these only when told to
        if name := self._upstream.token_name:
            variables[name] = admission.token
        return variables

    # the threads -----------------------------------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while self._listener is listener:
            try:
                connection, address = listener.accept()
            except OSError as error:
                if self._listener is listener:
                    log.warning("relay_cannot_accept", reason=repr(error))
                    threading.Event().wait(0.1)  # too many open files: some will be closed
                continue
            try:
                threading.Thread(target=self._serve, args=(connection, address), name="relay", daemon=True).start()
            except RuntimeError as error:  # the machine has no thread left for us
                log.error("no_thread", reason=str(error))
                connection.close()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        with connection:
            self._meet(connection)
            try:
                _Served(self, connection, address)
            except Exception:
                log.exception("relay_failed")  # one connection of one run; nobody else must notice
            finally:
                self.knows(connection)
            _hang_up(connection)

    def _meet(self, stranger: socket.socket) -> None:
        with self._lock:
            self._strangers[stranger] = None
            crowd = len(self._strangers) > MOST_STRANGERS
            oldest = next(iter(self._strangers)) if crowd else None
            if oldest is not None:
                del self._strangers[oldest]
        if oldest is not None:
            _shut(oldest)

    def knows(self, connection: socket.socket) -> None:
        """It has said whose it is, or has left."""
        with self._lock:
            self._strangers.pop(connection, None)

    def admitted(self, token: str) -> tuple[Admission, Connections] | None:
        """Whose token this is, while its run lasts."""
        with self._lock:
            return self._admissions.get(digest_of(token)) if token else None

    @property
    def egress(self) -> Egress:
        return self._egress


class _Served(Conversation):
    """One connection: a question to Claude, or a tunnel."""

    def __init__(self, its_relay: Relay, connection: socket.socket, address: Any) -> None:
        self._relay = its_relay
        super().__init__(connection, address, None)  # type: ignore[arg-type]  # it needs nothing of a server

    def respond(self) -> None:
        if self.command == "CONNECT":
            found = self._relay.admitted(_proxy_token(self.headers.get("proxy-authorization", "")))
            if found is None:
                raise Refused(
                    407,
                    "authentication_error",
                    "this proxy serves only a run that goes on, by its HTTPS_PROXY",
                    {"proxy-authenticate": 'Basic realm="run"'},
                )
            with self._of(found[0]):
                tunnel(self, self.path, found[0], self._relay.egress)
            return
        if not self.path.startswith("/"):
            raise Refused(403, "permission_error", "only https is open to agents, by CONNECT")
        path, _, query = self.path.partition("?")
        if self.command != "POST" or path not in PATHS:
            raise Refused(404, "not_found_error", "this relay has only POST /v1/messages and its count_tokens")
        found = self._relay.admitted(self._key())
        if found is None:
            raise Refused(401, "authentication_error", "this key is of no run that goes on")
        admission, connections = found
        with self._of(admission):
            relay(self, path, query, admission, connections)

    @contextmanager
    def _of(self, admission: Admission) -> Iterator[None]:
        """It is this run's connection. Ends without an answer when the run has ended."""
        self._relay.knows(self.connection)
        self.connection.settimeout(SEND_SECONDS)
        with ExitStack() as stack:
            try:
                stack.enter_context(admission.serving(self.connection))
                yield
            except Finished as error:
                raise ConnectionError("its run has ended, or has too many connections") from error

    def _key(self) -> str:
        """The run's token, where the CLI puts a key or an OAuth token."""
        scheme, _, bearer = self.headers.get("authorization", "").partition(" ")
        return self.headers.get("x-api-key", "") or (bearer.strip() if scheme.lower() == "bearer" else "")


def _proxy_token(header: str) -> str:
    """The password of Basic authorization; empty for anything else."""
    scheme, _, encoded = header.partition(" ")
    try:
        name, _, password = base64.b64decode(encoded.strip(), validate=True).decode().partition(":")
    except (binascii.Error, ValueError):
        return ""
    return password if scheme.lower() == "basic" and name == PROXY_USER else ""


def _hang_up(connection: socket.socket) -> None:
    """End a connection from our side. What still comes is read: closed upon it, the answer might not arrive."""
    until = time.monotonic() + LINGER_SECONDS
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(65_536):
                return


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
