"""The MCP endpoint over real HTTP: statuses, codes, the acknowledgement, and everything it turns away."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import jsonschema
import pytest
import structlog

from pokestrator.errors import TryAgainLater
from pokestrator.jobs import CallbackTarget, Channel
from pokestrator.web import answers, mcp, tool
from pokestrator.web.guard import Guard
from tests.integration.mcp_peer import (
    JSON_HEADERS,
    LEGACY,
    MODERN,
    Answer,
    FakeService,
    HeaderList,
    ask,
    call,
    modern_headers,
    modern_params,
    our_server,
    rpc,
    version_header,
)

KEY = "schlüssel-für-mcp"
TASK = {"task_description": "Write a limerick about zebra stripes"}
CALLBACK_URL = ("X-Poke-Callback-Url", "https://poke.example/callback/1")
CALLBACK_TOKEN = ("X-Poke-Callback-Token", "token-1")


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with our_server(service) as address:
        yield address


@pytest.fixture
def keyed_url(service: FakeService) -> Iterator[str]:
    with our_server(service, api_key=KEY) as address:
        yield address


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the endpoint logs, however earlier tests have configured the logs."""
    with structlog.testing.capture_logs() as captured:
        for module in (mcp, answers):
            monkeypatch.setattr(module, "log", structlog.get_logger())
        yield captured


def orchestrate(url: str, arguments: object, *headers: tuple[str, str | bytes]) -> Any:
    answer = ask(url, call(arguments), (*version_header(), *headers))
    assert answer.status == 200, answer.body
    return answer.json["result"]


# The acknowledgement


def test_ack_comes_as_data_and_as_the_same_json_text(url: str, service: FakeService) -> None:
    result = orchestrate(url, TASK)
    ack = result["structuredContent"]
    assert set(ack) == {"status", "request_id", "message"}
    assert ack["status"] == "accepted"
    assert UUID(ack["request_id"]) == service.jobs[0].id
    assert [block["type"] for block in result["content"]] == ["text"]
    assert json.loads(result["content"][0]["text"]) == ack
    assert result.get("isError", False) is False
    jsonschema.validate(ack, tool.TOOL.output_schema)


def test_ack_says_when_a_task_is_not_durable(url: str, service: FakeService) -> None:
    service.durable = False
    ack = orchestrate(url, TASK)["structuredContent"]
    assert ack["durable"] is False
    jsonschema.validate(ack, tool.TOOL.output_schema)


def test_output_schema_admits_statuses_and_fields_of_later_versions() -> None:
    jsonschema.validate({"status": "cancelled", "progress": {"percent": 40}}, tool.TOOL.output_schema)


def test_task_metadata_and_poke_headers_reach_the_job(url: str, service: FakeService) -> None:
    arguments = {**TASK, "metadata": {"zone": "Europe/Madrid"}}
    orchestrate(url, arguments, ("X-Poke-User-Id", "user-1"), CALLBACK_URL, CALLBACK_TOKEN)
    [job] = service.jobs
    assert job.task == TASK["task_description"]
    assert job.metadata == {"zone": "Europe/Madrid"}
    assert job.caller == "user-1"
    assert job.callback == CallbackTarget("https://poke.example/callback/1", "token-1")
    assert job.channel is Channel.CALLBACK


@pytest.mark.parametrize("headers", [(), (CALLBACK_URL,), (CALLBACK_TOKEN,)])
def test_without_a_whole_callback_the_answer_goes_by_the_message_api(
    url: str, service: FakeService, headers: HeaderList
) -> None:
    orchestrate(url, TASK, *headers)
    [job] = service.jobs
    assert (job.caller, job.callback, job.channel) == (None, None, Channel.API_MESSAGE)


@pytest.mark.parametrize("arguments", [TASK, {**TASK, "metadata": None}, {**TASK, "metadata": ""}])
def test_absent_and_null_metadata_are_empty(url: str, service: FakeService, arguments: object) -> None:
    orchestrate(url, arguments)
    assert service.jobs[0].metadata == ""


def test_largest_task_and_metadata_fit_in_their_longest_spelling(url: str, service: FakeService) -> None:
    orchestrate(url, {"task_description": "😀" * 20_000, "metadata": "😀" * 4_000})  # json.dumps escapes both
    assert len(service.jobs[0].task) == 20_000


