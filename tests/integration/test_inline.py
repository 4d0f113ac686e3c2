"""POKESTRATOR_INLINE=1: one request, one thread, from the MCP view to Poke's inbox, as a debugger steps through it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import requests
from werkzeug.serving import make_server

import pokestrator
from pokestrator.bootstrap import Application
from pokestrator.claude.pool import Inline
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import StoreUnavailable
from pokestrator.runs import ErrorKind, sentence
from pokestrator.web.app import create_app
from tests.integration.flow import (
    POET_TASK,
    TOKEN,
    UNFITTING_TASK,
    Forwarder,
    bash,
    contents,
    job_row,
    running,
    settings_for,
    task,
    write_template,
)

PACKAGE = str(Path(pokestrator.__file__).parent)

ROAD = [
    "web/mcp.py post",
    "service.py accept",
    "store/jobs.py insert",
    "web/tool.py accepted",
    "bootstrap.py run_inline",
    "service.py run_now",
    "store/jobs.py claim_one",
    "service.py run_job",
    "routing.py decide",
    "store/shortlist.py find",
    "certainty.py certain",
    "store/subagents.py adopt",
    "store/jobs.py record_route",
    "claude/pool.py run",
    "claude/worker.py run",
    "claude/worker.py hold",
    "store/jobs.py finish",
    "delivery.py deliver",
    "store/callbacks.py claim_due",
    "poke/api.py send",
    "store/callbacks.py delivered",
]


class Recorder:
    """A profile function that keeps our own calls, each with its thread, and may stop at one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.threads: set[str] = set()
        self.breakpoint = ""
        self.stopped = threading.Event()
        self.go_on = threading.Event()
        self._stand_ins: set[str] = set()  # threads of the servers that play Claude's API and Poke

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        name = f"{Path(frame.f_code.co_filename).relative_to(PACKAGE)} {frame.f_code.co_name}"
        thread = threading.current_thread().name
        if name.startswith("demo/"):
            self._stand_ins.add(thread)
        if thread in self._stand_ins:
            return
        self.calls.append(name)
        self.threads.add(thread)
        if name == self.breakpoint:
            self.stopped.set()
            self.go_on.wait(20)


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    """Records in all threads that are started from now on."""
    recorder = Recorder()
    before = threading.getprofile()
    threading.setprofile(recorder)
    yield recorder
    threading.setprofile(before)
    assert sys.getprofile() is None


@pytest.fixture
def api() -> Iterator[MessagesApi]:
    with MessagesApi() as api:
        yield api


@pytest.fixture
def application(api: MessagesApi, inbox: Inbox, database_url: str, tmp_path: Path) -> Iterator[Application]:
    folder = write_template(tmp_path / "templates")
    settings = settings_for(api, inbox, POKESTRATOR_INLINE="1")
    with running(settings, database_url, templates_folder=folder) as application:
        yield application


@contextmanager
def served(application: Application) -> Iterator[str]:
    """The endpoint's address; one thread, `http`, serves it."""
    server = make_server("127.0.0.1", 0, create_app(application))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="http")
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/mcp"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def orchestrate(url: str, description: str, *steps: dict[str, Any], inbox: Inbox | None = None) -> dict[str, Any]:
    """The acknowledgement of one call."""
    job = task(description, *steps)
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}
    if inbox is not None:
        headers |= {"X-Poke-Callback-Url": inbox.callback_url(TOKEN), "X-Poke-Callback-Token": TOKEN}
    call = {"name": "orchestrate", "arguments": {"task_description": job.task, "metadata": job.metadata}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    response = requests.post(url, json=body, headers=headers, timeout=10)
    answer: dict[str, Any] = response.json()["result"]["structuredContent"]
    return answer


def in_order(calls: list[str], road: list[str]) -> list[str]:
    """The part of `road` that does not come in this order."""
    left = iter(calls)
    return [stop for stop in road if stop not in left]


def test_one_request_goes_the_whole_road_in_one_thread(
    application: Application, inbox: Inbox, database_url: str, recorder: Recorder
) -> None:
    assert isinstance(application.claude, Inline)
    with served(application) as url:
        ack = orchestrate(url, POET_TASK, bash("echo sea"), {"text": "The sea."}, inbox=inbox)
        [received] = inbox.wait_for(1, 20)
    assert (ack["status"], ack.get("durable", True)) == ("accepted", True)
    assert (received.channel, received.body) == ("callback", {"content": "The sea.", "hasMore": False})
    assert in_order(recorder.calls, ROAD) == []
    assert recorder.threads == {"http", "relay", "supervisor"}  # its own, and those that an agent's connections need
    assert job_row(database_url, ack["request_id"])["state"] == "succeeded"


def test_somebody_who_stops_before_the_run_has_already_been_answered(
    application: Application, api: MessagesApi, inbox: Inbox, recorder: Recorder
) -> None:
    recorder.breakpoint = "service.py run_now"
    with served(application) as url:
        ack = orchestrate(url, POET_TASK, {"text": "The sea."})
        assert ack["status"] == "accepted"
        assert recorder.stopped.wait(5)
        assert api.requests == []
        assert inbox.received == []
        recorder.go_on.set()
        assert contents(inbox.wait_for(1, 20)) == ["The sea."]


def test_a_build_goes_in_one_thread_too(application: Application, inbox: Inbox, recorder: Recorder) -> None:
    with served(application) as url:
        orchestrate(url, UNFITTING_TASK)
        [received] = inbox.wait_for(1, 20)
    assert "send the task again" in contents([received])[0]
    road = [
        "drafting.py draft_request",
        "claude/questions.py answer",
        "drafting.py read_draft",
        "store/subagents.py build",
    ]
    assert in_order(recorder.calls, [*road, "store/jobs.py finish", "poke/api.py send"]) == []
    assert recorder.threads == {"http", "question"}  # its own, and the one that waits for Claude's API


def test_a_failure_reaches_the_person_and_the_next_request_is_served(application: Application, inbox: Inbox) -> None:
    with served(application) as url:
        orchestrate(url, POET_TASK, {"refusal": True})
        assert contents(inbox.wait_for(1, 20)) == [sentence(ErrorKind.REFUSAL)]
        orchestrate(url, POET_TASK, {"text": "The sea."})
        assert contents(inbox.wait_for(2, 20))[1:] == ["The sea."]


def test_no_thread_of_ours_is_started(application: Application) -> None:
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"dispatch", "heartbeat", "listen", "delivery"}


def test_without_its_database_it_says_so_at_start(api: MessagesApi, inbox: Inbox, empty_database_url: str) -> None:
    settings = settings_for(api, inbox, POKESTRATOR_INLINE="1")
    with (
        Forwarder(empty_database_url) as closed,
        pytest.raises(StoreUnavailable, match="refused"),
        running(settings, closed.url),
    ):
        pass
