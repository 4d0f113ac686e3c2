"""One run: what is asked of Claude, what comes back, and how a run can end.

A run is one attempt of a job, or one question to the drafter. These values cross the border between the
service's process and an agent slot's process, so they are plain and picklable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class ErrorKind(StrEnum):
    """Why a run or a job did not succeed. A CHECK in PostgreSQL lists the same words."""

    UNAUTHORIZED = "unauthorized"  # the API refused our key (401, 403)
    RATE_LIMITED = "rate_limited"  # 429
    OVERLOADED = "overloaded"  # 529
    API_ERROR = "api_error"  # any other refusal or fault of the API (400, 404, 5xx)
    UNREACHABLE = "unreachable"  # no connection to the API (refused, DNS)
    STREAM_CUT = "stream_cut"  # the API's answer broke off or made no sense
    TIMEOUT = "timeout"  # our deadline passed
    AGENT_CRASHED = "agent_crashed"  # the CLI or its slot died
    NO_OUTPUT = "no_output"  # the agent ended without saying anything
    TURN_LIMIT = "turn_limit"
    BUDGET_LIMIT = "budget_limit"
    BUDGET_SPENT = "budget_spent"  # the day's, or the caller's: it was not begun
    REFUSAL = "refusal"  # the model declined the task
    NEEDS_CREDENTIALS = "needs_credentials"  # its subagent names some that are not stored, or cannot be decrypted
    INVALID_DRAFT = "invalid_draft"  # the drafter's answer breaks the rules for subagents
    INTERRUPTED = "interrupted"  # the run's owner died too often
    NOT_STORED = "not_stored"  # the database was away, and the task needed it
    INTERNAL = "internal"  # a fault of ours


@dataclass(frozen=True)
class Usage:
    """What a run cost. `cost_usd` is what the relay counted, or the CLI's own estimate where it counted nothing."""

    cost_usd: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    turns: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.cost_usd + other.cost_usd,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.turns + other.turns,
        )


@dataclass(frozen=True)
class RunRequest:
    """One question to Claude. `timeout_seconds` is counted from the call to `Claude.run` to its return.

    `variables` are secrets: they are in this run's environment and nowhere else.
    """

    prompt: str
    system_prompt: str
    model: str
    timeout_seconds: float
    tools: tuple[str, ...] = ()
    max_turns: int = 30
    max_budget_usd: float = 1.0
    output_schema: Mapping[str, Any] | None = None  # JSON Schema; the answer is then in RunResult.structured
    run_id: str = ""  # what Claude.cancel names it by
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    hosts: tuple[str, ...] = ()  # that it may reach: names, `*.` in front for all below, `*` for any public one


@dataclass(frozen=True)
class RunEvent:
    """Something that happened during a run, short enough for a timeline."""

    kind: str  # "tool" | "text" | "retry" | "connection" | "refused"
    text: str  # at most 200 characters


@dataclass(frozen=True)
class RunResult:
    """How a run ended: `error is None` means it succeeded and `text` (or `structured`) holds the answer."""

    text: str = ""
    structured: Mapping[str, Any] | None = None
    error: ErrorKind | None = None
    detail: str = ""  # for the log and the job's record, never for the person
    usage: Usage = field(default_factory=Usage)
    is_transient: bool = False  # trouble of the API that may be over in a moment: the same run may succeed then


# What the person is told: one sentence that they can act on.
_SENTENCES = {
    ErrorKind.UNAUTHORIZED: "I couldn't do this: Claude refused this service's key; its owner has to check it.",
    ErrorKind.RATE_LIMITED: "I couldn't do this: Claude's rate limit is reached; please send it again in some minutes.",
    ErrorKind.OVERLOADED: "I couldn't do this: Claude is overloaded right now; please send it again in a few minutes.",
    ErrorKind.API_ERROR: "I couldn't do this: Claude answered with an error; please send it again later.",
    ErrorKind.UNREACHABLE: "I couldn't do this: Claude can't be reached right now; please send it again later.",
    ErrorKind.STREAM_CUT: "I couldn't do this: Claude's answer broke off halfway; please send it again.",
    ErrorKind.TIMEOUT: "I ran out of time ({seconds} seconds) on this; try a smaller task, or split it into parts.",
    ErrorKind.AGENT_CRASHED: "I couldn't finish this: the agent working on it crashed; please send it again.",
    ErrorKind.NO_OUTPUT: "I worked on this but came back with nothing; try saying it another way.",
    ErrorKind.TURN_LIMIT: "I couldn't finish this within the allowed number of steps; try a smaller task.",
    ErrorKind.BUDGET_LIMIT: "I couldn't finish this within its budget; try a smaller task.",
    ErrorKind.BUDGET_SPENT: (
        "I couldn't start this: today's budget for Claude is spent; please send it again tomorrow, which begins at "
        "midnight UTC."
    ),
    ErrorKind.REFUSAL: "Claude declined to do this task; if that seems wrong, try saying it another way.",
    ErrorKind.NEEDS_CREDENTIALS: (
        "I can't do this without {missing}: this service's owner adds it (never by text) with "
        "`python -m pokestrator credentials set {name}`, then please send it again."
    ),
    ErrorKind.INVALID_DRAFT: "I couldn't build what this needs; try describing the task in other words.",
    ErrorKind.INTERRUPTED: "This task was interrupted three times and was given up; please send it again.",
    ErrorKind.NOT_STORED: "My memory is away and I have nothing at hand for this; please send it again later.",
    ErrorKind.INTERNAL: "Something went wrong on my side and this was not done; please send it again.",
}


def sentence(kind: ErrorKind, timeout_seconds: float = 0, missing: Sequence[str] = ()) -> str:
    """What the person is told about an error; a timeout names its seconds, and missing credentials their names."""
    return _SENTENCES[kind].format(
        seconds=round(timeout_seconds),
        missing=" and ".join(missing) or "a credential",
        name=missing[0] if len(missing) == 1 else "NAME",
    )
