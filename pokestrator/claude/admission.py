"""What one run may do through the relay, for as long as it lasts: its token, its budget, its connections."""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from pokestrator.claude.counting import Ledger
from pokestrator.claude.outcomes import failure
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult

MOST_CONNECTIONS = 32  # of one run at once: each is a thread of ours
MOST_QUESTIONS = 4  # to Claude at once: each is held in memory; more wait
MOST_EVENTS = 100  # about connections, in one timeline
END_SECONDS = 1.0  # that connections which were cut get to say what they have carried


class Finished(Exception):
    """The run has ended, or has too many connections; whoever asked is not served."""


class Admission:
    """One run, as the relay sees it. Thread-safe."""

    def __init__(self, request: RunRequest, on_event: Callable[[RunEvent], None]) -> None:
        self.token = secrets.token_urlsafe(32)
        self.hosts = request.hosts
        self.may_search = "WebSearch" in request.tools
        self.ledger = Ledger(request.max_budget_usd)
        self.questions = threading.Semaphore(MOST_QUESTIONS)
        self.is_over_budget = False  # a question was refused, or an answer cut, because of it
        self.is_unreachable = False  # the last question found no way to Claude's API
        self._on_event = on_event
        self._events = 0
        self._changed = threading.Condition()
        self._has_ended = False
        self._serving = 0
        self._sockets: set[socket.socket] = set()

    @property
    def has_ended(self) -> bool:
        return self._has_ended

    @contextmanager
    def serving(self, client: socket.socket) -> Iterator[None]:
        """One connection of the run's. Raises Finished."""
        with self._changed:
            if self._has_ended or self._serving >= MOST_CONNECTIONS:
                raise Finished
            self._serving += 1
            self._sockets.add(client)
        try:
            yield
        finally:
            with self._changed:
                self._serving -= 1
                self._sockets.discard(client)
                self._changed.notify_all()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """A place for one question to Claude, once there is one. Raises Finished."""
        with self.questions:
            if self._has_ended:
                raise Finished
            yield

    def cuts(self, upstream: socket.socket) -> None:
        """End this connection, which was made for the run, with it. Raises Finished."""
        with self._changed:
            if self._has_ended:
                raise Finished
            self._sockets.add(upstream)

    def tell(self, kind: str, text: str) -> None:
        """Add a line to the run's timeline, unless it has had its share."""
        with self._changed:
            self._events += 1
            number = self._events
        if number < MOST_EVENTS:
            self._on_event(RunEvent(kind, text))
        elif number == MOST_EVENTS:
            self._on_event(RunEvent(kind, f"{text}; what follows is not listed"))

    def end(self) -> None:
        """Let nothing more pass: the run is over. Waits a moment for what was cut to be accounted for."""
        with self._changed:
            self._has_ended = True
            for each in self._sockets:
                with suppress(OSError):
                    # The plain socket's: a TLS one would drop its state while another thread reads from it.
                    socket.socket.shutdown(each, socket.SHUT_RDWR)
            self._changed.wait_for(lambda: self._serving == 0, END_SECONDS)

    def settled(self, result: RunResult) -> RunResult:
        """The run's result with what the relay knows better: its cost, and some of the reasons for its failure."""
        usage = self.ledger.usage(result.usage)
        if result.error not in (None, ErrorKind.AGENT_CRASHED) and self.is_over_budget:
            spent, budget = self.ledger.spent_usd(), self.ledger.budget_usd
            return failure(ErrorKind.BUDGET_LIMIT, f"{spent:.4f} of {budget:g} US dollars were spent", usage)
        if result.error is ErrorKind.API_ERROR and self.is_unreachable:
            return failure(ErrorKind.UNREACHABLE, result.detail, usage, is_transient=True)
        return replace(result, usage=usage)


def digest_of(token: str) -> bytes:
    """What tokens are looked up by: how long that takes says nothing about a token that is not there."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
