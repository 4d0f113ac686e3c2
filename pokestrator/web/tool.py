"""The one MCP tool: what its callers read about it, how a call becomes a job, what the call answers.

Clients cache the schemas for as long as they are connected, so these are frozen: a later version may add optional
fields to them, and nothing else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import mcp_types as types
from werkzeug.datastructures import Headers

from pokestrator.errors import InvalidTask
from pokestrator.jobs import MAX_METADATA_BYTES, MAX_TASK_CHARACTERS, Acknowledgement, CallbackTarget, NewJob, new_job
from pokestrator.settings import is_safe_url
from pokestrator.telemetry import one_line

MAX_CALLER_CHARACTERS = 200

CALLER_HEADER = "X-Poke-User-Id"
CALLBACK_URL_HEADER = "X-Poke-Callback-Url"
CALLBACK_TOKEN_HEADER = "X-Poke-Callback-Token"

# Poke's agent decides from this text when to call us.
INSTRUCTIONS = """\
Pokestrator does tasks that Poke cannot do itself, and sends the result as a message when it is ready.

Call `orchestrate` once for each such task. Pass on the person's whole request in their own words, with what is needed \
from the conversation to understand it: names, dates, places, links.

The call answers at once, and only that the task was accepted: tell the person that it is under way. The result comes \
later as a message of its own. Do not wait for it, do not ask for it, and do not call again for the same task, unless \
such a message asks for the task to be sent again.

Never put passwords, keys or other secrets into a call."""

_INPUT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "task_description": {
            "type": "string",
            "minLength": 1,
            "maxLength": MAX_TASK_CHARACTERS,
            "description": "The person's whole request in their own words, with what is needed from the conversation "
            "to understand it. No passwords, keys or other secrets.",
        },
        "metadata": {
            "anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}],
            "default": "",
            "description": "Optional: more about the task, such as the person's time zone or language, as text or as "
            f"an object; at most {MAX_METADATA_BYTES // 1024} KB. No secrets.",
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
        "status": {"type": "string", "description": "`accepted`: the task is under way. Other values may be added."},
        "request_id": {"type": "string", "description": "Names the task in our records."},
        "message": {"type": "string", "description": "What to tell the person now."},
        "durable": {
            "type": "boolean",
            "description": "false: the task runs, but a restart of the service would lose it. Absent: it is stored.",
        },
    },
    "required": ["status"],
    "additionalProperties": True,
}

TOOL = types.Tool(
    name="orchestrate",
    title="Hand over a task",
    description="Hand over a task that you cannot do yourself. Answers at once that the task was accepted; the result "
    "comes later as a message of its own. Call once for each task, and do not poll.",
    input_schema=_INPUT_SCHEMA,
    output_schema=_OUTPUT_SCHEMA,
    annotations=types.ToolAnnotations(
        read_only_hint=False, destructive_hint=False, idempotent_hint=False, open_world_hint=True
    ),
)


def job_from_call(arguments: Mapping[str, Any], headers: Headers) -> NewJob:
    """The checked job of one call. Raises InvalidTask naming the argument or the header, and what is wrong with it."""
    known = _INPUT_SCHEMA["properties"]
    for name in arguments:
        if name not in known:
            raise InvalidTask(quoted(name), f"is not an argument of {TOOL.name}; its arguments are {', '.join(known)}")
    if "task_description" not in arguments:
        raise InvalidTask("task_description", "is missing; say in it what the person wants done")
    metadata = arguments.get("metadata")
    return new_job(
        arguments["task_description"],
        "" if metadata is None else metadata,
        caller=_caller(headers),
        callback=_callback(headers),
    )


def accepted(ack: Acknowledgement) -> types.CallToolResult:
    """The acknowledgement as data, and the same as JSON text for clients that read only text."""
    answer: dict[str, Any] = {"status": "accepted", "request_id": str(ack.request_id), "message": ack.message}
    if not ack.durable:
        answer["durable"] = False
    return types.CallToolResult(content=[types.TextContent(text=json.dumps(answer))], structured_content=answer)


def refused(reason: str) -> types.CallToolResult:
    """A tool error: the calling model reads `reason` and can mend the call, or try again later."""
    return types.CallToolResult(content=[types.TextContent(text=reason)], is_error=True)


def quoted(text: str) -> str:
    """A caller's own words, cut short and with everything but printable ASCII escaped, fit for an answer or a log."""
    return ascii(one_line(text, 60))


def _caller(headers: Headers) -> str | None:
    caller = headers.get(CALLER_HEADER, "").strip()
    if len(caller) > MAX_CALLER_CHARACTERS or not caller.isprintable():
        raise InvalidTask(CALLER_HEADER, f"must be at most {MAX_CALLER_CHARACTERS} printable characters")
    return caller or None


def _callback(headers: Headers) -> CallbackTarget | None:
    url, token = headers.get(CALLBACK_URL_HEADER, "").strip(), headers.get(CALLBACK_TOKEN_HEADER, "").strip()
    if not (url and token):
        return None
    if not (_is_plain(url) and _is_safe_address(url)):
        raise InvalidTask(CALLBACK_URL_HEADER, "must be an https:// address, or http:// on this machine")
    if not _is_plain(token):
        raise InvalidTask(CALLBACK_TOKEN_HEADER, "must be printable ASCII without spaces")
    return CallbackTarget(url, token)


def _is_plain(value: str) -> bool:
    return value.isascii() and value.isprintable() and " " not in value


def _is_safe_address(url: str) -> bool:
    try:
        return is_safe_url(url)
    except ValueError:  # no address at all, such as "https://["
        return False
