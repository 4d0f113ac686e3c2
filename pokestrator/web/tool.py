"""The one MCP tool: what its callers read about it, how a call becomes a job or a question, what the call answers.

Clients cache the schemas for as long as they are connected, so these are frozen: a later version may add optional
fields to them, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import mcp_types as types
from werkzeug.datastructures import Headers

from pokestrator.addresses import may_be_called_back
from pokestrator.errors import InvalidTask, TooManyTasks
from pokestrator.intake import (
    MAX_KEY_CHARACTERS,
    MAX_METADATA_BYTES,
    MAX_NOTE_CHARACTERS,
    MAX_TASK_CHARACTERS,
    Action,
    Question,
    new_job,
    question,
)
from pokestrator.jobs import (
    Acknowledgement,
    CallbackState,
    CallbackTarget,
    JobState,
    JobStatus,
    NewJob,
    Verdict,
    callback_content,
)
from pokestrator.telemetry import one_line

MAX_CALLER_CHARACTERS = 200
MAX_STEP_CHARACTERS = 80

CALLER_HEADER = "X-Poke-User-Id"
CALLBACK_URL_HEADER = "X-Poke-Callback-Url"
CALLBACK_TOKEN_HEADER = "X-Poke-Callback-Token"

# Poke's agent decides from this text when to call us.
INSTRUCTIONS = """\
Pokestrator does tasks that Poke cannot do itself, and sends the result as a message when it is ready.

Call `orchestrate` once for each such task. Pass on the person's whole request in their own words, with what is needed \
from the conversation to understand it: names, dates, places, links.

The call answers at once, and only that the task was accepted: tell the person that it is under way. The result comes \
later as a message of its own. Do not wait for it, do not poll for it, and do not call again for the same task, unless \
such a message asks for the task to be sent again.

Only when the person asks how a task is going, or wants it stopped, call `orchestrate` with metadata \
{"action": "status"} or {"action": "cancel"}, with the task's "request_id" in it where you have it; without, their \
latest task is meant. Such a call starts nothing: its answer says how the task stands.

When the person says that a result was good or bad, pass that on in the same way, with metadata {"action": "feedback", \
"verdict": "good"} or "bad", and as "note" why, in their words; without a "request_id", of the task that ended last.

