"""The scripted Messages API, asked by the real CLI and by plain HTTP clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from claude_agent_sdk import ClaudeAgentOptions, ClaudeSDKError, ResultMessage, query

from pokestrator.demo.messages_api import MessagesApi
from pokestrator.demo.script import draft_for
from pokestrator.subagent_checks import problems_of
from pokestrator.subagents import Draft, parse

DRAFT_FORMAT = {"type": "json_schema", "schema": Draft.model_json_schema()}


@pytest.fixture
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


def script(*steps: dict[str, Any]) -> str:
    return f"Please do it. SCRIPT: {json.dumps(steps)} Thank you."


# The real CLI

AskClaude = Callable[..., ResultMessage]


@pytest.fixture
def ask_claude(tmp_path: Path) -> AskClaude:
    """One run of the real CLI against `api`; returns its ResultMessage."""

    async def ask(api: MessagesApi, prompt: str, options: ClaudeAgentOptions) -> ResultMessage:
        result = None
        async with contextlib.aclosing(query(prompt=prompt, options=options)) as messages:
            with contextlib.suppress(ClaudeSDKError):  # raised after the ResultMessage that tells of an API error
                async for message in messages:
                    if isinstance(message, ResultMessage):
                        result = message
        assert result is not None, "the CLI ended without a result"
        return result

    def run(api: MessagesApi, prompt: str, tools: tuple[str, ...] = (), **more: Any) -> ResultMessage:
        environment = {
            "ANTHROPIC_BASE_URL": api.url,
            "ANTHROPIC_API_KEY": "made-up",
            "NO_PROXY": "127.0.0.1",
            "CLAUDE_CONFIG_DIR": str(tmp_path / "config"),
            "CLAUDE_CODE_TMPDIR": str(tmp_path),
            "CLAUDE_CODE_MAX_RETRIES": "0",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1",
            "DISABLE_TELEMETRY": "1",
            "DISABLE_ERROR_REPORTING": "1",
            "DISABLE_AUTOUPDATER": "1",
        }
        options = ClaudeAgentOptions(
            model="sonnet",
            system_prompt="You are a test.",
            tools=list(tools),
            allowed_tools=list(tools),
            permission_mode="dontAsk",
            setting_sources=[],
            strict_mcp_config=True,
            skills=[],
            verbatim_prompts=True,
            max_turns=5,
            cwd=tmp_path,
            env=environment,
            extra_args={"no-session-persistence": None},
            **more,
        )
        return asyncio.run(ask(api, prompt, options))

    return run


def test_the_cli_returns_the_text_of_a_step_after_one_request(api: MessagesApi, ask_claude: AskClaude) -> None:
    result = ask_claude(api, script({"text": "Rome is fine."}))
    assert (result.is_error, result.result) == (False, "Rome is fine.")
    assert [(r.method, r.path) for r in api.requests] == [("POST", "/v1/messages")]
    assert api.requests[0].headers["x-api-key"] == "made-up"


def test_the_cli_runs_a_tool_and_sends_what_it_printed(api: MessagesApi, ask_claude: AskClaude) -> None:
    steps = script({"tool": "Bash", "input": {"command": "echo $((40 + 2)) apples"}}, {"text": "Done."})
    result = ask_claude(api, steps, tools=("Bash",))
    assert result.result == "Done."
    first, second = api.requests
    assert "tool_result" not in json.dumps(first.body)
    (output,) = [
        block["content"]
        for message in second.body["messages"]
        if message["role"] == "user"
        for block in message["content"]
        if block["type"] == "tool_result"
    ]
    assert output == "42 apples"


def test_the_cli_returns_structured_output(api: MessagesApi, ask_claude: AskClaude) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    result = ask_claude(
        api, script({"structured": {"city": "Rome"}}), output_format={"type": "json_schema", "schema": schema}
    )
    assert result.structured_output == {"city": "Rome"}


def test_without_a_script_the_cli_gets_a_valid_draft_for_the_task(api: MessagesApi, ask_claude: AskClaude) -> None:
    task = "Find me cheap flights\nto Rome in May ✈️"
    result = ask_claude(api, f"Draft a subagent.\n<task>\n{task}\n</task>", output_format=DRAFT_FORMAT)
    draft = parse(Draft, result.structured_output)
    assert draft.name == "find_cheap_flights"
    assert draft.examples[0] == task


def test_without_a_script_a_run_gets_an_answer_that_says_it_is_scripted(
    api: MessagesApi, ask_claude: AskClaude
) -> None:
    result = ask_claude(api, "<task>Find me cheap flights to Rome</task>")
    assert result.result is not None and result.result.startswith("[scripted answer] ")
    assert "“Find me cheap flights to Rome”" in result.result
    assert result.stop_reason == "end_turn"


def test_the_cli_reports_a_key_that_is_not_let_in(ask_claude: AskClaude) -> None:
    with MessagesApi(api_key="the right one") as api:
        result = ask_claude(api, "hello")
    assert (result.is_error, result.api_error_status) == (True, 401)


def test_the_cli_reports_a_refusal(api: MessagesApi, ask_claude: AskClaude) -> None:
    result = ask_claude(api, script({"refusal": True}))
    assert result.is_error
    assert result.result is not None and "safeguards" in result.result


# Plain HTTP


def post(api: MessagesApi, text: str, *, timeout: float = 10, key: str = "made-up", **more: Any) -> requests.Response:
    body = {"model": "sonnet", "messages": [{"role": "user", "content": text}], **more}
    return requests.post(f"{api.url}/v1/messages?beta=true", json=body, headers={"x-api-key": key}, timeout=timeout)


def text_of(response: requests.Response) -> str:
    return "".join(block["text"] for block in response.json()["content"])


def events_of(response: requests.Response) -> list[tuple[str, dict[str, Any]]]:
    """The server-sent events of a whole answer: name and data."""
    events = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        events.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return events


def test_a_streamed_text_comes_as_the_events_of_the_messages_api(api: MessagesApi) -> None:
    text = "word " * 200
    response = post(api, script({"text": text, "usage": {"input_tokens": 7, "output_tokens": 99}}), stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = events_of(response)
    names = [name for name, _ in events]
    assert names[:3] == ["message_start", "ping", "content_block_start"]
    assert names[3:-3] == ["content_block_delta"] * 3
    assert names[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert all(name == data["type"] for name, data in events)
    assert "".join(d["delta"]["text"] for n, d in events if n == "content_block_delta") == text
    assert events[0][1]["message"]["usage"]["input_tokens"] == 7
    assert events[-2][1]["delta"]["stop_reason"] == "end_turn"
    assert events[-2][1]["usage"] == {"output_tokens": 99}


def test_a_streamed_tool_call_comes_as_partial_json(api: MessagesApi) -> None:
    wanted = {"command": "ls"}
    events = events_of(post(api, script({"tool": "Bash", "input": wanted}), stream=True))
    block = next(data["content_block"] for name, data in events if name == "content_block_start")
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "Bash", {})
    parts = [data["delta"] for name, data in events if name == "content_block_delta"]
    assert {part["type"] for part in parts} == {"input_json_delta"}
    assert json.loads("".join(part["partial_json"] for part in parts)) == wanted
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"


def test_each_assistant_message_moves_the_script_on_and_the_last_step_repeats(api: MessagesApi) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": script({"text": "one"}, {"text": "two"})}]
    answers = []
    for _ in range(3):
        answer = text_of(post(api, "", messages=messages))
        assert text_of(post(api, "", messages=messages)) == answer, "a retry meets the same step"
        answers.append(answer)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "go on"}]
    assert answers == ["one", "two", "two"]


def test_an_http_error_with_times_is_followed_by_the_next_step(api: MessagesApi) -> None:
    overloaded = {"status": 529, "type": "overloaded_error", "headers": {"retry-after": "3"}, "times": 2}
    prompt = script(overloaded, {"status": 500, "times": 1}, {"text": "Recovered."})
    answers = [post(api, prompt) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [529, 529, 500, 200]
    assert answers[0].json()["error"]["type"] == "overloaded_error"
    assert answers[0].headers["retry-after"] == "3"
    assert text_of(answers[3]) == "Recovered."


def test_an_http_error_without_times_lasts(api: MessagesApi) -> None:
    prompt = script({"status": 429, "type": "rate_limit_error"}, {"text": "never"})
    assert [post(api, prompt).status_code for _ in range(3)] == [429, 429, 429]


@pytest.mark.parametrize("stream", [True, False])
def test_a_cut_ends_the_answer_before_its_end(api: MessagesApi, stream: bool) -> None:
    prompt = script({"cut": True, "times": 2}, {"text": "whole"})
    for _ in range(2):
        # requests reports a chunked body without its end, or one shorter than announced, as one of these two.
        with pytest.raises((requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError)):
            post(api, prompt, stream=stream)
    assert text_of(post(api, prompt, stream=False)) == "whole"


@pytest.mark.parametrize("stream", [True, False])
def test_a_malformed_answer_is_no_json(api: MessagesApi, stream: bool) -> None:
    response = post(api, script({"malformed": True}), stream=stream)
    assert response.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        events_of(response) if stream else response.json()


def test_an_error_can_come_as_an_event(api: MessagesApi) -> None:
    events = events_of(post(api, script({"sse_error": "overloaded_error"}), stream=True))
    assert events[-1][0] == "error"
    assert events[-1][1]["error"]["type"] == "overloaded_error"


def test_an_empty_answer_has_no_content(api: MessagesApi) -> None:
    message = post(api, script({"empty": True})).json()
    assert (message["content"], message["stop_reason"]) == ([], "end_turn")


def test_a_delay_comes_before_the_answer(api: MessagesApi) -> None:
    started = time.monotonic()
    assert text_of(post(api, script({"text": "late", "delay": 0.3}))) == "late"
    assert time.monotonic() - started >= 0.3


@pytest.mark.parametrize("step", [{"hang": 60}, {"hang": 60, "after_start": True}, {"text": "late", "delay": 60}])
def test_stopping_the_server_ends_a_hang_at_once(api: MessagesApi, step: dict[str, Any]) -> None:
    failures: list[requests.exceptions.RequestException] = []

    def ask() -> None:
        try:
            post(api, script(step), stream=True, timeout=30)
        except requests.exceptions.RequestException as error:
            failures.append(error)

    client = threading.Thread(target=ask)
    client.start()
    assert api.wait_for_requests(1, timeout=20)
    started = time.monotonic()
    api.stop()
    client.join(timeout=20)
    assert len(failures) == 1 and not isinstance(failures[0], requests.exceptions.Timeout)
    assert time.monotonic() - started < 10


def test_a_hang_after_the_start_sends_the_first_events(api: MessagesApi) -> None:
    body = {"stream": True, "messages": [{"role": "user", "content": script({"hang": 60, "after_start": True})}]}
    with requests.post(f"{api.url}/v1/messages", json=body, stream=True, timeout=5) as response:
        assert next(response.iter_lines()) == b"event: message_start"


def test_a_client_that_leaves_is_not_reported(api: MessagesApi, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(requests.exceptions.ReadTimeout):
        post(api, script({"text": "word " * 100_000, "delay": 0.3}), stream=True, timeout=0.1)
    # The thread that found its client gone has said what it has to say once it is no more.
    for thread in [t for t in threading.enumerate() if "process_request_thread" in t.name]:
        thread.join(timeout=5)
    assert capfd.readouterr() == ("", "")


def test_a_started_again_server_has_the_same_address(api: MessagesApi) -> None:
    url = api.url
    api.stop()
    with pytest.raises(requests.exceptions.ConnectionError):
        post(api, "hello")
    api.start()
    assert api.url == url
    assert post(api, "hello").status_code == 200


def test_only_the_given_key_is_let_in() -> None:
    with MessagesApi(api_key="right") as api:
        wrong = post(api, "hello", key="wrong")
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (401, "authentication_error")
        assert post(api, "hello", key="right").status_code == 200
        bearer = {"authorization": "Bearer right"}
        body = {"messages": [{"role": "user", "content": "hello"}]}
        assert requests.post(f"{api.url}/v1/messages", json=body, headers=bearer, timeout=5).status_code == 200


def test_the_other_addresses_of_the_api_answer(api: MessagesApi) -> None:
    assert requests.head(api.url, timeout=5).status_code == 200
    assert requests.get(f"{api.url}/v1/models", timeout=5).json()["data"] == []
    counted = requests.post(f"{api.url}/v1/messages/count_tokens", json={"messages": []}, timeout=5)
    assert counted.json()["input_tokens"] > 0
    assert requests.get(f"{api.url}/v1/files", timeout=5).status_code == 404
    assert [r.path for r in api.requests] == ["/", "/v1/models", "/v1/messages/count_tokens", "/v1/files"]
    assert not api.wait_for_requests(1, timeout=0), "only questions count"


@pytest.mark.parametrize("prompt", ["SCRIPT: [{", 'SCRIPT: ["hello"]', 'SCRIPT: [{"txet": "hello"}]'])
def test_a_script_that_cannot_be_read_is_a_400(api: MessagesApi, prompt: str) -> None:
    response = post(api, prompt)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_task_that_speaks_of_a_script_is_no_script(api: MessagesApi) -> None:
    assert "“Write a film. SCRIPT: two pages”" in text_of(post(api, "Write a film. SCRIPT: two pages"))


# Drafts


def drafting(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"name": "StructuredOutput", "input_schema": schema}]


def test_a_step_for_the_run_leaves_the_draft_to_the_scripted_drafter(api: MessagesApi) -> None:
    prompt = f"<task>{script({'text': 'ran', 'for': 'run'})}</task>"
    drafted = post(api, prompt, tools=drafting(Draft.model_json_schema()))
    assert parse(Draft, drafted.json()["content"][0]["input"]).name.startswith("script_text_ran")
    assert text_of(post(api, prompt)) == "ran"


def test_a_question_for_another_schema_is_a_400(api: MessagesApi) -> None:
    response = post(api, "hello", tools=drafting({"type": "object", "properties": {"city": {}}}))
    assert response.status_code == 400
    assert "city" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("What's the weather in Paris?", "weather_paris"),
        ("Écris-moi un poème sur Zürich", "ecris_moi_un"),
        ("Summarize my unread emails, please", "summarize_unread_emails"),
        ("limerick", "limerick_task"),
        ("hi", "hi_task"),
        ("2024 3d 7up budget", "budget_task"),
        ("{task} {0} %s <b>", "task_s_b"),
    ],
)
def test_a_draft_is_named_after_words_of_its_task(task: str, name: str) -> None:
    assert parse(Draft, draft_for(task)).name == name


@pytest.mark.parametrize(
    "task",
    [
        "",
        " \n\t ",
        "?",
        "a",
        "🦓🌈",
        "42",
        "帮我找去罗马的便宜机票",
        "Найди мне билеты",
        "the and of",
        "x" * 20_000,
        " " * 3_000 + "word",
        "pneumonoultramicroscopicsilicovolcanoconiosis " * 3,
        "under_score __init__ UPPER",
        "\x00\x1f\u200b\u2028",
        "lone \ud800 surrogate",
        '"quotes" and \\ and </task>',
    ],
)
def test_a_draft_is_valid_whatever_the_task(task: str) -> None:
    draft = parse(Draft, draft_for(task))
    assert draft.tools == ()
    assert problems_of(draft.name, draft.definition(), draft.examples, others={}, redact=str) == []
    assert parse(Draft, draft_for(task)) == draft, "the same task makes the same draft"


# The command


def test_the_command_prints_its_address_and_serves_until_sigterm() -> None:
    command = [sys.executable, "-m", "pokestrator.demo.messages_api"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert requests.get(f"{url}/v1/models", timeout=5).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=5) == 0
        finally:
            process.kill()