def test_after_ack_is_called_for_a_durable_job(url: str, service: FakeService) -> None:
    orchestrate(url, TASK)
    assert service.after_ack_ran.wait(10)
    assert service.after_ack_ids == [service.jobs[0].id]


def test_the_answer_does_not_wait_for_after_ack(url: str, service: FakeService) -> None:
    service.after_ack_may_run.clear()
    assert orchestrate(url, TASK)["structuredContent"]["status"] == "accepted"
    assert service.after_ack_ids == []
    service.after_ack_may_run.set()
    assert service.after_ack_ran.wait(10)


def test_after_ack_is_called_neither_for_jobs_in_memory_nor_for_refusals(url: str, service: FakeService) -> None:
    service.durable = False
    orchestrate(url, TASK)
    service.durable, service.error = True, TryAgainLater("Busy; try again in a minute.")
    orchestrate(url, TASK)
    service.error = None
    durable = orchestrate(url, TASK)["structuredContent"]["request_id"]
    assert service.after_ack_ran.wait(10)
    assert [str(request_id) for request_id in service.after_ack_ids] == [durable]


# Calls that the model can mend


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, ["task_description", "missing"]),
        ({"metadata": "x"}, ["task_description", "missing"]),
        ({"task_description": ""}, ["task_description", "empty"]),
        ({"task_description": " \n\t"}, ["task_description", "empty"]),
        ({"task_description": 7}, ["task_description", "text"]),
        ({"task_description": None}, ["task_description", "text"]),
        ({"task_description": "x" * 20_001}, ["task_description", "20,001", "20,000"]),
        ({"task_description": "a\x00b"}, ["task_description", "NUL"]),
        ({"task_description": "a\ud800b"}, ["task_description", "surrogate"]),
        ({**TASK, "metadata": 7}, ["metadata", "text or an object"]),
        ({**TASK, "metadata": ["x"]}, ["metadata", "text or an object"]),
        ({**TASK, "metadata": "x" * 16_384}, ["metadata", "16,384"]),
        ({**TASK, "metadata": {"k": ["\ud800"]}}, ["metadata", "surrogate"]),
        ({**TASK, "metadata": {"\x00": 1}}, ["metadata", "NUL"]),
        ({**TASK, "priority": 1}, ["priority", "not an argument"]),
        ({**TASK, "\ud800": 1}, ["not an argument"]),
        ({**TASK, "x" * 5_000: 1}, ["not an argument"]),
    ],
)
def test_bad_arguments_are_tool_errors_that_name_field_and_limit(
    url: str, service: FakeService, arguments: object, words: list[str]
) -> None:
    result = orchestrate(url, arguments)
    assert result["isError"] is True
    [block] = result["content"]
    assert all(word in block["text"] for word in words), block["text"]
    assert len(block["text"]) < 300
    assert service.jobs == []


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([("X-Poke-User-Id", "x" * 201)], "X-Poke-User-Id"),
        ([("X-Poke-User-Id", b"caf\xc3\x89\x07")], "X-Poke-User-Id"),
        ([("X-Poke-Callback-Url", "http://poke.example/callback"), CALLBACK_TOKEN], "X-Poke-Callback-Url"),
        ([("X-Poke-Callback-Url", "file:///etc/passwd"), CALLBACK_TOKEN], "X-Poke-Callback-Url"),
        ([("X-Poke-Callback-Url", "https://["), CALLBACK_TOKEN], "X-Poke-Callback-Url"),
        ([("X-Poke-Callback-Url", b"https://p\xc3\xb6ke.example/"), CALLBACK_TOKEN], "X-Poke-Callback-Url"),
        ([CALLBACK_URL, ("X-Poke-Callback-Token", b"t\xffken")], "X-Poke-Callback-Token"),
    ],
)
def test_bad_poke_headers_are_tool_errors_that_name_the_header(
    url: str, service: FakeService, headers: list[tuple[str, str | bytes]], name: str
) -> None:
    result = orchestrate(url, TASK, *headers)
    assert result["isError"] is True
    assert result["content"][0]["text"].startswith(f"{name}: must be")
    assert service.jobs == []


def test_callback_to_this_machine_may_be_plain_http(url: str, service: FakeService) -> None:
    orchestrate(url, TASK, ("X-Poke-Callback-Url", "http://127.0.0.1:9/cb"), CALLBACK_TOKEN)
    assert service.jobs[0].callback == CallbackTarget("http://127.0.0.1:9/cb", "token-1")


