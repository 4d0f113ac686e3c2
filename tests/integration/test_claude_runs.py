"""Runs of the real CLI against the scripted Messages API: what comes back, and what an agent can see."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pokestrator.claude.egress import Egress
from pokestrator.claude.pool import Inline, Slots
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind, RunEvent, RunResult, Usage
from tests.integration.agent_runs import agent_environment, agents, bash, ignore, scripted, wait_until

CANARY = "canary-8f3a61"
SECRET = "tide-0123456789"
SCHEMA = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


@pytest.fixture(scope="module")
def slots(api: MessagesApi) -> Iterator[Slots]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POKESTRATOR_TEST_CANARY", CANARY)
        slots = Slots(2, agent_environment(api.url))
        slots.start()
        try:
            yield slots
        finally:
            slots.close()


def tool_output(api: MessagesApi) -> str:
    """What the last tool call printed, as the model was told."""
    contents = [message["content"] for message in api.requests[-1].body["messages"]]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    result = [block for block in blocks if block["type"] == "tool_result"][-1]["content"]
    return result if isinstance(result, str) else "".join(part["text"] for part in result)


def test_an_answer_comes_back_with_what_it_cost(slots: Slots) -> None:
    usage = {"input_tokens": 100, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 3, "output_tokens": 40}
    result = slots.run(scripted({"text": "Good evening.", "usage": usage}), ignore)
    assert result == RunResult(text="Good evening.", usage=Usage(result.usage.cost_usd, 123, 40, 1))
    assert 0 < result.usage.cost_usd < 0.01


def test_events_arrive_while_the_run_goes_on(slots: Slots) -> None:
    events: list[tuple[float, RunEvent]] = []
    result = slots.run(
        scripted(bash("echo  one\necho two"), {"text": "Done.", "delay": 1}),
        lambda event: events.append((time.monotonic(), event)),
    )
    ended = time.monotonic()
    assert result.text == "Done."
    assert [event for _, event in events] == [
        RunEvent("tool", "Bash: echo one echo two"),
        RunEvent("text", "Done."),
    ]
    assert events[0][0] < ended - 0.9


def test_an_event_handler_that_raises_does_not_break_the_run(slots: Slots) -> None:
    def raises(_: RunEvent) -> None:
        raise ValueError("the timeline is away")

    assert slots.run(scripted(bash("true"), {"text": "Done."}), raises).text == "Done."


def test_structured_output_is_returned_as_a_value(slots: Slots) -> None:
    result = slots.run(
        scripted({"structured": {"answer": "42"}}, {"text": "Done."}, tools=(), output_schema=SCHEMA), ignore
    )
    assert (result.structured, result.error) == ({"answer": "42"}, None)


def test_a_task_is_sent_as_written(slots: Slots, api: MessagesApi) -> None:
    request = scripted({"text": "Done."})
    request = scripted(prompt=f"/context @/etc/passwd {request.prompt}", tools=("Read",))
    assert slots.run(request, ignore).text == "Done."
    sent = str(api.requests[-1].body["messages"])
    assert "/context @/etc/passwd" in sent
    assert "root:" not in sent


def test_an_agent_sees_nothing_of_the_service_environment(slots: Slots, api: MessagesApi) -> None:
    assert os.environ["POKESTRATOR_TEST_CANARY"] == CANARY
    slots.run(scripted(bash("env"), {"text": "Done."}), ignore)
    printed = tool_output(api)
    seen = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    assert seen["ANTHROPIC_BASE_URL"] not in ("", api.url), printed
    assert "CANARY" not in printed
    assert CANARY not in printed
    given = agent_environment(api.url)
    own = {"HOME", "PWD", "OLDPWD", "SHELL", "SHLVL", "TMPDIR", "NO_PROXY", "no_proxy", "_"}
    assert {name for name in os.environ if name in seen} <= given.keys() | own
    long_values = {value for name, value in os.environ.items() if len(value) > 7 and name not in given.keys() | own}
    assert not {value for value in long_values if value in seen.values()}


def test_model_calls_never_go_through_a_proxy(slots: Slots, api: MessagesApi) -> None:
    slots.run(scripted(bash("echo $NO_PROXY"), {"text": "Done."}), ignore)
    assert tool_output(api).strip() == "127.0.0.1,localhost"


def test_a_run_has_a_private_home_that_is_removed_afterwards(slots: Slots, api: MessagesApi) -> None:
    show = 'echo $HOME; echo $TMPDIR; pwd; echo $CLAUDE_CONFIG_DIR; stat -c %a "$HOME/.."; mkdir -m 0 locked'
    slots.run(scripted(bash(show), {"text": "Done."}), ignore)
    *folders, mode = tool_output(api).split()
    roots = {Path(folder).parent for folder in folders}
    assert len(roots) == 1
    assert mode == "700"
    assert not roots.pop().exists()


def test_a_secret_that_an_agent_prints_is_taken_out(slots: Slots) -> None:
    events: list[RunEvent] = []
    steps = bash(f"echo {SECRET}"), {"text": f"It is {SECRET}."}
    result = slots.run(scripted(*steps, variables={"TIDE_KEY": SECRET}), events.append)
    assert result.text == "It is [secret]."
    assert SECRET not in str(events)


@pytest.mark.parametrize(
    ("step", "error", "said", "is_transient"),
    [
        ({"status": 401, "type": "authentication_error"}, ErrorKind.UNAUTHORIZED, "401", False),
        ({"status": 403, "type": "permission_error"}, ErrorKind.UNAUTHORIZED, "403", False),
        ({"status": 429, "type": "rate_limit_error"}, ErrorKind.RATE_LIMITED, "429", True),
        ({"status": 529, "type": "overloaded_error"}, ErrorKind.OVERLOADED, "529", True),
        ({"status": 400, "type": "invalid_request_error"}, ErrorKind.API_ERROR, "400", False),
        ({"status": 500, "type": "api_error"}, ErrorKind.API_ERROR, "500", True),
        ({"cut": True}, ErrorKind.STREAM_CUT, "ECONNRESET", True),
        ({"malformed": True}, ErrorKind.STREAM_CUT, "JSON", True),
        ({"refusal": True}, ErrorKind.REFUSAL, "can't help", False),
        ({"empty": True}, ErrorKind.NO_OUTPUT, "empty", False),
    ],
    ids=lambda value: " ".join(map(str, next(iter(value.items())))) if isinstance(value, dict) else None,
)
def test_a_failed_run_says_why_and_whether_it_may_be_over_in_a_moment(
    slots: Slots, step: dict[str, Any], error: ErrorKind, said: str, is_transient: bool
) -> None:
    result = slots.run(scripted(step), ignore)
    assert (result.error, result.is_transient) == (error, is_transient), result
    assert said in result.detail
    assert len(result.detail) <= 500
    assert result.text == ""
    assert result.usage.turns >= 1


def test_text_where_structured_output_was_asked_for_is_no_output(slots: Slots) -> None:
    result = slots.run(scripted({"text": "The answer is 42."}, output_schema=SCHEMA), ignore)
    assert result.error == ErrorKind.NO_OUTPUT
    assert "The answer is 42." in result.detail


def test_the_turn_limit_is_reported(slots: Slots) -> None:
    result = slots.run(scripted(bash("true"), max_turns=2), ignore)
    assert (result.error, result.usage.output_tokens) == (ErrorKind.TURN_LIMIT, 10)
    assert not result.is_transient


def test_the_budget_limit_is_reported(slots: Slots) -> None:
    costly = {**bash("true"), "usage": {"input_tokens": 5_000_000}}
    result = slots.run(scripted(costly, max_budget_usd=0.01), ignore)
    assert result.error == ErrorKind.BUDGET_LIMIT
    assert result.usage.cost_usd > 0.01


def test_retries_are_told_and_a_run_that_recovers_succeeds(slots: Slots) -> None:
    events: list[RunEvent] = []
    result = slots.run(
        scripted({"status": 529, "type": "overloaded_error", "times": 1}, {"text": "Done."}), events.append
    )
    assert result.text == "Done."
    assert events[0].kind == "retry"
    assert events[0].text.startswith("529 (overloaded)")


@pytest.mark.parametrize("after_start", [False, True], ids=["before the answer", "within the answer"])
def test_an_api_that_hangs_is_a_timeout_in_time(slots: Slots, after_start: bool) -> None:
    started = time.monotonic()
    result = slots.run(scripted({"hang": 60, "after_start": after_start}, timeout_seconds=3), ignore)
    assert result.error == ErrorKind.TIMEOUT
    assert 3 <= time.monotonic() - started < 10
    assert agents() == []


def test_a_timeout_tells_the_last_retry(slots: Slots) -> None:
    steps = ({"status": 429, "type": "rate_limit_error", "times": 1}, {"hang": 60})
    result = slots.run(scripted(*steps, timeout_seconds=3), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.TIMEOUT, False)
    assert "429 (rate_limit)" in result.detail


def test_a_killed_cli_is_a_crashed_agent(slots: Slots) -> None:
    result = slots.run(scripted(bash("kill -9 $PPID; sleep 5"), {"text": "Done."}), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.AGENT_CRASHED, False)
    assert "-9" in result.detail


def test_a_tool_that_was_not_given_is_not_run(slots: Slots, tmp_path: Path) -> None:
    result = slots.run(scripted(bash(f"touch {tmp_path}/ran"), {"text": "Done."}, tools=("Read",)), ignore)
    assert result.text == "Done."
    assert list(tmp_path.iterdir()) == []


def test_web_fetch_asks_for_the_page_and_nothing_else() -> None:
    asked: list[str] = []

    def resolve(host: str, _port: int) -> list[tuple[str, int]]:
        asked.append(host)
        raise OSError("nobody there")

    fetch = {"tool": "WebFetch", "input": {"url": "https://page.example/", "prompt": "What does it say?"}}
    with MessagesApi() as api:
        claude = Inline(agent_environment(api.url), Egress("any", resolve))
        result = claude.run(scripted(fetch, {"text": "Done."}, tools=("WebFetch",)), ignore)
        assert {(request.method, request.path) for request in api.requests} == {("POST", "/v1/messages")}
    assert result.text == "Done."
    assert set(asked) == {"page.example"}


# Inline: the same worker in this thread.


def test_inline_an_api_that_cannot_be_reached_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        claude = Inline(agent_environment(f"http://127.0.0.1:{unused.getsockname()[1]}"))
        result = claude.run(scripted({"text": "Done."}), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.UNREACHABLE, True)
    assert "ECONNREFUSED" in result.detail


def test_inline_a_missing_key_is_unauthorized(api: MessagesApi) -> None:
    claude = Inline({name: value for name, value in agent_environment(api.url).items() if name != "ANTHROPIC_API_KEY"})
    result = claude.run(scripted({"text": "Done."}), ignore)
    assert result.error == ErrorKind.UNAUTHORIZED, result


def test_inline_the_environment_is_back_after_the_run(api: MessagesApi) -> None:
    before = dict(os.environ)
    assert Inline(agent_environment(api.url)).run(scripted({"text": "Done."}), ignore).text == "Done."
    assert dict(os.environ) == before


def test_inline_a_run_is_ended_by_close(api: MessagesApi) -> None:
    claude = Inline(agent_environment(api.url))
    results: list[RunResult] = []
    seen = len(api.requests)
    thread = threading.Thread(target=lambda: results.append(claude.run(scripted({"hang": 60}), ignore)))
    thread.start()
    assert wait_until(lambda: len(api.requests) > seen, 20)
    claude.close()
    thread.join(20)
    assert [result.error for result in results] == [ErrorKind.AGENT_CRASHED]
    assert agents() == []
