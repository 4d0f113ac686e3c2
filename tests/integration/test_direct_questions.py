"""Questions that are put without the CLI: each ends as it would by the CLI, and nothing outlasts its time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from pokestrator.claude.counting import Ledger
from pokestrator.claude.models import model_of
from pokestrator.claude.pool import Claude, Inline, Slots
from pokestrator.claude.questions import LEAST_TOKENS, MOST_TOKENS
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from tests.integration.agent_runs import KEY, agent_environment, agents, ignore, scripted, wait_until

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 20}},
    "required": ["answer"],
    "additionalProperties": False,
}
FITS = {"structured": {"answer": "42"}}
MISFIT = {"structured": {"answer": 42}}
ENDED = RunResult(error=ErrorKind.AGENT_CRASHED, detail="cancelled")


@pytest.fixture(scope="module")
def direct(api: MessagesApi) -> Iterator[Slots]:
    """Slots that were never started: what they answer, they answer without an agent."""
    slots = Slots(1, agent_environment(api.url))
    yield slots
    slots.close()


@pytest.fixture(scope="module")
def by_cli(api: MessagesApi) -> Iterator[Slots]:
    """Slots of an owner with an OAuth token, which the CLI alone may use."""
    environment = agent_environment(api.url, CLAUDE_CODE_OAUTH_TOKEN=KEY)
    del environment["ANTHROPIC_API_KEY"]
    slots = Slots(1, environment)
    slots.start()
    yield slots
    slots.close()


def question(*steps: dict[str, Any], **changes: Any) -> RunRequest:
    return scripted(*steps, **{"tools": (), "output_schema": SCHEMA, "timeout_seconds": 30.0, **changes})


def asked(api: MessagesApi, before: int) -> list[dict[str, Any]]:
    return [request.body for request in api.requests[before:]]


# what is taken -------------------------------------------------------------------------------------------------------


def test_an_answer_comes_without_a_process(direct: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    result = direct.run(question(FITS), ignore)
    assert (result.structured, result.error) == ({"answer": "42"}, None)
    assert agents() == []
    [body] = asked(api, before)
    assert "tool_choice" not in body, "the newest models refuse to be forced"
    assert api.requests[before].headers["x-api-key"] == KEY


def test_inline_an_answer_comes_without_a_process(api: MessagesApi) -> None:
    claude = Inline(agent_environment(api.url))
    before = len(api.requests)
    assert claude.run(question(FITS), ignore).structured == {"answer": "42"}
    assert not api.requests[before].headers["user-agent"].startswith("claude-cli")


@pytest.mark.parametrize("changes", [{"tools": ("Bash",)}, {"output_schema": None}, {"model": "sonnet[1m]"}], ids=str)
def test_all_that_is_no_question_goes_by_the_cli(slots: Slots, api: MessagesApi, changes: dict[str, Any]) -> None:
    before = len(api.requests)
    slots.run(question(FITS, {"text": "Done."}, **changes), ignore)
    assert api.requests[before].headers["user-agent"].startswith("claude-cli")


def test_an_oauth_token_goes_by_the_cli(by_cli: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    assert by_cli.run(question(FITS, {"text": "Done."}), ignore).structured == {"answer": "42"}
    assert api.requests[before].headers["user-agent"].startswith("claude-cli")


@pytest.mark.parametrize("name", ["haiku", "sonnet", "opus", "fable"])
def test_a_short_name_means_the_model_that_the_cli_takes_it_for(by_cli: Slots, api: MessagesApi, name: str) -> None:
    before = len(api.requests)
    by_cli.run(question(FITS, {"text": "Done."}, model=name), ignore)
    [body, *_] = asked(api, before)
    assert (body["model"], body["output_config"]) == (model_of(name), {"effort": "medium"})


# how it ends, by both roads ------------------------------------------------------------------------------------------


ENDINGS = [
    ([FITS], None, False),
    ([MISFIT, FITS], None, False),
    ([{"status": 401, "type": "authentication_error"}], ErrorKind.UNAUTHORIZED, False),
    ([{"status": 403, "type": "permission_error"}], ErrorKind.UNAUTHORIZED, False),
    ([{"status": 400, "type": "invalid_request_error"}], ErrorKind.API_ERROR, False),
    ([{"status": 429, "type": "rate_limit_error"}], ErrorKind.RATE_LIMITED, True),
    ([{"status": 500, "type": "api_error"}], ErrorKind.API_ERROR, True),
    ([{"status": 529, "type": "overloaded_error"}], ErrorKind.OVERLOADED, True),
    ([{"cut": True}], ErrorKind.STREAM_CUT, True),
    ([{"malformed": True}], ErrorKind.STREAM_CUT, True),
    ([{"refusal": True}], ErrorKind.REFUSAL, False),
    ([{"text": "The answer is 42."}], ErrorKind.NO_OUTPUT, False),
]


@pytest.mark.parametrize("steps, error, is_transient", ENDINGS, ids=lambda value: str(value)[:40])
def test_a_question_ends_as_it_does_by_the_cli(
    direct: Slots, by_cli: Slots, steps: list[dict[str, Any]], error: ErrorKind | None, is_transient: bool
) -> None:
    ours = direct.run(question(*steps), ignore)
    assert (ours.error, ours.is_transient) == (error, is_transient), ours
    theirs = by_cli.run(question(*steps), ignore)
    assert (theirs.error, theirs.is_transient, theirs.structured) == (error, is_transient, ours.structured), theirs
    if error is None:
        paid = (ours.usage.cost_usd, ours.usage.input_tokens, ours.usage.output_tokens)
        assert paid == (theirs.usage.cost_usd, theirs.usage.input_tokens, theirs.usage.output_tokens)
        assert paid[0] > 0


def test_a_misfit_is_told_what_is_wrong_with_it(direct: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    assert direct.run(question(MISFIT, FITS), ignore).structured == {"answer": "42"}
    _, body = asked(api, before)
    _, said, told = body["messages"]
    assert said["content"][0]["input"] == {"answer": 42}
    [mend] = told["content"]
    assert (mend["is_error"], mend["tool_use_id"]) == (True, said["content"][0]["id"])
    assert "$.answer: 42 is not of type 'string'" in mend["content"]


@pytest.mark.parametrize(
    "given", [{"answer": 42}, {}, {"answer": "4" * 21}, {"answer": "42", "more": 1}, [], "42", None]
)
def test_a_second_misfit_is_no_output(direct: Slots, api: MessagesApi, given: Any) -> None:
    before = len(api.requests)
    result = direct.run(question({"structured": given}), ignore)
    assert (result.error, result.structured) == (ErrorKind.NO_OUTPUT, None)
    assert len(asked(api, before)) == 2


def test_an_empty_answer_is_asked_for_again(direct: Slots) -> None:
    assert direct.run(question({"empty": True}), ignore).error is ErrorKind.NO_OUTPUT


def test_trouble_that_is_soon_over_is_told_and_forgotten(direct: Slots) -> None:
    events: list[RunEvent] = []
    steps = {"status": 529, "type": "overloaded_error", "times": 1}, FITS
    assert direct.run(question(*steps), events.append).structured == {"answer": "42"}
    [event] = events
    assert event.kind == "retry"
    assert "529" in event.text


def test_who_shall_stay_away_longer_than_there_is_time_says_so_at_once(direct: Slots, api: MessagesApi) -> None:
    before, began = len(api.requests), time.monotonic()
    limited = {"status": 429, "type": "rate_limit_error", "headers": {"retry-after": "60"}}
    result = direct.run(question(limited), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.RATE_LIMITED, True)
    assert time.monotonic() - began < 5
    assert len(asked(api, before)) == 1


def test_an_api_that_is_not_there_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        claude = Inline(agent_environment(f"http://127.0.0.1:{unused.getsockname()[1]}"))
        result = claude.run(question(FITS), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.UNREACHABLE, True)
    assert "ECONNREFUSED" in result.detail
    assert result.usage.cost_usd == 0


def test_a_question_goes_through_the_owners_proxy(api: MessagesApi) -> None:
    """The scripted API plays the proxy: what it is asked for is another address."""
    environment = agent_environment("http://claude.invalid", HTTP_PROXY=api.url)
    before = len(api.requests)
    assert Inline(environment).run(question(FITS), ignore).structured == {"answer": "42"}
    assert api.requests[before].headers["host"] == "claude.invalid"


# its time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[{"hang": 60}], [{"status": 529, "times": 1}, {"hang": 60}]], ids=["hangs", "fails"])
def test_an_api_that_hangs_is_a_timeout_in_time(direct: Slots, steps: list[dict[str, Any]]) -> None:
    began = time.monotonic()
    result = direct.run(question(*steps, timeout_seconds=2.0), ignore)
    assert (result.error, result.is_transient) == (ErrorKind.TIMEOUT, False)
    assert 2 <= time.monotonic() - began < 6
    assert ("529" in result.detail) == (len(steps) == 2)


DRIPS = {
    "head": (b"HTTP/1.1 200 OK\r\nx-slow: ", b"x"),
    "body": (b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n", b" "),
    "chunks": (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}


@contextmanager
def dripping(head: bytes, drop: bytes) -> Iterator[tuple[str, threading.Event]]:
    """A server that sends `drop` after `drop`; its address, and what is set once its client has left."""
    left = threading.Event()

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection, suppress(OSError):
                    connection.sendall(head)
                    while True:
                        connection.sendall(drop)
                        threading.Event().wait(0.05)
                left.set()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", left


@pytest.mark.parametrize("part", DRIPS)
def test_an_answer_that_comes_byte_by_byte_ends_in_time(part: str) -> None:
    with dripping(*DRIPS[part]) as (url, left):
        began = time.monotonic()
        result = Inline(agent_environment(url)).run(question(FITS, timeout_seconds=1.0), ignore)
        assert result.error is ErrorKind.TIMEOUT
        assert 1 <= time.monotonic() - began < 5
        assert left.wait(5), "its connection is still open"


def test_an_answer_without_end_is_not_read_to_it() -> None:
    with dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 2**20) as (url, left):
        result = Inline(agent_environment(url)).run(question(FITS, timeout_seconds=20.0), ignore)
        assert (result.error, result.is_transient) == (ErrorKind.STREAM_CUT, True)
        assert left.wait(5)


def test_a_name_that_takes_for_ever_to_look_up_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def look_up(*_: Any) -> Any:
        over.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    began = time.monotonic()
    result = Inline(agent_environment("http://api.invalid")).run(question(FITS, timeout_seconds=1.0), ignore)
    over.set()
    assert result.error is ErrorKind.TIMEOUT
    assert 1 <= time.monotonic() - began < 5


# cancel and close ----------------------------------------------------------------------------------------------------


def asking(threads: ThreadPoolExecutor, claude: Claude, api: MessagesApi, *steps: dict[str, Any]) -> Any:
    """A question that the API has heard and does not answer, or has refused for a while."""
    before = len(api.requests)
    future = threads.submit(claude.run, question(*steps, run_id="this"), ignore)
    assert wait_until(lambda: len(api.requests) > before, 10)
    return future


HOLDS = [{"hang": 60}, {"status": 429, "headers": {"retry-after": "20"}}]


@pytest.mark.parametrize("step", HOLDS, ids=["unanswered", "waiting to try again"])
@pytest.mark.parametrize("kind", [Slots, Inline])
def test_a_cancelled_question_ends_at_once_and_alone(api: MessagesApi, kind: Any, step: dict[str, Any]) -> None:
    claude = Slots(1, agent_environment(api.url)) if kind is Slots else Inline(agent_environment(api.url))
    with ThreadPoolExecutor(2) as threads:
        future = asking(threads, claude, api, step)
        other = threads.submit(claude.run, question({**FITS, "delay": 1}, run_id="other"), ignore)
        claude.cancel("nothing")
        claude.cancel("")
        assert not future.done()
        began = time.monotonic()
        claude.cancel("this")
        assert replace(future.result(5), usage=ENDED.usage) == ENDED
        assert time.monotonic() - began < 3
        assert other.result(5).structured == {"answer": "42"}


@pytest.mark.parametrize("kind", [Slots, Inline])
def test_close_ends_questions_and_none_is_put_afterwards(api: MessagesApi, kind: Any) -> None:
    claude = Slots(1, agent_environment(api.url)) if kind is Slots else Inline(agent_environment(api.url))
    with ThreadPoolExecutor(1) as threads:
        future = asking(threads, claude, api, {"hang": 60})
        claude.close()
        assert future.result(5).detail == "the service is stopping"
    before = len(api.requests)
    assert claude.run(question(FITS), ignore).error is ErrorKind.AGENT_CRASHED
    assert asked(api, before) == []


# its budget ----------------------------------------------------------------------------------------------------------


def test_an_answer_may_have_what_the_budget_can_pay_and_no_more(direct: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    direct.run(question(FITS, max_budget_usd=0.25), ignore)
    direct.run(question(FITS, max_budget_usd=0.05, model="claude-opus-4-1"), ignore)
    ample, tight = asked(api, before)
    assert ample["max_tokens"] == MOST_TOKENS
    assert LEAST_TOKENS <= tight["max_tokens"] <= 0.05 / 75e-6, "more than 5 cents' worth of output"


def test_a_question_that_the_budget_cannot_pay_is_not_put(direct: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    result = direct.run(question(FITS, max_budget_usd=0.0001, model="claude-opus-4-1"), ignore)
    assert (result.error, result.usage.cost_usd) == (ErrorKind.BUDGET_LIMIT, 0)
    assert asked(api, before) == []


def test_a_second_answer_is_not_asked_for_when_the_first_has_spent_the_budget(direct: Slots, api: MessagesApi) -> None:
    before = len(api.requests)
    costly = {**MISFIT, "usage": {"output_tokens": 15_000}}
    result = direct.run(question(costly, FITS, max_budget_usd=0.0076), ignore)
    assert result.error is ErrorKind.BUDGET_LIMIT
    assert 0.007 < result.usage.cost_usd < 0.0076
    assert len(asked(api, before)) == 1


def test_output_tokens_left_are_what_the_prompt_leaves_of_the_budget() -> None:
    assert Ledger(0.25).output_tokens_left("claude-sonnet-5-5", 62_500) == 12_500
    assert Ledger(0.1).output_tokens_left("claude-sonnet-5-5", 62_500) == 0
