"""A question to the Messages API and its answer, each in one piece: what is sent, what is read, what is wrong with it.

The answer comes as the input of a tool, as the CLI has it. The tool is offered and not forced: since Sonnet 5.5,
Opus 5.5 and Fable 5.1 the API refuses `tool_choice` with a tool's name (400), and `output_config.format` takes only
some of JSON Schema, and only newer models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import urllib3
from urllib3.exceptions import HTTPError

from pokestrator.claude.models import effort_of
from pokestrator.claude.outcomes import Ending, failure, result_of
from pokestrator.claude.relay_messages import no_number
from pokestrator.runs import ErrorKind, RunRequest, RunResult
from pokestrator.telemetry import one_line

ANSWER_TOOL = "StructuredOutput"  # as the CLI calls it
HEADERS = {
    "content-type": "application/json",
    "accept": "application/json",
    "accept-encoding": "identity",
    "anthropic-version": "2023-06-01",  # the one that CLI 2.1.330 asks for
    "user-agent": "pokestrator",
}
_LONGEST = 4 * 2**20  # bytes of an answer
_BEGINNING_OF_ERROR = 2_000  # characters of a refusal that are read

Message = dict[str, Any]


class Failed(Exception):
    """There is no answer, and why. `wait`: seconds that the API wants us to stay away, at least."""

    def __init__(self, result: RunResult, wait: float = 0.0) -> None:
        self.result = result
        self.wait = wait
        super().__init__(result.detail)


@dataclass(frozen=True)
class Answer:
    """A message of the API's."""

    content: list[Message]
    stop_reason: str

    @property
    def text(self) -> str:
        return "\n".join(str(block.get("text", "")) for block in self._blocks("text"))

    @property
    def calls(self) -> list[Message]:
        """Of the tool; the first one counts."""
        return self._blocks("tool_use")

    @property
    def value(self) -> object:
        """What was given as the answer, whatever it is; None without a call."""
        return self.calls[0].get("input") if self.calls else None

    def _blocks(self, kind: str) -> list[Message]:
        return [block for block in self.content if block.get("type") == kind]


def body_of(request: RunRequest, model: str, most_tokens: int, messages: Sequence[Message]) -> dict[str, Any]:
    """What is sent for a request with an output schema."""
    tool = {
        "name": ANSWER_TOOL,
        "description": "Takes your answer. Always answer by calling this tool, exactly once, and by nothing else.",
        "input_schema": request.output_schema,
    }
    effort = effort_of(model)
    return {
        "model": model,
        "max_tokens": most_tokens,
        "system": request.system_prompt,
        "messages": messages,
        "tools": [tool],
        **({"output_config": {"effort": effort}} if effort else {}),
    }


def fault_of(answer: Answer, schema: Mapping[str, Any]) -> str:
    """What keeps an answer from being one that was asked for; empty when nothing does."""
    from jsonschema import Draft202012Validator  # 25 ms, for those who ask

    if not answer.calls:
        return f"no structured output; said: {answer.text}"
    for error in Draft202012Validator(schema).iter_errors(answer.value):
        return f"Output does not match the schema: {error.json_path}: {one_line(error.message)}"
    return "" if isinstance(answer.value, Mapping) else "the answer is no object"


def asked_again(answer: Answer, fault: str) -> Iterator[Message]:
    """The messages that follow an answer with a fault: itself, and what is to be mended."""
    if answer.content:
        yield {"role": "assistant", "content": answer.content}  # whole: the API checks its thoughts
    if not answer.calls:
        yield {"role": "user", "content": f"Call {ANSWER_TOOL} with your answer."}
        return
    ids = [call.get("id") for call in answer.calls]
    mend = [{"type": "tool_result", "tool_use_id": each, "is_error": True, "content": fault} for each in ids]
    yield {"role": "user", "content": mend}


def read_whole(answer: urllib3.BaseHTTPResponse) -> bytes:
    """The API's answer to its end. Raises Failed for a refusal, and for what breaks off."""
    try:
        data = b"".join(_pieces(answer))
    except (HTTPError, OSError, ValueError) as error:
        raise broken(f"the answer broke off: {error}") from error
    finally:
        answer.close()
    if answer.status != 200:
        said = f"API Error: {answer.status} {data.decode(errors='replace')[:_BEGINNING_OF_ERROR]}"
        result = result_of(Ending(True, "success", status=answer.status, text=said), structured_wanted=True)
        raise Failed(result, _seconds(answer.headers.get("retry-after", "")))
    return data


def message_in(data: bytes) -> Answer:
    """Raises Failed for what is no message."""
    try:
        value = json.loads(data, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise broken(f"JSON Parse error: {error}") from error
    content = value.get("content") if isinstance(value, Mapping) else None
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise broken("the answer is no message")
    return Answer(content, str(value.get("stop_reason")))


def broken(detail: str) -> Failed:
    """What came made no sense, or ended too early."""
    return Failed(failure(ErrorKind.STREAM_CUT, detail, is_transient=True))


def _pieces(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    """Raises HTTPError, OSError, ValueError."""
    length = 0
    while piece := answer.read1(65_536):
        length += len(piece)
        if length > _LONGEST:
            raise ValueError("it is too long")
        yield piece


def _seconds(header: str) -> float:
    """What `retry-after` asks for; 0 for a date, or anything else."""
    return float(header) if header.isascii() and header.isdigit() else 0.0
