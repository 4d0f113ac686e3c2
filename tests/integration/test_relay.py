"""The relay to Claude's API: whose key goes out, what comes back and when, what it is thought to have cost."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from pokestrator.claude.pool import Inline, Slots
from pokestrator.claude.relay import Relay
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind, Usage
from tests.integration.agent_runs import KEY, agent_environment, bash, ignore, scripted, wait_until
from tests.integration.relaying import Run, admitted, question, relaying

OAUTH = "sk-ant-oat01-scripted"


@pytest.fixture(scope="module")
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


@pytest.fixture(scope="module")
def relay(api: MessagesApi) -> Iterator[Relay]:
    with relaying(api.url) as relay:
        yield relay


@pytest.fixture
def run(relay: Relay) -> Iterator[Run]:
    with admitted(relay) as run:
        yield run


def relay_threads() -> int:
    return sum(thread.name == "relay" for thread in threading.enumerate())


# whose key -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["x-api-key", "authorization"])
def test_the_owners_key_goes_out_in_place_of_the_runs(run: Run, api: MessagesApi, header: str) -> None:
    given = run.token if header == "x-api-key" else f"Bearer {run.token}"
    headers = {header: given, "anthropic-beta": "one,two", "anthropic-version": "2023-06-01", "cookie": "a=b"}
    answer = run.ask({"text": "Good evening."}, headers=headers)
    assert answer.json()["content"][0]["text"] == "Good evening."
    sent = api.requests[-1].headers
    assert (sent["x-api-key"], sent.get("authorization"), sent.get("cookie")) == (KEY, None, None)
    assert (sent["anthropic-beta"], sent["anthropic-version"]) == ("one,two", "2023-06-01")
    assert run.token not in str(sent)


def test_an_oauth_token_goes_out_as_one(api: MessagesApi) -> None:
    with relaying(api.url, ANTHROPIC_API_KEY="", CLAUDE_CODE_OAUTH_TOKEN=OAUTH) as relay, admitted(relay) as run:
        assert "ANTHROPIC_API_KEY" not in run.variables
        assert run.variables["CLAUDE_CODE_OAUTH_TOKEN"] == run.token
        assert run.ask({"text": "Hello."}, headers={"authorization": f"Bearer {run.token}"}).ok
    sent = api.requests[-1].headers
    assert (sent["authorization"], sent.get("x-api-key")) == (f"Bearer {OAUTH}", None)


def test_the_real_cli_works_with_an_oauth_token() -> None:
    with MessagesApi(OAUTH) as api:
        environment = {**agent_environment(api.url), "CLAUDE_CODE_OAUTH_TOKEN": OAUTH}
        del environment["ANTHROPIC_API_KEY"]
        result = Inline(environment).run(scripted({"text": "Done."}, timeout_seconds=40.0), ignore)
        assert result.text == "Done.", result
        assert {request.path for request in api.requests} == {"/v1/messages"}
        assert "oauth" in api.requests[0].headers["anthropic-beta"]


def test_a_question_goes_through_the_owners_proxy() -> None:
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as proxy:

        def answer() -> None:
            connection, _ = proxy.accept()
            with connection:
                asked.append(connection.recv(65_536))
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

        threading.Thread(target=answer, daemon=True).start()
        owners = {"HTTP_PROXY": f"http://me:pass%21@127.0.0.1:{proxy.getsockname()[1]}", "NO_PROXY": "other.invalid"}
        with relaying("http://claude.invalid", **owners) as relay, admitted(relay) as run:
            assert run.ask({"text": "Done."}).json() == {}
    assert asked[0].startswith(b"POST http://claude.invalid/v1/messages?beta=true HTTP/1.1\r\n")
    assert b"Basic bWU6cGFzcyE=" in asked[0]


# what comes back -----------------------------------------------------------------------------------------------------


def test_an_answer_is_passed_on_while_it_is_being_given(run: Run) -> None:
    with run.ask({"hang": 60, "after_start": True}, stream=True) as answer:
        lines = answer.iter_lines()
        assert next(lines) == b"event: message_start"  # the rest will never come


def test_a_refusal_comes_back_as_it_was_given(run: Run) -> None:
    step = {"status": 429, "type": "rate_limit_error", "message": "slow down", "headers": {"retry-after": "7"}}
    answer = run.ask(step)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"] == {"type": "rate_limit_error", "message": "slow down"}
    assert answer.headers["request-id"].startswith("req_scripted_")


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_breaks_off_does_so_for_the_client_too(run: Run, stream: bool) -> None:
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        _ = run.ask({"cut": True}, stream=stream).content


def test_what_an_agent_waits_for_ends_with_its_run(relay: Relay, api: MessagesApi) -> None:
    before, asked = relay_threads(), len(api.requests)

    def ask() -> None:
        with pytest.raises(requests.RequestException):
            run.ask({"hang": 60})

    with admitted(relay) as run:
        asking = threading.Thread(target=ask)
        asking.start()
        assert wait_until(lambda: len(api.requests) > asked, 20)
        began = time.monotonic()
    asking.join(20)
    assert not asking.is_alive()
    assert time.monotonic() - began < 10, "it waited for the answer"
    assert wait_until(lambda: relay_threads() <= before, 20)  # fewer, if an earlier test's was only just ending


class KeepsConnections(BaseHTTPRequestHandler):
    """An API that answers many questions on one connection."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        data = json.dumps({"port": self.client_address[1]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


