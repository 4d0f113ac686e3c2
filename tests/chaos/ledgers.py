"""What happened, written down as it happens: every ack, every refusal, every fault, every orphan.

All times are `time.time()`, durations are in seconds. What the inbox received it keeps itself (`Inbox.received`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, Literal, TypeVar

T = TypeVar("T")

Affects = Literal["nothing", "instance", "everything"]
Interval = tuple[float, float]


class Ledger(Generic[T]):
    """A list that many threads add to and nobody changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: list[T] = []

    def add(self, entry: T) -> None:
        with self._lock:
            self._entries.append(entry)

    def __iter__(self) -> Iterator[T]:
        with self._lock:
            return iter(list(self._entries))

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def where(self, condition: Callable[[T], bool]) -> list[T]:
        return [entry for entry in self if condition(entry)]


@dataclass(frozen=True)
class Ack:
    """An `orchestrate` call that was accepted. `key` is the client's idempotency key, the same for every try."""

    at: float  # when the call was sent
    seconds: float
    key: str
    request_id: str
    durable: bool
    duplicate: bool
    instance: str


@dataclass(frozen=True)
class Refusal:
    """A try of a call that was not accepted."""

    at: float
    seconds: float
    key: str
    instance: str
    kind: Literal["no connection", "no answer", "refused"]  # refused: an HTTP answer that says no
    text: str


@dataclass(frozen=True)
class Cancel:
    """A task whose caller wanted it stopped; `status` is what the tool answered, "" when no answer came."""

    at: float
    request_id: str
    status: str


@dataclass
class Fault:
    """Something that was broken on purpose, from `started` to `ended`; `whole` is when what was killed was back.

    `affects` says whose work it stops: an instance's, everything's (the database), or nothing but the outside.
    `doubles`: it can part a callback's sending from its recording.
    """

    name: str
    instance: str | None
    affects: Affects
    doubles: bool
    started: float
    ended: float = 0.0
    whole: float = 0.0
    detail: str = ""

    def end(self) -> None:
        """The harm stops now; what it left may take longer to heal."""
        self.ended = self.whole = time.time()

    @property
    def interval(self) -> Interval:
        return self.started, self.whole

    def touches(self, instance: str) -> bool:
        """Whether `instance` could not be expected to work meanwhile."""
        return self.affects == "everything" or (self.affects == "instance" and self.instance == instance)

    def __str__(self) -> str:
        where = f" of {self.instance}" if self.instance else ""
        return (
            f"{clock(self.started)} to {clock(self.ended)} (whole {clock(self.whole)}) {self.name}{where} {self.detail}"
        )


@dataclass(frozen=True)
class Orphan:
    """A run whose row said `running` without a living owner in time: dead, or its lease had run out."""

    job_id: str
    claim_seq: int
    owner: str
    cause: Literal["death", "lease"]
    started: float  # when this was first seen
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass
class Ledgers:
    """All of them, of one run of the harness."""

    acks: Ledger[Ack] = field(default_factory=Ledger)
    refusals: Ledger[Refusal] = field(default_factory=Ledger)
    cancels: Ledger[Cancel] = field(default_factory=Ledger)
    faults: Ledger[Fault] = field(default_factory=Ledger)
    orphans: Ledger[Orphan] = field(default_factory=Ledger)
    missed: Ledger[str] = field(default_factory=Ledger)  # faults that found nothing to break
    errors: Ledger[str] = field(default_factory=Ledger)  # of the harness itself


def clock(at: float) -> str:
    """A time of day with tenths of seconds, UTC."""
    return f"{time.strftime('%H:%M:%S', time.gmtime(at))}.{int(at * 10) % 10}"


def overlap(one: Interval, other: Interval) -> bool:
    """Whether two intervals share a moment.

    >>> overlap((1, 3), (3, 4)), overlap((1, 3), (3.5, 4))
    (True, False)
    """
    return one[0] <= other[1] and other[0] <= one[1]


def calm_spans(whole: Interval, disturbed: Iterable[Interval]) -> list[Interval]:
    """What is left of `whole` without the `disturbed` intervals.

    >>> calm_spans((0, 10), [(2, 3), (2.5, 4), (9, 12)])
    [(0, 2), (4, 9)]
    """
    spans, at = [], whole[0]
    for start, end in sorted(disturbed):
        if min(start, whole[1]) > at:
            spans.append((at, min(start, whole[1])))
        at = max(at, end)
    if at < whole[1]:
        spans.append((at, whole[1]))
    return spans
