"""Our endpoint and the SDK's own server answer the same requests in the same way, but for the differences named here.

`mcp` promises nothing for the parts of it that we build on; this test tells when a new version of it behaves otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from tests.integration.mcp_peer import (
    JSON_HEADERS,
    MODERN,
    REQUEST_ID,
    Answer,
    FakeService,
    HeaderList,
    ask,
    call,
    modern_headers,
    modern_params,
    our_server,
    rpc,
    sdk_server,
    version_header,
)

TASK = {"task_description": "Write a limerick about zebra stripes"}
ABOUT_A_TASK = {"action": "status", "request_id": str(REQUEST_ID)}


class Difference(Enum):
    """Where we differ on purpose: (status, body) as (the SDK's, ours), and why.

    A body is "none", "text", "result" or the JSON-RPC error's code; `None` means that the statuses, or the bodies'
    kinds and codes, agree. Error messages are free to differ only where a difference is named.
    """

    PARSE_TEXT = (None, None), "the SDK's parse error of this era quotes its parser; ours says no more than that"
    STRICT_JSON = ((200, 400), ("result", -32700)), "NaN is not JSON; the SDK's parser takes it"
    DEPTH = ((200, 400), ("result", -32700)), "what nests past 100 levels is refused before anyone recurses into it"
    SURROGATES = ((400, 200), (-32700, "result")), "a lone surrogate is for the model to mend: a tool error"
    NOT_A_MESSAGE = (None, (-32602, -32600)), "JSON-RPC calls this an invalid request; the SDK says invalid params"
    MALFORMED_ID = ((202, 400), ("none", -32600)), "a request with a malformed id is owed an error, as in the new era"
    MODERN_406 = (None, ("none", -32600)), "we say in the body why"
    INVALID_BODY_TEXT = (None, None), "worded for us: the code and status agree"
    CONTENT_TYPE = ((400, 415), ("text", -32600)), "415 is HTTP's own status for it"
    GUARD_BODY = (None, ("text", -32600)), "we answer in JSON"
    TOO_LARGE = (None, ("text", -32600)), "we answer in JSON, with HTTP's words"
    CRASH = (None, (0, -32603)), "the SDK sends the exception's text, and 0 for a code; ours tells nothing"
    DUPLICATED = (None, None), "WSGI joins repeated headers, so we see a mismatch where the SDK sees a repetition"
    GET_LEGACY = ((406, 405), (-32600, -32600)), "we have no stream to offer, so only POST is allowed"
    DELETE_LEGACY = ((405, 405), (-32600, -32600)), "there are no sessions to end in either; the words differ"
    GET_MODERN = (None, ("none", -32600)), "we say in the body what to use"


@dataclass(frozen=True)
class Row:
    name: str
    body: str | bytes
    headers: HeaderList
    difference: Difference | None = None
    method: str = "POST"


def handshake(version: object) -> str:
    return rpc(
        "initialize", {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    )


def modern(method: str, id: object = 1, **params: object) -> tuple[str, HeaderList]:
    name = params.get("name")
    return rpc(method, modern_params(**params), id), modern_headers(method, name if isinstance(name, str) else None)


INITIALIZED = '{"jsonrpc":"2.0","method":"notifications/initialized"}'
PING = rpc("ping")
DEEP = '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":' + "[" * 110 + "]" * 110 + "}}"
ACCEPT_NOTHING_USEFUL: HeaderList = (("Content-Type", "application/json"), ("Accept", "text/html"))

HANDSHAKE_ERA = [
    *[
        Row(f"initialize {v}", handshake(v), JSON_HEADERS)
        for v in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
    ],
    Row("initialize with an unknown version", handshake("1999-01-01"), JSON_HEADERS),
    Row("initialize with the modern version", handshake(MODERN), JSON_HEADERS),
    Row("initialize with a version header", handshake("2025-06-18"), version_header()),
    Row("initialize without params", rpc("initialize"), JSON_HEADERS),
    Row("initialize with a number for a version", handshake(7), JSON_HEADERS),
    Row("ping", PING, version_header()),
    Row("ping without a version header", PING, JSON_HEADERS),
    Row("ping with a text id", rpc("ping", id="a-1"), version_header()),
    Row("ping with id 0", rpc("ping", id=0), version_header()),
    Row("ping with a negative id", rpc("ping", id=-5), version_header()),
    Row("ping with an empty id", rpc("ping", id=""), version_header()),
    *[
        Row(f"tools/list at {v}", rpc("tools/list"), version_header(v))
        for v in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
    ],
    Row("tools/list without a version header", rpc("tools/list"), JSON_HEADERS),
    Row("tools/list with a cursor", rpc("tools/list", {"cursor": "x"}), version_header()),
    *[
        Row(f"tools/call at {v}", call(TASK), version_header(v))
        for v in ("2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25")
    ],
    Row("tools/call with metadata", call({**TASK, "metadata": {"a": [1, None, 0.5]}}), version_header()),
    Row(
        "tools/call with a progress token",
        rpc("tools/call", {"name": "orchestrate", "arguments": TASK, "_meta": {"progressToken": 1}}),
        version_header(),
    ),
    Row("tools/call with a missing argument", call({}), version_header()),
    Row("tools/call with an unknown argument", call({**TASK, "x": 1}), version_header()),
    Row("tools/call with a wrong type", call({"task_description": 7}), version_header()),
    Row("tools/call without arguments", rpc("tools/call", {"name": "orchestrate"}), version_header()),
    Row("tools/call with arguments null", call(None), version_header()),
    Row("tools/call with arguments that are no object", call("x"), version_header()),
    Row("tools/call of an unknown tool", rpc("tools/call", {"name": "x", "arguments": {}}), version_header()),
    Row("tools/call without a name", rpc("tools/call", {"arguments": {}}), version_header()),
    Row("question", call({**TASK, "metadata": ABOUT_A_TASK}), version_header()),
    Row("question in text", call({"metadata": json.dumps(ABOUT_A_TASK)}), version_header()),
    Row("question without a caller or a request_id", call({"metadata": {"action": "cancel"}}), version_header()),
    Row("tools/call with a NUL", call({"task_description": "a\x00b"}), version_header()),
    Row(
        "tools/call with a lone surrogate",
        call({"task_description": "\ud800"}),
        version_header(),
        Difference.SURROGATES,
    ),
    Row("tools/call that crashes", call({"task_description": "crash"}), version_header(), Difference.CRASH),
    Row("unknown method", rpc("no/such"), version_header()),
    Row("method of the modern era", rpc("server/discover"), version_header()),
    Row("method that we do not serve", rpc("resources/list"), version_header()),
    Row("method that we do not serve, badly called", rpc("resources/read"), version_header()),
    Row("notification", INITIALIZED, version_header()),
    Row("unknown notification", '{"jsonrpc":"2.0","method":"notifications/x"}', version_header()),
    Row("response", '{"jsonrpc":"2.0","id":1,"result":{}}', version_header()),
    Row("bad JSON", '{"jsonrpc":', JSON_HEADERS, Difference.PARSE_TEXT),
    Row("bytes that are not UTF-8", b'{"a":"\xff"}', JSON_HEADERS, Difference.PARSE_TEXT),
    Row("NaN", '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}', JSON_HEADERS, Difference.STRICT_JSON),
    Row("nesting", DEEP, JSON_HEADERS, Difference.DEPTH),
    Row("batch", f"[{PING}]", JSON_HEADERS, Difference.NOT_A_MESSAGE),
    Row("null", "null", JSON_HEADERS, Difference.NOT_A_MESSAGE),
    Row("no jsonrpc", '{"id":1,"method":"ping"}', JSON_HEADERS, Difference.NOT_A_MESSAGE),
    Row("params that are a list", rpc("ping", [1]), JSON_HEADERS, Difference.NOT_A_MESSAGE),
    Row("null id", rpc("ping", id=None), JSON_HEADERS, Difference.MALFORMED_ID),
    Row("fractional id", rpc("ping", id=1.5), JSON_HEADERS, Difference.MALFORMED_ID),
    Row("Accept without JSON", PING, ACCEPT_NOTHING_USEFUL),
    Row("Accept of JSON alone", PING, [("Content-Type", "application/json"), ("Accept", "application/json")]),
    Row("Accept of anything", PING, [("Content-Type", "application/json"), ("Accept", "*/*")]),
    Row("no Accept", PING, [("Content-Type", "application/json")]),
    Row("wrong content type", PING, [("Content-Type", "text/plain"), ("Accept", "*/*")], Difference.CONTENT_TYPE),
    Row("content type with a charset", PING, [("Content-Type", "application/json; charset=utf-8"), ("Accept", "*/*")]),
    Row("foreign Host", PING, [*JSON_HEADERS, ("Host", "evil.example")], Difference.GUARD_BODY),
    Row("foreign Origin", PING, [*JSON_HEADERS, ("Origin", "http://evil.example")], Difference.GUARD_BODY),
    Row("local Origin", PING, [*JSON_HEADERS, ("Origin", "http://localhost:3000")]),
    Row("too large", " " * (512 * 1024 + 1), JSON_HEADERS, Difference.TOO_LARGE),
    Row("GET", "", [("Accept", "application/json")], Difference.GET_LEGACY, "GET"),
    Row("DELETE", "", JSON_HEADERS, Difference.DELETE_LEGACY, "DELETE"),
]

MODERN_ERA = [
    Row("discover", *modern("server/discover")),
    Row("modern tools/list", *modern("tools/list")),
    Row("modern tools/call", *modern("tools/call", name="orchestrate", arguments=TASK)),
    Row("modern call with a text id", *modern("tools/call", "a-1", name="orchestrate", arguments=TASK)),
    Row("modern question", *modern("tools/call", name="orchestrate", arguments={**TASK, "metadata": ABOUT_A_TASK})),
    Row("modern call with a missing argument", *modern("tools/call", name="orchestrate", arguments={})),
    Row(
        "modern call with a lone surrogate",
        *modern("tools/call", name="orchestrate", arguments={"task_description": "\ud800"}),
    ),
    Row("modern call that crashes", *modern("tools/call", name="orchestrate", arguments={"task_description": "crash"})),
    Row("modern call of an unknown tool", *modern("tools/call", name="x", arguments={})),
    Row("modern call without a name", *modern("tools/call", arguments={})),
    Row("modern unknown method", *modern("no/such")),
    Row("modern ping", *modern("ping")),
    Row("modern initialize", *modern("initialize")),
    Row("modern method that we do not serve", *modern("resources/list")),
    Row(
        "unknown modern version",
        rpc("tools/list", modern_params("2030-01-01")),
        modern_headers("tools/list", version="2030-01-01"),
    ),
    Row("version header that is no version", PING, version_header("x")),
    Row(
        "version header differs from the body",
        rpc("tools/list", modern_params("2030-01-01")),
        modern_headers("tools/list"),
    ),
    Row("method header differs", rpc("tools/list", modern_params()), modern_headers("ping")),
    Row("method header missing", rpc("tools/list", modern_params()), version_header(MODERN)),
    Row(
        "name header differs",
        rpc("tools/call", modern_params(name="orchestrate", arguments=TASK)),
        modern_headers("tools/call", "x"),
    ),
    Row(
        "name header missing",
        rpc("tools/call", modern_params(name="orchestrate", arguments=TASK)),
        modern_headers("tools/call"),
    ),
    Row(
        "name header in base64",
        rpc("tools/call", modern_params(name="orchestrate", arguments=TASK)),
        modern_headers("tools/call", "=?base64?b3JjaGVzdHJhdGU=?="),
    ),
    Row(
        "method header twice",
        rpc("tools/list", modern_params()),
        (*modern_headers("tools/list"), ("Mcp-Method", "tools/list")),
        Difference.DUPLICATED,
    ),
    Row("no params", rpc("tools/list"), modern_headers("tools/list")),
    Row("no _meta", rpc("tools/list", {}), modern_headers("tools/list")),
    Row(
        "_meta without capabilities",
        rpc("tools/list", {"_meta": {"io.modelcontextprotocol/protocolVersion": MODERN}}),
        modern_headers("tools/list"),
    ),
    Row(
        "_meta with capabilities of a wrong type",
        rpc(
            "tools/list",
            {
                "_meta": {
                    "io.modelcontextprotocol/protocolVersion": MODERN,
                    "io.modelcontextprotocol/clientCapabilities": 7,
                }
            },
        ),
        modern_headers("tools/list"),
    ),
    Row("modern notification", INITIALIZED, version_header(MODERN)),
    Row("notification of an unknown version", INITIALIZED, version_header("2030-01-01")),
    Row(
        "modern response", '{"jsonrpc":"2.0","id":1,"result":{}}', version_header(MODERN), Difference.INVALID_BODY_TEXT
    ),
    Row("modern batch", f"[{PING}]", version_header(MODERN), Difference.INVALID_BODY_TEXT),
    Row("modern null id", modern("tools/list", None)[0], modern_headers("tools/list"), Difference.INVALID_BODY_TEXT),
    Row(
        "modern fractional id", modern("tools/list", 1.5)[0], modern_headers("tools/list"), Difference.INVALID_BODY_TEXT
    ),
    Row("modern bad JSON", "{", version_header(MODERN)),
    Row("modern bytes that are not UTF-8", b'{"a":"\xff"}', version_header(MODERN)),
    Row("modern depth bomb", "[" * 100_000, version_header(MODERN)),
    Row(
        "modern Accept without JSON",
        PING,
        (*ACCEPT_NOTHING_USEFUL, ("MCP-Protocol-Version", MODERN)),
        Difference.MODERN_406,
    ),
    Row("modern GET", "", version_header(MODERN), Difference.GET_MODERN, "GET"),
]

ROWS = [*HANDSHAKE_ERA, *MODERN_ERA]


class CrashingService(FakeService):
    def accept(self, job: Any) -> Any:
        if job.task == "crash":
            raise RuntimeError("a fault of ours")
        return super().accept(job)


@pytest.fixture(scope="module")
def ours() -> Iterator[str]:
    with our_server(CrashingService(request_id=REQUEST_ID)) as url:
        yield url


@pytest.fixture(scope="module")
def theirs() -> Iterator[str]:
    with sdk_server(CrashingService(request_id=REQUEST_ID)) as url:
        yield url


def content(answer: Answer) -> object:
    try:
        return json.loads(answer.body)
    except ValueError:
        return answer.body


def kind(answer: Answer) -> str | int:
    """What a body is: "none", "text", "result", or the code of its JSON-RPC error."""
    if not answer.body:
        return "none"
    body = content(answer)
    if not isinstance(body, dict):
        return "text"
    return "result" if "result" in body else int(body["error"]["code"])


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_we_answer_as_the_sdk_does_but_for_named_differences(ours: str, theirs: str, row: Row) -> None:
    mine = ask(ours, row.body, row.headers, row.method)
    sdk = ask(theirs, row.body, row.headers, row.method)
    if row.difference is None:
        assert (mine.status, kind(mine)) == (sdk.status, kind(sdk))
        assert content(mine) == content(sdk)
        return
    (statuses, kinds), reason = row.difference.value
    assert (sdk.status, mine.status) == (statuses or (mine.status, mine.status)), reason
    assert (kind(sdk), kind(mine)) == (kinds or (kind(mine), kind(mine))), reason
    assert (sdk.status, content(sdk)) != (mine.status, content(mine)), f"no difference any more: {reason}"


def test_every_named_difference_is_used() -> None:
    assert {row.difference for row in ROWS} - {None} == set(Difference)
