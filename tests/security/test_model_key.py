"""The owner's key for Claude: no agent has it, nor can it use the relay for what its subagent does not list."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from pokestrator.claude import processes
from pokestrator.claude.pool import Inline, Slots
from pokestrator.claude.relay import Relay
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind, RunEvent, RunResult
from tests.integration.agent_runs import KEY, agent_environment, agents, bash, ignore, scripted, slot_of
from tests.integration.relaying import Run, admitted, question, relaying
from tests.security.attacks import attack


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesApi]:
    with MessagesApi(KEY) as api:
        yield api


@pytest.fixture(scope="module")
def slots(api: MessagesApi) -> Iterator[Slots]:
    slots = Slots(1, agent_environment(api.url))
    slots.start()
    try:
        yield slots
    finally:
        slots.close()


@pytest.fixture(scope="module")
def relay(api: MessagesApi) -> Iterator[Relay]:
    with relaying(api.url) as relay:
        yield relay


@pytest.fixture
def run(relay: Relay) -> Iterator[Run]:
    with admitted(relay) as run:
        yield run


def told(api: MessagesApi) -> str:
    """All that the model was told in the last question."""
    return str(api.requests[-1].body)


@attack("an agent prints all variables that it, its shell and its CLI have", "a token of this run, not the key")
def test_an_agent_does_not_see_the_owners_key(slots: Slots, api: MessagesApi) -> None:
    show = "env; set; export -p; tr '\\0' '\\n' < /proc/$PPID/environ"
    assert slots.run(scripted(bash(show), {"text": "Done."}), ignore).text == "Done."
    assert KEY not in told(api)
    assert "ANTHROPIC_API_KEY=" in told(api)


@attack("the key in the environment or on the command line of a process, or in a file, of a run", "it is not there")
def test_no_process_and_no_file_of_a_run_has_the_key(slots: Slots) -> None:
    processes_seen: list[bytes] = []
    files_seen: list[bytes] = []

    def look(_: object) -> None:
        for agent in agents():
            slot = slot_of(agent)
            for pid in (slot, *(process.pid for process in processes.descendants(slot))):
                processes_seen.extend(_read(Path(f"/proc/{pid}/{name}")) for name in ("environ", "cmdline"))
            folder = Path(f"/proc/{agent}/cwd").resolve().parent
            files_seen.extend(_read(path) for path in folder.rglob("*") if path.is_file())

    slots.run(scripted(bash("sleep 0.5"), {"text": "Done."}), look)
    assert any(b"ANTHROPIC_API_KEY=" in seen for seen in processes_seen), "nothing was looked at"
    assert files_seen
    assert not any(KEY.encode() in seen for seen in (*processes_seen, *files_seen))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# the relay -----------------------------------------------------------------------------------------------------------


@attack("a question to the relay without a token, with a wrong one, with its beginning, in other bytes", "401")
@pytest.mark.parametrize("key", [None, "", "x", KEY, "prefix", "ü" * 40])
def test_a_stranger_is_not_let_in(run: Run, api: MessagesApi, key: str | None) -> None:
    asked = len(api.requests)
    key = run.token[:-1] if key == "prefix" else key
    for header, value in (("x-api-key", key), ("authorization", f"Bearer {key}")):
        headers: Any = {} if key is None else {header: value.encode()}
        assert run.ask({"text": "Done."}, headers=headers).status_code == 401
    assert len(api.requests) == asked


@attack("a finished run's token", "401")
def test_a_token_is_good_for_its_run_only(relay: Relay) -> None:
    with admitted(relay) as run:
        assert run.ask({"text": "Done."}).ok
    assert run.ask({"text": "Done."}).status_code == 401


@attack("other paths of Claude's API: files, batches, models, keys; other methods", "404; nothing is asked")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/files"),
        ("POST", "/v1/messages/batches"),
        ("POST", "/v1/messages/../files"),
        ("POST", "/v1/messages%2f..%2ffiles"),
        ("POST", "/v1/organizations/api_keys"),
        ("GET", "/v1/messages"),
        ("GET", "/v1/models"),
        ("GET", "/"),
        ("HEAD", "/"),
        ("DELETE", "/v1/messages"),
        ("OPTIONS", "/v1/messages"),
        ("BREW", "/v1/messages"),
    ],
)
def test_the_relay_has_the_messages_paths_only(run: Run, api: MessagesApi, method: str, path: str) -> None:
    asked = len(api.requests)
    request = requests.Request(method, run.url, headers={"x-api-key": run.token}, data=b"{}").prepare()
    request.url = run.url + path
    with requests.Session() as session:
        assert session.send(request, timeout=10).status_code == 404
    assert len(api.requests) == asked


ELSEWHERE: list[dict[str, Any]] = [
    {"mcp_servers": [{"type": "url", "url": "https://evil.example/mcp", "name": "evil"}]},
    {"container": {"skills": []}},
    {"tools": [{"type": "web_fetch_20250910", "name": "web_fetch"}]},
    {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tools": [{"type": "mcp_toolset", "mcp_server_name": "evil"}]},
    {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "https://evil"}}]}]},
    {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]}
                ],
            }
        ]
    },
]


@attack("through the relay: have Claude's servers fetch an address, run code, or talk to an MCP server", "403")
@pytest.mark.parametrize("changes", ELSEWHERE, ids=lambda changes: str(next(iter(changes))))
def test_the_provider_does_nothing_that_the_subagent_does_not_list(
    run: Run, api: MessagesApi, changes: dict[str, Any]
) -> None:
    asked = len(api.requests)
    assert run.ask({"text": "Done."}, **changes).status_code == 403
    assert len(api.requests) == asked


@attack("a field twice, so that the relay reads one and Claude's API the other", "what was read is what is sent")
def test_what_was_read_is_what_is_sent(run: Run, api: MessagesApi) -> None:
    asked = json.dumps(question({"text": "Done."}))[1:-1]
    body = f'{{"tools": [{{"type": "web_fetch_20250910", "name": "evil"}}], {asked}, "tools": []}}'
    headers = {"x-api-key": run.token}
    assert requests.post(f"{run.url}/v1/messages", data=body.encode(), headers=headers, timeout=10).ok
    assert api.requests[-1].body["tools"] == []
    assert int(api.requests[-1].headers["content-length"]) < len(body) - 40


@attack("a question to fill the service's memory with: 17 MB, or millions of empty lists", "413")
@pytest.mark.parametrize(
    "body", [b'"' + b"x" * 17_000_000 + b'"', b"[" + b"[]," * 2_000_000 + b"[]]"], ids=["long", "parts"]
)
def test_a_question_may_not_fill_the_memory(run: Run, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", run.port), 20) as connection:
        head = f"POST /v1/messages HTTP/1.1\r\nx-api-key: {run.token}\r\ncontent-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode())
        with suppress(ConnectionError):  # it may have answered before all of it was sent
            connection.sendall(body)
        assert connection.recv(20).startswith(b"HTTP/1.1 413 ")


def test_a_subagent_that_lists_web_search_has_it(relay: Relay) -> None:
    search = {"type": "web_search_20250305", "name": "web_search"}
    with admitted(relay, tools=("WebSearch",)) as run:
        assert run.ask({"text": "Done."}, tools=[search]).ok


@attack("an answer that is never read holds a thread of the service", "it ends with the run")
def test_nothing_of_a_run_is_left_in_the_relay(api: MessagesApi) -> None:
    with relaying(api.url) as relay:
        with admitted(relay) as run:
            answer = run.ask({"hang": 60, "after_start": True}, stream=True)
            began = time.monotonic()
        assert time.monotonic() - began < 1
        answer.close()


# questions without an agent, which the service itself puts -----------------------------------------------------------


def put(url: str, *steps: dict[str, Any]) -> tuple[RunResult, list[RunEvent]]:
    """How a question without an agent ends, and its timeline."""
    events: list[RunEvent] = []
    request = scripted(*steps, tools=(), output_schema={"type": "object"}, timeout_seconds=20.0)
    return Inline(agent_environment(url)).run(request, events.append), events


ECHOES: list[list[dict[str, Any]]] = [
    [{"status": 401, "type": "authentication_error", "message": f"invalid x-api-key: {KEY}"}],
    [{"status": 529, "message": f"not for {KEY}", "times": 1}, {"structured": {}}],
    [{"text": f"Your key is {KEY}."}],
]


@attack("Claude's API, or what stands before it, repeats the key in an error or in an answer", "`[secret]`, everywhere")
@pytest.mark.parametrize("steps", ECHOES, ids=["error", "retry", "answer"])
def test_a_key_that_is_said_back_is_kept_nowhere(
    api: MessagesApi, steps: list[dict[str, Any]], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    result, events = put(api.url, *steps)
    assert api.requests[-1].headers["x-api-key"] == KEY
    logged = caplog.text + "".join(capfd.readouterr())
    assert KEY not in f"{result} {events} {logged}"
    assert "[secret]" in f"{result} {events}"


@attack("Claude's API sends a question, with its key, elsewhere (307)", "not followed")
def test_a_redirect_does_not_get_the_key(api: MessagesApi) -> None:
    with MessagesApi() as elsewhere:
        location = {"location": f"{elsewhere.url}/v1/messages"}
        result, _ = put(api.url, {"status": 307, "headers": location})
        assert (result.error, elsewhere.requests) == (ErrorKind.API_ERROR, [])