def test_a_runs_connection_to_the_api_is_kept_for_its_next_question_and_for_no_other_run() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), KeepsConnections)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    with relaying(f"http://127.0.0.1:{server.server_port}") as relay:
        with admitted(relay) as run:
            ports = [run.ask({"text": "Done."}).json()["port"] for _ in range(3)]
        with admitted(relay) as other:
            assert other.ask({"text": "Done."}).json()["port"] not in ports
    server.shutdown()
    server.server_close()
    assert len(set(ports)) == 1


# what it cost --------------------------------------------------------------------------------------------------------

USED = {
    "input_tokens": 1000,
    "cache_read_input_tokens": 2000,
    "cache_creation_input_tokens": 4000,
    "output_tokens": 500,
}
HAIKU_USD = (1000 * 1 + 2000 * 0.1 + 4000 * 1.25 + 500 * 5) / 1e6


@pytest.mark.parametrize("stream", [True, False])
def test_answers_are_counted_by_the_published_prices(run: Run, stream: bool) -> None:
    for _ in range(2):
        assert run.ask({"text": "Done.", "usage": USED}, stream=stream).content
    usage = run.admission.ledger.usage(Usage())
    assert usage == Usage(pytest.approx(2 * HAIKU_USD), 14_000, 1_000, 2)


def test_an_unknown_model_costs_what_the_dearest_does(run: Run) -> None:
    run.ask({"text": "Done.", "usage": {"input_tokens": 1000, "output_tokens": 100}}, model="claude-of-tomorrow")
    assert run.admission.ledger.spent_usd() == pytest.approx((1000 * 15 + 100 * 75) / 1e6)


def test_an_answer_that_broke_off_costs_what_came_of_it(run: Run) -> None:
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        _ = run.ask({"cut": True, "text": "x" * 8_000, "usage": {"input_tokens": 1000}}, stream=True).content
    assert wait_until(lambda: run.admission.ledger.usage(Usage()).output_tokens >= 900, 2)  # 4,000 characters
    assert run.admission.ledger.spent_usd() > (1000 * 1 + 900 * 5) / 1e6


def test_what_the_api_refused_costs_nothing(relay: Relay) -> None:
    with admitted(relay) as run:
        run.ask({"status": 529, "type": "overloaded_error"})
    assert run.admission.ledger.usage(Usage(turns=3)) == Usage(turns=3)


def test_a_run_that_timed_out_has_cost_something_too(slots: Slots) -> None:
    slots.run(scripted({"text": "The slot is warm."}), ignore)
    usage = {"input_tokens": 3000}
    result = slots.run(scripted({**bash("true"), "usage": usage}, {"hang": 60}, timeout_seconds=8), ignore)
    assert result.error is ErrorKind.TIMEOUT
    assert result.usage.cost_usd > 3000 * 0.1 / 1e6
    assert result.usage.turns == 2


# budgets -------------------------------------------------------------------------------------------------------------

COSTLY = {"input_tokens": 100_000}  # 10 cents


def test_a_spent_budget_refuses_the_next_question(relay: Relay, api: MessagesApi) -> None:
    with admitted(relay, max_budget_usd=0.05) as run:
        assert run.ask({"text": "Done.", "usage": COSTLY}).ok
        asked = len(api.requests)
        answer = run.ask({"text": "More."})
        assert (answer.status_code, answer.headers["x-should-retry"]) == (400, "false")
        assert "budget" in answer.json()["error"]["message"]
        assert len(api.requests) == asked


def test_an_answer_that_passes_the_budget_is_cut(relay: Relay) -> None:
    with admitted(relay, max_budget_usd=0.05) as run:
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            _ = run.ask({"text": "x" * 4_000, "usage": COSTLY}, stream=True).content
        assert run.admission.is_over_budget


def test_an_answer_in_one_piece_may_not_be_able_to_pass_the_budget(relay: Relay) -> None:
    with admitted(relay, max_budget_usd=0.05) as run:
        assert run.ask({"text": "Done."}, max_tokens=9_000).ok
        assert run.ask({"text": "Done."}, max_tokens=11_000).status_code == 400


def test_a_run_ends_by_its_budget_where_the_clis_own_count_would_let_it_go_on(slots: Slots) -> None:
    # To the CLI an unknown model costs 5 dollars a million, to us 15.
    costly = {**bash("true"), "usage": {"input_tokens": 100_000}}
    began = time.monotonic()
    result = slots.run(scripted(costly, {"text": "Done."}, model="claude-of-tomorrow", max_budget_usd=1.2), ignore)
    assert result.error is ErrorKind.BUDGET_LIMIT, result
    assert result.usage.cost_usd > 1.2
    assert time.monotonic() - began < 15
    assert not result.is_transient


def test_questions_are_held_to_their_form(run: Run) -> None:
    def post(data: Any, **headers: str) -> int:
        url = f"{run.url}/v1/messages"
        return requests.post(url, data=data, headers={"x-api-key": run.token, **headers}, timeout=10).status_code

    assert post(b"no json") == 400
    assert post(b"[" * 5_000 + b"]" * 5_000) == 400
    assert post(b'{"max_tokens": NaN}') == 400
    assert post(iter([b"{}"])) == 400  # chunked
    assert post(json.dumps(question({"text": "Done."}))) == 200
