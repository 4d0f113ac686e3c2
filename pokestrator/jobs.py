"""A job: our record of what a person wants. Its states are drawn in docs/architecture.md.

queued ──claim──▶ running ──finish──▶ succeeded | failed | cancelled
   ▲                 │
   └── interrupted ──┘   (or released, or to be tried again; cancel ends a queued one at once)
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from pokestrator.runs import ErrorKind, Usage

MAX_CALLBACK_CHARACTERS = 4_000  # people read it on a phone; the job keeps the whole result

CANCELLED = "The task was cancelled, as you asked."
TOO_LATE = "This was done before it could be cancelled:"
RAN_AGAIN = "(The first try was cut short and I ran this again, so anything it did may have happened twice.)"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Route(StrEnum):
    MATCH = "match"
    TEMPLATE = "template"
    BUILD_NEW = "build_new"


class Channel(StrEnum):
    """How a job's result reaches the person."""

    CALLBACK = "callback"  # the URL and token that Poke's request carried
    API_MESSAGE = "api_message"  # Poke's message API, with our key
    NONE = "none"  # asked for at a terminal: the result is printed, nothing is sent


class CallbackState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    DEAD = "dead"


class Verdict(StrEnum):
    """What a person said of a result."""

    GOOD = "good"
    BAD = "bad"


@dataclass(frozen=True)
class CallbackTarget:
    """Where a request asked its answer to be sent (`X-Poke-Callback-Url` and `X-Poke-Callback-Token`)."""

    url: str
    token: str


@dataclass(frozen=True)
class Idempotency:
    """Which earlier job a call may be a repetition of: one with this key, made in the last `seconds`.

    `while_unfinished`: only as long as that job has not ended.
    """

    key: str  # a digest
    seconds: float
    while_unfinished: bool


@dataclass(frozen=True)
class NewJob:
    """A checked task, not yet stored. `id` is the request_id and is made before the insert."""

    id: uuid.UUID
    task: str
    metadata: str | Mapping[str, Any]
    caller: str | None
    channel: Channel
    callback: CallbackTarget | None = None
    idempotency: Idempotency | None = None


@dataclass(frozen=True)
class Job:
    """A stored job as its runner sees it. `claim_seq` is the fence of the claim that returned it."""

    id: uuid.UUID
    task: str
    metadata: str | Mapping[str, Any]
    caller: str | None
    channel: Channel
    state: JobState
    claim_seq: int
    interruptions: int
    api_retries: int
    created_at: datetime

    @property
    def run_id(self) -> str:
        """Names this claim's run of an agent."""
        return f"{self.id}:{self.claim_seq}"


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `text` goes to the person; `detail` to the record."""

    state: JobState
    text: str
    error: ErrorKind | None = None
    detail: str = ""
    usage: Usage = field(default_factory=Usage)
    is_transient: bool = False  # the API had trouble that may be over in a moment
    holds_secret: bool = False  # the task does: nobody else may read it, so it is not remembered


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's timeline."""

    at: datetime
    kind: str  # accepted, claimed, routed, drafting, built, tool, text, retry, finished, …
    text: str


@dataclass(frozen=True)
class Acknowledgement:
    """What `orchestrate` answers. Not durable: the task runs from memory while the database is away.

    `duplicate`: the call repeated an earlier one, and `request_id` is that one's.
    """

    request_id: uuid.UUID
    durable: bool
    message: str
    duplicate: bool = False


@dataclass(frozen=True)
class JobStatus:
    """What a caller may know of a job of theirs. Ages and waits are in seconds, by the database's clock."""

    request_id: uuid.UUID
    state: JobState
    task: str
    age_seconds: float
    cancel_requested: bool
    waits_seconds: float  # until it may run (again); 0 when it may at once
    latest: JobEvent | None
    result: str | None  # what the person is told, once it has ended
    delivery: CallbackState | None  # of the message that says so; None while there is none
    verdict: Verdict | None = None  # what the person said of the result


def ending(outcome: Outcome, *, cancel_requested: bool, runs: int) -> Outcome:
    """How a job really ends, whose last run ended like this.

    A run that was to be cancelled is cancelled, unless it had succeeded before it could be. What comes from a second
    run says so: the first may have sent, bought or written something before it was cut short.
    """
    if cancel_requested and outcome.state is not JobState.SUCCEEDED:
        return Outcome(JobState.CANCELLED, CANCELLED, detail=outcome.detail, usage=outcome.usage)
    text = f"{outcome.text}\n\n{RAN_AGAIN}" if runs > 1 and outcome.text else outcome.text
    if cancel_requested:
        text = f"{TOO_LATE}\n\n{text}"
    return replace(outcome, text=text)


def callback_content(result: str) -> str:
    """A result as it is sent to the person; one that must be shortened keeps its end note."""
    if len(result) <= MAX_CALLBACK_CHARACTERS:
        return result
    note = "… (shortened)"
    if result.endswith(RAN_AGAIN):
        note = f"{note}\n\n{RAN_AGAIN}"
    return result[: MAX_CALLBACK_CHARACTERS - len(note)] + note