Never put passwords, keys or other secrets into a call."""

_INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "task_description": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_TASK_CHARACTERS,
            "description": "The person's whole request in their own words, with what is needed from the conversation "
            "to understand it. No passwords, keys or other secrets. Ignored, whatever it says, where metadata has an "
            "action.",
        },
        "metadata": {
            "anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}],
            "default": "",
            "description": "Optional: more about the task, such as the person's time zone or language, as text or as "
            f"an object; at most {MAX_METADATA_BYTES // 1024} KB. No secrets. In an object, `idempotency_key` (text of "
            f"your own, at most {MAX_KEY_CHARACTERS} characters) makes a repeated call safe: for a day, the same key "
            'stands for the same task. {"action": "status"} asks how an earlier task is going and {"action": "cancel"} '
            'stops it: name it by its "request_id", or leave that out for the person\'s latest task. {"action": '
            '"feedback", "verdict": "good" or "bad", "note": why} says what the person thinks of a result; without a '
            f'"request_id", of the latest. A note has at most {MAX_NOTE_CHARACTERS:,} characters.',
        },
    },
    "required": ["task_description"],
    "additionalProperties": False,
}

# Open on purpose: clients refuse an answer that does not fit the schema they cached, and a later version may answer
# with other statuses, other fields, or without a request_id.
_OUTPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "status": {
            "type": "string",
            "description": "`accepted`: the task is under way. To a question about an earlier task: `queued`, "
            "`running`, `cancelling`, `succeeded`, `failed` or `cancelled`. Other values may be added.",
        },
        "request_id": {"type": "string", "description": "Names the task in our records."},
        "message": {"type": "string", "description": "What to tell the person now."},
        "durable": {
            "type": "boolean",
            "description": "false: the task runs, but a restart of the service would lose it. Absent: it is stored.",
        },
        "duplicate": {
            "type": "boolean",
            "description": "true: this call repeated an earlier one, and request_id names that one's task.",
        },
        "result": {"type": "string", "description": "Of a task that has ended: what the person is told about it."},
        "delivery": {
            "type": "string",
            "description": "Of the message with the result: `pending`, `delivered`, or `dead` (it could not be "
            "delivered). Absent: there is none.",
        },
        "verdict": {
            "type": "string",
            "description": "What the person said of the result: `good` or `bad`. Absent: nothing yet.",
        },
    },
    "required": ["status"],
    "additionalProperties": True,
}

TOOL = types.Tool(
    name="orchestrate",
    title="Hand over a task",
    description="Hand over a task that you cannot do yourself. Answers at once that the task was accepted; the result "
    "comes later as a message of its own. Call once for each task, and do not poll. With metadata "
    '{"action": "status"} or {"action": "cancel"} it tells how an earlier task is going, or stops it: only when the '
    'person asks. With {"action": "feedback"} it takes what the person thinks of a result.',
    input_schema=_INPUT_SCHEMA,
    output_schema=_OUTPUT_SCHEMA,
    annotations=types.ToolAnnotations(
        read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True
    ),
)


_ENDINGS = {
    JobState.SUCCEEDED: ("It is done", "the message with the result"),
    JobState.FAILED: ("It failed", "the message that says why"),
    JobState.CANCELLED: ("It was cancelled", "the message that says so"),
}

_DELIVERIES = {
    CallbackState.PENDING: "waits to be delivered",
    CallbackState.DELIVERED: "was delivered",
    CallbackState.DEAD: "could not be delivered",
}

_NOTED = {
    Verdict.GOOD: "It is noted that the result was good; tasks like it go the same way.",
    Verdict.BAD: "It is noted that the result was bad, and not taken as a model for tasks like it.",
}

_UNITS = {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}
_MOST = {"second": 60, "minute": 60, "hour": 48}  # from here on the next unit is easier to read


def read_call(arguments: Mapping[str, Any], headers: Headers, callback_hosts: Collection[str]) -> NewJob | Question:
    """What one call asks for, checked: a new job, or a question about an earlier one, to which neither the task nor the
    callback's headers matter. Raises InvalidTask naming the argument or the header, and what is wrong with it."""
    known = _INPUT_SCHEMA["properties"]
    for name in arguments:
        if name not in known:
            raise InvalidTask(quoted(name), f"is not an argument of {TOOL.name}; its arguments are {', '.join(known)}")
    metadata = arguments.get("metadata")
    caller = _caller(headers)
    asked = question(metadata, caller=caller)
    if asked is not None:
        return asked
    if "task_description" not in arguments:
        raise InvalidTask("task_description", "is missing; say in it what the person wants done")
    return new_job(
        arguments["task_description"],
        "" if metadata is None else metadata,
        caller=caller,
        callback=_callback(headers, callback_hosts),
    )


def accepted(ack: Acknowledgement) -> types.CallToolResult:
    """The answer to a task."""
    answer: dict[str, Any] = {"status": "accepted", "request_id": str(ack.request_id), "message": ack.message}
    if not ack.durable:
        answer["durable"] = False
    if ack.duplicate:
        answer["duplicate"] = True
    return _result(answer)


def answered(action: Action, status: JobStatus) -> types.CallToolResult:
    """The answer to a question: how the job stands after `action`."""
    answer = {
        "status": "cancelling" if _is_being_cancelled(status) else status.state.value,
        "request_id": str(status.request_id),
        "message": describe(action, status),
    }
    if status.state in _ENDINGS and status.result is not None:
        answer["result"] = callback_content(status.result)
    if status.delivery is not None:
        answer["delivery"] = status.delivery.value
    if status.verdict is not None:
        answer["verdict"] = status.verdict.value
    return _result(answer)


