"""Relays questions to Claude's Messages API: takes the run's token out, puts the owner's key in, counts what it costs.

What goes out was read here first, and is written anew from what was read: a question may not have the provider fetch
addresses or run tools that the subagent's version does not list, because those never pass our own way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NoReturn

import urllib3
from urllib3.exceptions import HTTPError

from pokestrator.claude.admission import Admission
from pokestrator.claude.counting import Meter
from pokestrator.claude.relay_http import Conversation, Refused
from pokestrator.claude.upstream import Broken, Connections, Unreachable

MESSAGES, COUNT_TOKENS = "/v1/messages", "/v1/messages/count_tokens"
PATHS = frozenset({MESSAGES, COUNT_TOKENS})
DEEPEST = 100  # levels of a question
MOST_PARTS = 1_000_000  # of a question, at most: each may take a hundred bytes of memory once it is read
PIECE = 65_536  # bytes read at once at most; less is passed on as it comes

# Of one connection, or made anew for the next one; and everything by which somebody is recognized.
_NOT_PASSED = frozenset(
    {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
    | {"host", "content-length", "accept-encoding", "x-api-key", "authorization", "proxy-authorization", "cookie"}
)
_NOT_PASSED_BACK = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "transfer-encoding", "upgrade", "trailer", "set-cookie"}
    | {"content-length", "content-encoding"}
)
# Parts of a question that have the provider connect elsewhere, or run code of its own.
_PROVIDERS_OWN = frozenset({"mcp_servers", "container"})
# Tools with a type that the client runs; all others with a type are the provider's.
_CLIENTS_TOOLS = ("bash_", "text_editor_", "computer_", "memory_", "tool_search_")


class Question:
    """A question that was read and found harmless. Raises Refused."""

    def __init__(self, data: bytes, *, may_search: bool) -> None:
        if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MOST_PARTS:
            raise Refused(413, "request_too_large", "the body has too many parts")
        try:
            value = json.loads(data, parse_constant=no_number)
        except (ValueError, RecursionError) as error:
            raise _invalid("the body is no JSON") from error
        if not isinstance(value, dict):
            raise _invalid("the body is not a JSON object")
        if found := sorted(_PROVIDERS_OWN & value.keys()):
            raise _forbidden(f"{found[0]} is not open to agents")
        self._check_tools(value.get("tools"), may_search=may_search)
        self.characters = sum(_lengths(value))
        self.model = str(value.get("model", ""))
        self.streams = value.get("stream") is True
        most = value.get("max_tokens")
        self.max_tokens = most if isinstance(most, int) and most > 0 else 0
        self.data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()

    def _check_tools(self, tools: object, *, may_search: bool) -> None:
        for tool in tools if isinstance(tools, list) else ():
            kind = tool.get("type", "custom") if isinstance(tool, dict) else "custom"
            kind = kind if isinstance(kind, str) else "custom"
            if kind == "custom" or kind.startswith(_CLIENTS_TOOLS):
                continue
            if not (may_search and kind.startswith("web_search_")):
                raise _forbidden(f"the tool {kind} is not one that this subagent lists")


def relay(conversation: Conversation, path: str, query: str, admission: Admission, connections: Connections) -> None:
    """Pass one question on and its answer back. Raises Refused, OSError, Finished."""
    with admission.asking():
        question = Question(conversation.body(), may_search=admission.may_search)
        if path == COUNT_TOKENS:
            _pass_on(conversation, path, query, question, admission, connections, None)
            return
        # An answer in one piece cannot be cut when it passes the budget, so it must not be able to.
        if not admission.ledger.can_pay(question.model, 0 if question.streams else question.max_tokens):
            admission.is_over_budget = True
            raise Refused(400, "invalid_request_error", "this run's budget is spent", {"x-should-retry": "false"})
        meter = Meter(question.model, question.characters)
        admission.ledger.open(meter)
        counts = True
        try:
            counts = _pass_on(conversation, path, query, question, admission, connections, meter)
        except Refused:
            counts = False  # it never arrived
            raise
        finally:
            admission.ledger.close(meter, counts=counts)


def _pass_on(
    conversation: Conversation,
    path: str,
    query: str,
    question: Question,
    admission: Admission,
    connections: Connections,
    meter: Meter | None,
) -> bool:
    """Whether the API took the question."""
    headers = {**_passed(conversation.headers.items(), _NOT_PASSED), "accept-encoding": "identity"}
    try:
        answer = connections.post(f"{path}?{query}" if query else path, question.data, headers)
    except Unreachable as error:
        admission.is_unreachable = True
        raise Refused(502, "api_error", f"Claude's API can't be reached: {error}") from error
    except Broken as error:
        raise ConnectionError(str(error)) from error  # ends as it did: without an answer
    admission.is_unreachable = False
    try:
        _pass_back(conversation, answer, admission, meter if answer.status == 200 else None)
    finally:
        answer.close()  # where it was read to its end, its connection already waits for the next question
    return answer.status == 200


def _pass_back(
    conversation: Conversation, answer: urllib3.BaseHTTPResponse, admission: Admission, meter: Meter | None
) -> None:
    """The answer, piece by piece as it comes. One that breaks off does so for the client too."""
    headers = _passed(answer.headers.items(), _NOT_PASSED_BACK)
    conversation.begin(answer.status, {**headers, "transfer-encoding": "chunked"})
    is_stream = answer.headers.get("content-type", "").startswith("text/event-stream")
    for piece in _pieces(answer):
        if meter is not None:
            (meter.feed_events if is_stream else meter.feed_whole)(piece)
            if not meter.is_whole and admission.ledger.spent_usd() > admission.ledger.budget_usd:
                admission.is_over_budget = True
                raise ConnectionError("the answer has passed the run's budget")
        conversation.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    conversation.wfile.write(b"0\r\n\r\n")


def _passed(headers: Iterable[tuple[str, str]], left_out: frozenset[str]) -> dict[str, str]:
    """Headers without those `left_out`; of one that comes twice, all that was said. Raises Refused."""
    passed: dict[str, str] = {}
    for name, value in headers:
        if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
            raise _invalid("a header holds a control character")
        lower = name.lower()
        if lower not in left_out:
            passed[lower] = f"{passed[lower]}, {value}" if lower in passed else value
    return passed


def _pieces(answer: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    while True:
        try:
            piece = answer.read1(PIECE)
        except (HTTPError, OSError, ValueError) as error:
            raise ConnectionError(f"the answer broke off: {error}") from error
        if not piece:
            return
        yield piece


def _lengths(value: object, depth: int = 0) -> Iterator[int]:
    """The lengths of all texts but those of files. Raises Refused for what would have the provider fetch an address."""
    if depth > DEEPEST:
        raise _invalid("the body is nested too deep")
    if isinstance(value, str):
        yield len(value)
    elif isinstance(value, list):
        for each in value:
            yield from _lengths(each, depth + 1)
    elif isinstance(value, dict):
        source = value.get("source")
        if isinstance(source, Mapping) and source.get("type") == "url":
            raise _forbidden("content by address is not open to agents")
        for name, each in value.items():
            if name != "data":
                yield from _lengths(each, depth + 1)


def no_number(word: str) -> NoReturn:
    """Refuses NaN and Infinity, which Python's JSON reads. Raises ValueError."""
    raise ValueError(f"{word} is no number of JSON")


def _invalid(sentence: str) -> Refused:
    return Refused(400, "invalid_request_error", sentence)


def _forbidden(sentence: str) -> Refused:
    return Refused(403, "permission_error", sentence)
