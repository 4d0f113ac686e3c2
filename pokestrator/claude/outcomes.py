"""How a run ended: what the CLI reports, in the words of runs.py. Pure.

The CLI reports an API failure as a "success" with `is_error` set, with a status where the API gave one and with
prose alone where it gave none. What is written here about its prose was seen with CLI 2.1.330.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pokestrator.runs import ErrorKind, RunResult, Usage
from pokestrator.telemetry import one_line

DETAIL_LIMIT = 500

_BY_SUBTYPE = {
    "error_max_turns": ErrorKind.TURN_LIMIT,
    "error_max_budget_usd": ErrorKind.BUDGET_LIMIT,
    "error_max_structured_output_retries": ErrorKind.NO_OUTPUT,
    "error_during_execution": ErrorKind.AGENT_CRASHED,
}
_BY_STATUS = {
    401: ErrorKind.UNAUTHORIZED,
    403: ErrorKind.UNAUTHORIZED,
    429: ErrorKind.RATE_LIMITED,
    529: ErrorKind.OVERLOADED,
}
# The last assistant message's `error`; it says less than the status, so it comes after it.
_BY_MESSAGE_ERROR = {
    "authentication_failed": ErrorKind.UNAUTHORIZED,
    "billing_error": ErrorKind.UNAUTHORIZED,
    "rate_limit": ErrorKind.RATE_LIMITED,
    "overloaded": ErrorKind.OVERLOADED,
}
# Trouble that may be over in a moment, whatever status it came with, if any.
_TRANSIENT = {ErrorKind.RATE_LIMITED, ErrorKind.OVERLOADED, ErrorKind.UNREACHABLE, ErrorKind.STREAM_CUT}
_REQUEST_TIMEOUT = 408
_BY_PROSE = (
    (re.compile(r"timed out|timeout|ETIMEDOUT", re.I), ErrorKind.TIMEOUT),
    (
        re.compile(
            r"ECONNREFUSED|ENOTFOUND|EAI_AGAIN|EHOSTUNREACH|ENETUNREACH|Can't reach|unable to connect"
            r"|FailedToOpenSocket|certificate|SSL",
            re.I,
        ),
        ErrorKind.UNREACHABLE,
    ),
    (
        re.compile(r"ECONNRESET|EPIPE|Connection (dropped|to the API was lost|closed)|JSON Parse|stream|socket", re.I),
        ErrorKind.STREAM_CUT,
    ),
)


@dataclass(frozen=True)
class Ending:
    """The fields of the CLI's last message that decide how the run ended."""

    is_error: bool
    subtype: str
    status: int | None = None  # the API's HTTP status, if a request failed
    stop_reason: str | None = None
    text: str = ""
    structured: Any = None
    errors: tuple[str, ...] = ()
    message_error: str | None = None  # of the last assistant message
    usage: Usage = field(default_factory=Usage)


def result_of(ending: Ending, *, structured_wanted: bool) -> RunResult:
    """The run's result: an answer only if there is one that was asked for."""
    said = "; ".join(ending.errors) or ending.text or ending.subtype
    if ending.stop_reason == "refusal":
        return failure(ErrorKind.REFUSAL, said, ending.usage)
    if ending.is_error:
        kind = _kind_of(ending, said)
        return failure(kind, said, ending.usage, is_transient=_is_transient(ending, kind))
    if structured_wanted:
        if not isinstance(ending.structured, Mapping):
            return failure(ErrorKind.NO_OUTPUT, f"no structured output; said: {ending.text}", ending.usage)
        return RunResult(text=ending.text, structured=ending.structured, usage=ending.usage)
    if not ending.text.strip():
        return failure(ErrorKind.NO_OUTPUT, "the answer is empty", ending.usage)
    return RunResult(text=ending.text, usage=ending.usage)


def failure(kind: ErrorKind, detail: str, usage: Usage | None = None, *, is_transient: bool = False) -> RunResult:
    """A result without an answer; `detail` is cut to one line of DETAIL_LIMIT characters."""
    return RunResult(
        error=kind, detail=one_line(detail, DETAIL_LIMIT), usage=usage or Usage(), is_transient=is_transient
    )


def usage_of(cost_usd: float | None, tokens: Mapping[str, Any] | None, turns: int) -> Usage:
    """What the CLI counted; input tokens are all of them, written to and read from its cache included."""

    def count(name: str) -> int:
        return int((tokens or {}).get(name) or 0)

    return Usage(
        cost_usd=cost_usd or 0.0,
        input_tokens=count("input_tokens") + count("cache_creation_input_tokens") + count("cache_read_input_tokens"),
        output_tokens=count("output_tokens"),
        turns=turns,
    )


def _kind_of(ending: Ending, said: str) -> ErrorKind:
    if ending.subtype in _BY_SUBTYPE:
        return _BY_SUBTYPE[ending.subtype]
    if ending.status is not None:
        return _BY_STATUS.get(ending.status, ErrorKind.API_ERROR)
    if ending.message_error in _BY_MESSAGE_ERROR:
        return _BY_MESSAGE_ERROR[ending.message_error]
    return next((kind for prose, kind in _BY_PROSE if prose.search(said)), ErrorKind.API_ERROR)


def _is_transient(ending: Ending, kind: ErrorKind) -> bool:
    """Whether the API may answer the same run in a moment. A run that took its whole time is not among these."""
    if kind is ErrorKind.API_ERROR:
        if ending.status is None:
            return ending.message_error == "server_error"
        return ending.status == _REQUEST_TIMEOUT or ending.status >= 500
    return kind in _TRANSIENT
