"""What comes in: an `orchestrate` call, checked, as a new job or as a question about one."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pokestrator.errors import InvalidTask
from pokestrator.jobs import CallbackTarget, Channel, Idempotency, NewJob, Verdict

MAX_TASK_CHARACTERS = 20_000
MAX_METADATA_BYTES = 16 * 1024
MAX_METADATA_LEVELS = 100  # Python's JSON gives up near 1,000; what is taken must survive being written and read again
MAX_KEY_CHARACTERS = 200
MAX_NOTE_CHARACTERS = 1_000

OWN_KEY_SECONDS = 86_400.0  # how long a caller's own idempotency key names its job
SAME_TASK_SECONDS = 120.0  # how long the same words are taken for a repetition


class Action(StrEnum):
    """What a call may ask of an earlier job (`metadata.action`)."""

    STATUS = "status"
    CANCEL = "cancel"
    FEEDBACK = "feedback"


@dataclass(frozen=True)
class TaskLimits:
    """How many tasks are accepted from one caller; those who do not say who they are count as one."""

    per_minute: int
    per_day: int
    unfinished: int  # under way at once


@dataclass(frozen=True)
class Question:
    """A call about an earlier job; without `request_id`, about the caller's latest, by a verdict the latest to end."""

    action: Action
    request_id: uuid.UUID | None
    caller: str | None
    verdict: Verdict | None = None  # of feedback, and only of that
    note: str = ""  # why, in the person's words


def read_metadata(metadata: object) -> object:
    """Metadata as it counts: text that holds a JSON object is that object."""
    if isinstance(metadata, str) and metadata.lstrip().startswith("{"):
        try:
            value = json.loads(metadata)
        except (ValueError, RecursionError):
            return metadata
        return value if isinstance(value, dict) else metadata
    return metadata


def question(metadata: object, *, caller: str | None = None) -> Question | None:
    """The question that a call's metadata asks, or None for a task. Raises InvalidTask."""
    fields = read_metadata(metadata)
    if not isinstance(fields, dict) or "action" not in fields:
        return None
    try:
        action = Action(fields["action"])
    except ValueError:
        raise InvalidTask(
            "metadata.action",
            "may be `status`, `cancel` or `feedback`, about a task that was sent before; leave it out of a new task, "
            "or rename it",
        ) from None
    request_id = _request_id(fields.get("request_id"), caller)
    if action is not Action.FEEDBACK:
        return Question(action, request_id, caller)
    return Question(action, request_id, caller, _verdict(fields.get("verdict")), check_note(fields.get("note")))


def check_note(note: object, field: str = "metadata.note") -> str:
    """What a person says of a result, beside good or bad; "" where it is left out. Raises InvalidTask."""
    if note is None:
        return ""
    if not isinstance(note, str):
        raise InvalidTask(field, "must be text, or left out")
    if len(note) > MAX_NOTE_CHARACTERS:
        raise InvalidTask(field, f"has {len(note):,} characters; at most {MAX_NOTE_CHARACTERS:,} are taken")
    _check_characters(field, note)
    return note.strip()


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
    checked = _check_metadata(read_metadata(metadata))
    return NewJob(
        id=uuid.uuid4(),
        task=task,
        metadata=checked,
        caller=caller,
        channel=channel or (Channel.CALLBACK if callback else Channel.API_MESSAGE),
        callback=callback,
        idempotency=_idempotency(task, checked, caller),
    )


def _idempotency(task: str, metadata: str | Mapping[str, Any], caller: str | None) -> Idempotency | None:
    """A caller's own key, or (only where we know who calls) the task's words."""
    own = metadata.get("idempotency_key") if isinstance(metadata, Mapping) else None
    if own is not None:
        if not isinstance(own, str) or not own.strip() or len(own) > MAX_KEY_CHARACTERS:
            raise InvalidTask(
                "metadata.idempotency_key", f"must be text of 1 to {MAX_KEY_CHARACTERS} characters, or left out"
            )
        return Idempotency(_digest("key", caller, own), OWN_KEY_SECONDS, while_unfinished=False)
    if caller is not None:
        return Idempotency(_digest("task", caller, task, metadata), SAME_TASK_SECONDS, while_unfinished=True)
    return None


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _request_id(value: object, caller: str | None) -> uuid.UUID | None:
    if value is None and caller is not None:
        return None
    try:
        if isinstance(value, str):
            return uuid.UUID(value)
    except ValueError:
        pass
    problem = "must be the request_id that a task was accepted with"
    raise InvalidTask("metadata.request_id", problem + ("; leave it out for the latest task" if caller else ""))


def _verdict(value: object) -> Verdict:
    for verdict in Verdict:
        if value == verdict:
            return verdict
    raise InvalidTask("metadata.verdict", "must be `good` or `bad`: what the person says of the result")


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
    """All strings in a JSON value, keys included. Raises InvalidTask when it is nested too deeply."""
    found: list[str] = []
    level = [value]
    for _ in range(MAX_METADATA_LEVELS):
        found.extend(item for item in level if isinstance(item, str))
        level = [child for item in level for child in _children(item)]
        if not level:
            return found
    raise InvalidTask("metadata", f"is nested more than {MAX_METADATA_LEVELS} levels deep")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []
