"""Whatever comes to the MCP endpoint is answered, in JSON, and breaks nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import flask
import pytest
import structlog
from flask.testing import FlaskClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pokestrator.web import mcp
from pokestrator.web.guard import Guard
from pokestrator.web.mcp import mcp_blueprint
from tests.integration.mcp_peer import LEGACY, MODERN, FakeService, modern_params
from tests.security.attacks import attack

FEW_SECONDS = settings(
    deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

WORDS = ("", "\ud800", "\x00", "orchestrate", "status", "cancel")
FIELDS = ("task_description", "metadata", "action", "request_id", "idempotency_key", "name", "arguments", "_meta")
METHODS = ("initialize", "ping", "tools/list", "tools/call", "server/discover", "resources/read", "logging/setLevel")
NOTIFICATIONS = ("notifications/initialized", "notifications/cancelled", "notifications/x")

# Much of it is nearly right, so that it comes far.
text = st.text(max_size=20) | st.sampled_from(WORDS)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
names = text | st.sampled_from(FIELDS)
anything = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12
)
metadata = anything | st.fixed_dictionaries({"action": text, "request_id": anything})
arguments = anything | st.fixed_dictionaries({"task_description": anything, "metadata": metadata})
params = (
    anything
    | st.fixed_dictionaries({"name": text, "arguments": arguments})
    | st.fixed_dictionaries({"name": st.just("orchestrate"), "arguments": arguments})
    | st.fixed_dictionaries({"name": text, "arguments": arguments}).map(lambda fields: modern_params(**fields))
)
methods = text | st.sampled_from((*METHODS, *NOTIFICATIONS))
messages = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0") | anything, "method": methods | anything},
    optional={"id": st.integers() | text | anything, "params": params, "result": anything, "error": anything},
)
calls = st.fixed_dictionaries(
    {
        "jsonrpc": st.just("2.0"),
        "id": st.integers() | text,
        "method": st.just("tools/call"),
        "params": st.fixed_dictionaries({"name": st.just("orchestrate"), "arguments": arguments}),
    }
)
as_json = (calls | messages | st.lists(messages, max_size=3) | anything).map(json.dumps).map(str.encode)
spoilt = st.tuples(as_json, st.integers(0, 200), st.binary(max_size=3)).map(
    lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
)
bodies = as_json | spoilt | st.binary(max_size=60)
header_values = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)
headers = st.just({}) | st.fixed_dictionaries(
    {},
    optional={
        "MCP-Protocol-Version": st.sampled_from([LEGACY, MODERN, "2024-11-05"]) | header_values,
        "Mcp-Method": methods.filter(lambda each: each.isprintable() and each.isascii()) | header_values,
        "Mcp-Name": st.just("orchestrate") | header_values,
        "X-Poke-User-Id": header_values,
        "X-Poke-Callback-Url": st.just("https://poke.com/x") | header_values,
        "X-Poke-Callback-Token": header_values,
        "Accept": st.just("application/json") | header_values,
        "Content-Type": st.just("application/json") | header_values,
        "Authorization": header_values,
        "Origin": st.just("http://localhost:1") | header_values,
    },
)


@pytest.fixture(scope="module")
def client() -> FlaskClient:
    app, service = flask.Flask(__name__), FakeService()
    guard = Guard(requests_per_minute=1_000_000)
    app.register_blueprint(mcp_blueprint(service.accept, service.ask, path="/mcp", guard=guard))
    return app.test_client()


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    with structlog.testing.capture_logs() as captured:
        monkeypatch.setattr(mcp, "log", structlog.get_logger())
        yield captured


@attack("anything at all, by the hundred (Hypothesis)", "JSON, or 202 without a body; never a 500, never a traceback")
@FEW_SECONDS
@given(body=bodies, chosen=headers)
def test_whatever_comes_is_answered_in_json(
    client: FlaskClient, events: list[Any], caplog: pytest.LogCaptureFixture, body: bytes, chosen: dict[str, str]
) -> None:
    usual = {"Content-Type": "application/json", "Accept": "application/json", "MCP-Protocol-Version": LEGACY}
    with caplog.at_level(logging.ERROR):
        answer = client.post("/mcp", data=body, headers={**usual, **chosen}, base_url="http://localhost")
    assert answer.status_code < 500
    if answer.status_code == 202:
        assert answer.data == b""
    else:
        answered = json.loads(answer.data)
        assert answered["jsonrpc"] == "2.0"
        assert answered.get("error", {}).get("code") != -32_603
    assert caplog.records == []
    assert [each for each in events if each["log_level"] in ("error", "critical")] == []