def describe(action: Action, status: JobStatus) -> str:
    """How a job stands after `action`, in one sentence for the person."""
    if action is Action.FEEDBACK and status.verdict is not None:
        return _NOTED[status.verdict]
    if status.state in _ENDINGS:
        return _ending(action, status)
    if _is_being_cancelled(status):
        return "It is being cancelled; a message will say so when it has stopped."
    if status.waits_seconds > 0:
        return f"Claude was busy; it is tried again in {in_words(status.waits_seconds)}."
    sent = f"It was sent {in_words(status.age_seconds)} ago"
    if status.state is JobState.QUEUED:
        return f"{sent} and waits for its turn."
    step = _last_step(status)
    return f"{sent} and is running; last step: {step}" if step else f"{sent} and is running."


def in_words(seconds: float) -> str:
    """A length of time, rounded for people: "40 seconds", "3 minutes"; never less than a second."""
    counts = {unit: max(1, round(seconds / length)) for unit, length in _UNITS.items()}
    unit = next((unit for unit, most in _MOST.items() if counts[unit] < most), "day")
    return f"{counts[unit]} {unit}" if counts[unit] == 1 else f"{counts[unit]} {unit}s"


def _ending(action: Action, status: JobStatus) -> str:
    what, message = _ENDINGS[status.state]
    if action is Action.CANCEL and status.state is not JobState.CANCELLED:
        what = f"It had already ended: {what[0].lower()}{what[1:]}"
    return f"{what}; {message} {_DELIVERIES[status.delivery]}." if status.delivery else f"{what}."


def _is_being_cancelled(status: JobStatus) -> bool:
    return status.cancel_requested and status.state not in _ENDINGS


def _last_step(status: JobStatus) -> str | None:
    """The last line of the timeline, cut short; None where it says only which machine has the job."""
    if status.latest is None or status.latest.kind == "claimed":
        return None
    kind, text = status.latest.kind, status.latest.text
    return one_line(text if kind == "tool" else f"{kind}: {text}", MAX_STEP_CHARACTERS)


def _result(answer: dict[str, Any]) -> types.CallToolResult:
    """`answer` as data, and the same as JSON text for clients that read only text."""
    return types.CallToolResult(content=[types.TextContent(text=json.dumps(answer))], structured_content=answer)


def refused(reason: str) -> types.CallToolResult:
    """A tool error: the calling model reads `reason` and can mend the call, or try again later."""
    return types.CallToolResult(content=[types.TextContent(text=reason)], is_error=True)


def too_many(error: TooManyTasks) -> str:
    """Which limit is used up, and when to try again; for the calling model and the person."""
    if error.wait_seconds is None:
        return (
            f"Not accepted: {error.most} of this person's tasks are under way, and no more may be at once. Try again "
            "when one of them has ended."
        )
    return (
        f"Not accepted: at most {error.most} tasks a {error.limit} are taken from one person. Try again in "
        f"{in_words(error.wait_seconds)}."
    )


def quoted(text: str) -> str:
    """A caller's own words, cut short and with everything but printable ASCII escaped, fit for an answer or a log."""
    return ascii(one_line(text, 60))


def _caller(headers: Headers) -> str | None:
    caller = headers.get(CALLER_HEADER, "").strip()
    if len(caller) > MAX_CALLER_CHARACTERS or not caller.isprintable():
        raise InvalidTask(CALLER_HEADER, f"must be at most {MAX_CALLER_CHARACTERS} printable characters")
    return caller or None


def _callback(headers: Headers, hosts: Collection[str]) -> CallbackTarget | None:
    url, token = headers.get(CALLBACK_URL_HEADER, "").strip(), headers.get(CALLBACK_TOKEN_HEADER, "").strip()
    if not (url and token):
        return None
    if not (_is_plain(url) and may_be_called_back(url, hosts)):
        allowed = ", ".join(hosts) or "none"
        raise InvalidTask(
            CALLBACK_URL_HEADER,
            f"must be an https:// address at a host that is allowed here ({allowed}); its owner lists them in "
            "POKESTRATOR_CALLBACK_HOSTS",
        )
    if not _is_plain(token):
        raise InvalidTask(CALLBACK_TOKEN_HEADER, "must be printable ASCII without spaces")
    return CallbackTarget(url, token)


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable() and " " not in value