def test_try_again_later_is_a_tool_error_with_its_own_words(url: str, service: FakeService) -> None:
    service.error = TryAgainLater("All places are taken; try again in a minute.")
    result = orchestrate(url, TASK)
    assert result["isError"] is True
    assert result["content"][0]["text"] == "All places are taken; try again in a minute."


def test_unexpected_errors_tell_the_caller_nothing_and_the_log_everything(
    url: str, service: FakeService, events: list[Any]
) -> None:
    service.error = RuntimeError("password=hunter2")
    answer = ask(url, call(TASK), version_header())
    assert answer.status == 200
    assert answer.json["error"] == {"code": -32603, "message": "Internal server error"}
    [event] = [e for e in events if e["event"] == "mcp_request_failed"]
    assert event["log_level"] == "error"
    assert event["exc_info"]


# Protocol versions


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
def test_initialize_agrees_on_each_handshake_version(url: str, version: str) -> None:
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    result = ask(url, rpc("initialize", params)).json["result"]
    assert result["protocolVersion"] == version
    assert result["serverInfo"]["name"] == "pokestrator"
    assert "orchestrate" in result["instructions"]
    assert list(result["capabilities"]) == ["tools"]


def test_initialize_offers_the_latest_handshake_version_for_an_unknown_one(url: str) -> None:
    params = {"protocolVersion": "1999-01-01", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    assert ask(url, rpc("initialize", params)).json["result"]["protocolVersion"] == "2025-11-25"


def test_exactly_one_tool_matches(url: str) -> None:
    [listed] = ask(url, rpc("tools/list"), version_header()).json["result"]["tools"]
    assert listed["name"] == "orchestrate"
    assert listed["inputSchema"]["required"] == ["task_description"]
    assert set(listed["inputSchema"]["properties"]) == {"task_description", "metadata"}
    assert listed["outputSchema"]["additionalProperties"] is True
    assert listed["annotations"]["openWorldHint"] is True


def test_modern_call_is_acknowledged_with_result_type_and_server_info(url: str, service: FakeService) -> None:
    params = modern_params(name="orchestrate", arguments=TASK)
    answer = ask(url, rpc("tools/call", params), modern_headers("tools/call", "orchestrate"))
    assert answer.status == 200
    result = answer.json["result"]
    assert result["resultType"] == "complete"
    assert result["_meta"]["io.modelcontextprotocol/serverInfo"]["name"] == "pokestrator"
    assert result["structuredContent"]["request_id"] == str(service.jobs[0].id)


def test_discover_names_the_modern_version(url: str) -> None:
    answer = ask(url, rpc("server/discover", modern_params()), modern_headers("server/discover"))
    assert answer.json["result"]["supportedVersions"] == [MODERN]
    assert answer.json["result"]["instructions"] == tool.INSTRUCTIONS


def test_path_may_end_in_a_slash(url: str) -> None:
    assert ask(url + "/", rpc("ping"), version_header()).json["result"] == {}


@pytest.mark.parametrize(
    "body",
    [
        '{"jsonrpc":"2.0","method":"notifications/initialized"}',
        '{"jsonrpc":"2.0","method":"notifications/unheard_of","params":{"x":1}}',
    ],
)
@pytest.mark.parametrize("version", [LEGACY, MODERN])
def test_notifications_are_202_without_a_body(url: str, version: str, body: str) -> None:
    answer = ask(url, body, version_header(version))
    assert (answer.status, answer.body) == (202, b"")


# Refusals

REFUSALS = [
    ("legacy unknown method is 200", rpc("no/such"), version_header(), 200, -32601),
    ("legacy unknown tool is 200", rpc("tools/call", {"name": "x"}), version_header(), 200, -32602),
    ("legacy bad params are 200", rpc("tools/call", {"name": 1}), version_header(), 200, -32602),
    ("legacy arguments that are no object", call("x"), version_header(), 200, -32602),
    ("modern unknown method", rpc("no/such", modern_params()), modern_headers("no/such"), 404, -32601),
    ("modern initialize", rpc("initialize", modern_params()), modern_headers("initialize"), 404, -32601),
    ("modern unknown tool", rpc("tools/call", modern_params(name="x")), modern_headers("tools/call", "x"), 400, -32602),
    ("modern without _meta", rpc("tools/list"), modern_headers("tools/list"), 400, -32602),
    ("modern method header differs", rpc("tools/list", modern_params()), modern_headers("ping"), 400, -32020),
    ("modern method header missing", rpc("tools/list", modern_params()), version_header(MODERN), 400, -32020),
    (
        "modern name header differs",
        rpc("tools/call", modern_params(name="orchestrate", arguments=TASK)),
        modern_headers("tools/call", "other"),
        400,
        -32020,
    ),
    (
        "unknown version",
        rpc("tools/list", modern_params("2030-01-01")),
        modern_headers("tools/list", version="2030-01-01"),
        400,
        -32022,
    ),
    ("Accept without JSON", rpc("ping"), [("Content-Type", "application/json"), ("Accept", "text/html")], 406, -32600),
    ("no Accept", rpc("ping"), [("Content-Type", "application/json")], 406, -32600),
    ("form body", rpc("ping"), [("Content-Type", "text/plain"), ("Accept", "*/*")], 415, -32600),
    ("no Content-Type", rpc("ping"), [("Accept", "*/*")], 415, -32600),
    ("empty body", "", JSON_HEADERS, 400, -32700),
    ("half a body", '{"jsonrpc":', JSON_HEADERS, 400, -32700),
    ("bytes that are not UTF-8", b'{"jsonrpc":"2.0","id":1,"method":"\xff"}', JSON_HEADERS, 400, -32700),
    ("a surrogate in UTF-8", b'{"jsonrpc":"2.0","id":1,"method":"\xed\xa0\x80"}', JSON_HEADERS, 400, -32700),
    ("UTF-16", rpc("ping").encode("utf-16"), JSON_HEADERS, 400, -32700),
    ("NaN", '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}', JSON_HEADERS, 400, -32700),
    ("Infinity", '{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":-Infinity}}', JSON_HEADERS, 400, -32700),
    ("id 1e999", '{"jsonrpc":"2.0","id":1e999,"method":"ping"}', JSON_HEADERS, 400, -32700),
    ("id of 5,000 digits", '{"jsonrpc":"2.0","id":' + "9" * 5_000 + ',"method":"ping"}', JSON_HEADERS, 400, -32700),
    ("a depth bomb", "[" * 100_000, JSON_HEADERS, 400, -32700),
    ("a closed depth bomb", "[" * 100_000 + "]" * 100_000, JSON_HEADERS, 400, -32700),
    ("objects 101 deep", '{"a":' * 101 + "1" + "}" * 101, JSON_HEADERS, 400, -32700),
    ("batch", f"[{rpc('ping')}]", JSON_HEADERS, 400, -32600),
    ("modern batch", f"[{rpc('ping')}]", version_header(MODERN), 400, -32600),
    ("text", '"ping"', JSON_HEADERS, 400, -32600),
    ("null", "null", JSON_HEADERS, 400, -32600),
    ("null id", rpc("ping", id=None), JSON_HEADERS, 400, -32600),
    ("fractional id", rpc("ping", id=1.5), JSON_HEADERS, 400, -32600),
    ("boolean id", rpc("ping", id=True), JSON_HEADERS, 400, -32600),
    ("object id", rpc("ping", id={}), JSON_HEADERS, 400, -32600),
    ("params that are a list", rpc("ping", [1]), JSON_HEADERS, 400, -32600),
    ("no jsonrpc", '{"id":1,"method":"ping"}', JSON_HEADERS, 400, -32600),
    ("method that is a number", rpc(7), JSON_HEADERS, 400, -32600),  # type: ignore[arg-type]
    ("response in the modern era", '{"jsonrpc":"2.0","id":1,"result":{}}', version_header(MODERN), 400, -32600),
    ("too large", " " * (512 * 1024 + 1), JSON_HEADERS, 413, -32600),
    ("foreign Host", rpc("ping"), [*JSON_HEADERS, ("Host", "evil.example")], 421, -32600),
    ("Host that is no address", rpc("ping"), [*JSON_HEADERS, ("Host", "[")], 421, -32600),
    ("foreign Origin", rpc("ping"), [*JSON_HEADERS, ("Origin", "http://evil.example")], 403, -32600),
    ("null Origin", rpc("ping"), [*JSON_HEADERS, ("Origin", "null")], 403, -32600),
]


@pytest.mark.parametrize(("body", "headers", "status", "code"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_refusals_have_their_status_and_code_and_every_4xx_is_logged(
    url: str,
    service: FakeService,
    events: list[Any],
    body: str | bytes,
    headers: HeaderList,
    status: int,
    code: int,
) -> None:
    answer = ask(url, body, headers)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert service.jobs == []
    [event] = [e for e in events if e["event"] == "mcp_rejected"]
    assert event["status"] == status
    assert event["reason"]
    assert (event["log_level"] == "warning") is (status >= 400)


def test_unsupported_version_says_which_are_supported(url: str) -> None:
    answer = ask(
        url, rpc("tools/list", modern_params("2030-01-01")), modern_headers("tools/list", version="2030-01-01")
    )
    assert answer.json["error"]["data"] == {"supported": [MODERN], "requested": "2030-01-01"}


@pytest.mark.parametrize("method", ["GET", "DELETE", "PUT", "OPTIONS"])
def test_only_post_is_answered(url: str, method: str) -> None:
    answer = ask(url, b"", [("Accept", "text/event-stream")], method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "POST")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (rpc("\ud800"), 200),
        (rpc("a\x00b"), 200),
        (rpc("ping", {"\ud800": 1, "\x00": "\ud800"}), 200),
        (rpc("ping", id="\ud800\x00"), 200),
        (rpc("ping", id=10**4_000), 200),
        (rpc("tools/call", {"name": "\ud800"}), 200),
        (rpc("tools/call", {"name": "orchestrate", "arguments": {"\ud800": "\ud800"}}), 200),
        (rpc("initialize", {"protocolVersion": "\ud800", "capabilities": {}, "clientInfo": {"name": "\ud800"}}), 200),
        ('{"jsonrpc":"2.0","\\ud800":1,"method":"\\ud800"}', 202),
        ('{"jsonrpc":"\\ud800","id":1,"method":"ping"}', 400),
    ],
)
def test_strange_characters_anywhere_never_make_a_500(url: str, service: FakeService, body: str, status: int) -> None:
    answer = ask(url, body, version_header())
    assert answer.status == status
    assert b'"code":-32603' not in answer.body
    assert service.jobs == []


def test_metadata_a_hundred_deep_in_all_is_accepted(url: str, service: FakeService) -> None:
    depth = 96  # the envelope, params, arguments and metadata itself are four more
    metadata = json.loads('{"a":' * depth + "1" + "}" * depth)
    assert "structuredContent" in orchestrate(url, {**TASK, "metadata": metadata})
    assert service.jobs[0].metadata == metadata


def test_largest_body_is_read_and_one_byte_more_is_413(url: str) -> None:
    ping = rpc("ping")
    padded = ping + " " * (mcp.MAX_BODY_BYTES - len(ping))
    assert ask(url, padded, version_header()).status == 200
    assert ask(url, padded + " ", version_header()).status == 413


# Keys


def authorized(url: str, *values: str | bytes) -> Answer:
    return ask(url, rpc("ping"), (*version_header(), *(("Authorization", value) for value in values)))


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_right_key_opens_and_foreign_hosts_are_welcome_then(keyed_url: str, scheme: str) -> None:
    key = ("Authorization", f"{scheme} {KEY}".encode())
    answer = ask(keyed_url, rpc("ping"), (*version_header(), key, ("Host", "agent.example")))
    assert answer.status == 200


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer wrong",
        b"Bearer schl\xfcssel-f\xfcr-mcp",
        b"Bearer \xff\xfe\x80",
        f"Basic {KEY}".encode(),
        KEY.encode(),
    ],
)
def test_missing_and_wrong_keys_are_401_whatever_their_bytes(
    keyed_url: str, service: FakeService, events: list[Any], value: bytes | None
) -> None:
    answer = authorized(keyed_url, *([] if value is None else [value]))
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert answer.json["error"] == "unauthorized"
    [event] = [e for e in events if e["event"] == "mcp_rejected"]
    assert (event["log_level"], event["status"]) == ("warning", 401)
    assert "schl" not in str(event)


def test_nothing_is_accepted_without_the_key(keyed_url: str, service: FakeService) -> None:
    assert ask(keyed_url, call(TASK), version_header()).status == 401
    assert service.jobs == []


def test_a_blank_key_is_refused_when_the_guard_is_made() -> None:
    with pytest.raises(ValueError, match="blank"):
        Guard(" ")


def test_tool_texts_warn_of_secrets_and_of_calling_twice() -> None:
    assert "secrets" in tool.INSTRUCTIONS
    assert "do not call again" in tool.INSTRUCTIONS
