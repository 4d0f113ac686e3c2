"""A job: our record of what a person wants. Its states are drawn in docs/architecture.md.

queued ──claim──▶ running ──finish──▶ succeeded | failed | cancelled
   ▲                 │
   └── interrupted ──┘
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from pokestrator.errors import InvalidTask
from pokestrator.runs import ErrorKind, Usage

MAX_TASK_CHARACTERS = 20_000
MAX_METADATA_BYTES = 16 * 1024
MAX_CALLBACK_CHARACTERS = 4_000  # people read it on a phone; the job keeps the whole result


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


@dataclass(frozen=True)
class CallbackTarget:
    """Where a request asked its answer to be sent (`X-Poke-Callback-Url` and `X-Poke-Callback-Token`)."""

    url: str
    token: str


@dataclass(frozen=True)
class NewJob:
    """A checked task, not yet stored. `id` is the request_id and is made before the insert."""

    id: uuid.UUID
    task: str
    metadata: str | Mapping[str, Any]
    caller: str | None
    channel: Channel
    callback: CallbackTarget | None = None


@dataclass(frozen=True)
class Job:
    """A stored job as its runner sees it. `claim_seq` is the fence of the claim that returned it."""

    id: uuid.UUID
    task: str
    metadata: str | Mapping[str, Any]
    caller: str | None
    channel: Channel
    callback: CallbackTarget | None
    state: JobState
    claim_seq: int
    interruptions: int
    created_at: datetime


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `text` goes to the person; `detail` to the record."""

    state: JobState
    text: str
    error: ErrorKind | None = None
    detail: str = ""
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True)
class JobEvent:
    """One line of a job's timeline."""

    at: datetime
    kind: str  # accepted, claimed, routed, drafting, built, tool, text, retry, finished, …
    text: str


@dataclass(frozen=True)
class Acknowledgement:
    """What `orchestrate` answers. Not durable: the task runs from memory while the database is away."""

    request_id: uuid.UUID
    durable: bool
    message: str


def callback_content(result: str) -> str:
    """A result as it is sent to the person."""
    if len(result) <= MAX_CALLBACK_CHARACTERS:
        return result
    note = "… (shortened)"
    return result[: MAX_CALLBACK_CHARACTERS - len(note)] + note


def new_job(
    task_description: object,
    metadata: object = "",
    *,
    caller: str | None = None,
    callback: CallbackTarget | None = None,
    channel: Channel | None = None,
) -> NewJob:
    """Check an `orchestrate` call and make its job. Raises InvalidTask naming the field and the limit."""
    task = _check_task(task_description)
    return NewJob(
        id=uuid.uuid4(),
        task=task,
        metadata=_check_metadata(metadata),
        caller=caller,
        channel=channel or (Channel.CALLBACK if callback else Channel.API_MESSAGE),
        callback=callback,
    )


def _check_task(task: object) -> str:
    if not isinstance(task, str):
        raise InvalidTask("task_description", "must be text")
    if not task.strip():
        raise InvalidTask("task_description", "is empty; say in it what the person wants done")
    if len(task) > MAX_TASK_CHARACTERS:
        raise InvalidTask(
            "task_description", f"has {len(task):,} characters; at most {MAX_TASK_CHARACTERS:,} are taken"
        )
    _check_characters("task_description", task)
    return task


def _check_metadata(metadata: object) -> str | Mapping[str, Any]:
    if not isinstance(metadata, (str, dict)):
        raise InvalidTask("metadata", "must be text or an object")
    try:
        encoded = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise InvalidTask("metadata", "holds a value that JSON cannot carry (such as NaN)") from error
    # json.dumps has escaped NUL, so the characters are looked for in the values themselves.
    for text in _texts(metadata):
        _check_characters("metadata", text)
    size = len(encoded.encode())
    if size > MAX_METADATA_BYTES:
        raise InvalidTask("metadata", f"is {size:,} bytes; at most {MAX_METADATA_BYTES:,} (16 KB) are taken")
    return metadata


def _check_characters(field: str, text: str) -> None:
    if "\x00" in text:
        raise InvalidTask(field, "holds a NUL character (U+0000), which cannot be stored; leave it out")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InvalidTask(field, "holds a lone surrogate (U+D800 to U+DFFF), which is not text; leave it out")


def _texts(value: object) -> list[str]:
    """All strings in a JSON value, keys included."""
    found: list[str] = []
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            todo.extend(item.keys())
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return found
