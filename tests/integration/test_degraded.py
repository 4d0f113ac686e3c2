"""Without its database: down at boot, back again, lost later. A forwarder of ours plays the network in between."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.typing import EventDict

from pokestrator import bootstrap
from pokestrator import dispatcher as dispatcher_module
from pokestrator import service as service_module
from pokestrator.bootstrap import Application
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import StoreUnavailable, TryAgainLater
from pokestrator.intake import new_job
from pokestrator.jobs import JobState, NewJob
from pokestrator.runs import ErrorKind, sentence
from pokestrator.service import ACCEPTED, ACCEPTED_FROM_MEMORY, BUSY_WITHOUT_DATABASE
from pokestrator.settings import Settings
from pokestrator.web.app import create_app
from tests.integration.flow import (
    POET_TASK,
    TOKEN,
    UNFITTING_TASK,
    Borrowed,
    Forwarder,
    captured_logs,
    contents,
    eventually,
    job_row,
    outcome_of,
    rows,
    running,
    settings_for,
    task,
    write_template,
)

READY = "PostgreSQL initialized and subagents table is ready"


@pytest.fixture
def network(empty_database_url: str) -> Iterator[Forwarder]:
    """The way to an empty database, closed at first."""
    with Forwarder(empty_database_url) as network:
        yield network


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EventDict]]:
    with captured_logs(monkeypatch, dispatcher_module, service_module, bootstrap) as logs:
        yield logs


@pytest.fixture
def settings(api: MessagesApi, inbox: Inbox) -> Settings:
    return settings_for(api, inbox)


@pytest.fixture
def application(
    settings: Settings, logs: list[EventDict], network: Forwarder, slots: Slots, tmp_path: Path
) -> Iterator[Application]:
    folder = write_template(tmp_path / "templates")
    with running(settings, network.url, claude=Borrowed(slots), templates_folder=folder) as application:
        yield application


def health(application: Application) -> dict[str, Any]:
    response = create_app(application).test_client().get("/healthz")
    assert response.status_code == 200, "a host must not restart us for the database's sake"
    return dict(response.get_json())


def events(logs: list[EventDict]) -> list[str]:
    return [str(entry["event"]) for entry in logs]


def come_up(application: Application, network: Forwarder) -> None:
    network.open()
    assert eventually(lambda: application.degraded_because() is None, 10)


# down at boot ------------------------------------------------------------------------------------------------------


def test_it_starts_and_says_that_it_is_degraded_and_why(application: Application, logs: list[EventDict]) -> None:
    status = health(application)
    assert status["status"] == "degraded"
    assert status["why"].startswith("database: ")
    assert "refused" in status["why"]
    failures = [event for event in events(logs) if event.startswith("database init failed: ")]
    assert "refused" in failures[0]
    assert READY not in events(logs)


def test_the_mcp_handshake_and_the_tools_answer(application: Application) -> None:
    client = create_app(application).test_client()
    headers = {"Accept": "application/json, text/event-stream", "Host": "127.0.0.1"}
    handshake = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "1"},
    }
    for method, params, expected in (("initialize", handshake, "serverInfo"), ("tools/list", {}, "tools")):
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        response = client.post("/mcp", json=body, headers=headers)
        assert expected in response.get_json()["result"]


def test_a_task_that_a_template_fits_runs_from_memory_and_its_result_arrives(
    application: Application, inbox: Inbox
) -> None:
    started = time.monotonic()
    acknowledgement = application.accept(task(POET_TASK, {"text": "From memory."}, inbox=inbox))
    assert time.monotonic() - started < 2
    assert (acknowledgement.durable, acknowledgement.message) == (False, ACCEPTED_FROM_MEMORY)
    [received] = inbox.wait_for(1, 15)
    assert received.body == {"content": "From memory.", "hasMore": False}
    assert received.headers["authorization"] == f"Bearer {TOKEN}"


def test_a_call_that_comes_again_while_its_task_runs_from_memory_is_not_run_twice(
    application: Application, inbox: Inbox
) -> None:
    steps = {"text": "From memory, once.", "delay": 1}
    first, again = (new_job(POET_TASK, f"SCRIPT: {json.dumps([steps])}", caller="u-1") for _ in range(2))
    acknowledged = [application.accept(first), application.accept(again)]
    assert [ack.request_id for ack in acknowledged] == [first.id, first.id]
    assert [(ack.durable, ack.duplicate) for ack in acknowledged] == [(False, False), (False, True)]
    assert len(inbox.wait_for(1, 25)) == 1
    assert len(inbox.wait_for(2, 2)) == 1
    # Once it has ended, the same words are a new task.
    assert application.accept(new_job(POET_TASK, first.metadata, caller="u-1")).duplicate is False


def test_a_result_from_memory_is_tried_again(
    application: Application, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pokestrator.schedule.WAITS", (0.1, 0.1, 0.1))
    inbox.answer_with([{"status": 500}, {"close": True}])
    application.accept(task(POET_TASK, {"text": "From memory."}))
    received = inbox.wait_for(3, 15)
    assert contents(received) == ["From memory."] * 3
    assert len({each.headers["idempotency-key"] for each in received}) == 1


def test_a_task_that_no_template_fits_is_told_so(application: Application, inbox: Inbox) -> None:
    assert not application.accept(task(UNFITTING_TASK)).durable
    assert contents(inbox.wait_for(1, 15)) == [sentence(ErrorKind.NOT_STORED)]


def test_with_all_slots_busy_callers_are_told_to_try_again(
    application: Application, api: MessagesApi, inbox: Inbox
) -> None:
    seen = len(api.requests)
    for _ in range(2):
        # Longer than three accepts wait for a connection (WAIT_FOR_CONNECTION_SECONDS each).
        application.accept(task(POET_TASK, {"text": "Slow.", "delay": 6}))
    with pytest.raises(TryAgainLater, match=BUSY_WITHOUT_DATABASE[:20]):
        application.accept(task(POET_TASK, {"text": "One too many."}))
    assert contents(inbox.wait_for(2, 15)) == ["Slow.", "Slow."]
    assert len(api.requests) == seen + 2


# and back ----------------------------------------------------------------------------------------------------------


def test_when_the_database_comes_it_recovers_by_itself(
    application: Application, network: Forwarder, logs: list[EventDict], inbox: Inbox, empty_database_url: str
) -> None:
    assert application.degraded_because() is not None
    come_up(application, network)
    assert events(logs).count(READY) == 1
    assert health(application)["status"] == "ok"
    job = task(POET_TASK, {"text": "Stored."})
    acknowledgement = application.accept(job)
    assert (acknowledgement.durable, acknowledgement.message) == (True, ACCEPTED)
    assert contents(inbox.wait_for(1, 15)) == ["Stored."]
    assert eventually(lambda: job_row(empty_database_url, job.id)["state"] == "succeeded")


def test_after_a_longer_outage_it_is_whole_within_seconds(
    application: Application, network: Forwarder, empty_database_url: str
) -> None:
    # The pool must not sit out the long waits that it has come to between its own tries.
    deadline = time.monotonic() + 9
    eventually(lambda: time.monotonic() > deadline, 10)
    network.open()
    opened = time.monotonic()
    assert eventually(lambda: application.degraded_because() is None, 20)
    assert application.accept(task(POET_TASK, {"text": "Stored."})).durable
    assert time.monotonic() - opened < 5  # the next of those tries comes 6 s after


def test_a_database_that_is_lost_later_is_told_and_comes_back(
    application: Application, network: Forwarder, logs: list[EventDict], inbox: Inbox, empty_database_url: str
) -> None:
    come_up(application, network)
    network.close()
    assert eventually(lambda: application.degraded_because() is not None, 10)
    assert health(application)["status"] == "degraded"
    assert "database_lost" in events(logs)
    assert not application.accept(task(POET_TASK, {"text": "From memory."})).durable
    assert contents(inbox.wait_for(1, 15)) == ["From memory."]
    come_up(application, network)
    assert health(application)["status"] == "ok"
    assert "database_back" in events(logs)
    stored: list[NewJob] = []

    def is_stored() -> bool:
        job = task(POET_TASK, {"text": "Stored."})  # a new one: what could not be stored runs from memory
        with suppress(TryAgainLater):
            stored.extend([job] if application.accept(job).durable else [])
        return bool(stored)

    assert eventually(is_stored, 10)
    assert outcome_of(application, stored[0]).state is JobState.SUCCEEDED
    assert eventually(lambda: str(stored[0].id) in [each.body["request_id"] for each in inbox.received])


def test_a_run_that_goes_on_through_an_outage_ends_once_and_is_delivered_once(
    application: Application, network: Forwarder, api: MessagesApi, inbox: Inbox, empty_database_url: str
) -> None:
    come_up(application, network)
    seen = len(api.requests)
    job = task(POET_TASK, {"text": "Through it all.", "delay": 2})
    assert application.accept(job).durable
    assert eventually(lambda: len(api.requests) > seen, 10)
    network.close()
    assert eventually(lambda: application.degraded_because() is not None, 10)
    come_up(application, network)
    assert contents(inbox.wait_for(1, 20)) == ["Through it all."]
    row = eventually(lambda: _ended(empty_database_url, job.id), 10)
    assert (row["state"], row["claim_seq"], row["interruptions"]) == ("succeeded", 1, 0)
    assert len(api.requests) == seen + 1


def _ended(url: str, job_id: Any) -> dict[str, Any] | None:
    row = job_row(url, job_id)
    return row if row["finished_at"] else None


# the answer to a COMMIT is lost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_was_lost_is_stored_once_and_never_run_from_memory(
    application: Application,
    network: Forwarder,
    inbox: Inbox,
    empty_database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    committed: bool,
) -> None:
    come_up(application, network)
    insert = application.jobs.insert
    tries = []

    def lost_once(job: Any, within: float) -> Any:
        tries.append(job.id)
        stored = insert(job, within) if committed or len(tries) > 1 else None
        if len(tries) == 1:
            raise StoreUnavailable("the connection was lost", maybe_committed=True)
        return stored

    monkeypatch.setattr(application.jobs, "insert", lost_once)
    job = task(POET_TASK, {"text": "Once."})
    assert application.accept(job).durable
    assert contents(inbox.wait_for(1, 15)) == ["Once."]
    assert len(rows(empty_database_url, "SELECT id FROM jobs")) == 1


def test_a_database_that_is_only_busy_is_not_taken_for_away(
    application: Application, network: Forwarder, api: MessagesApi, empty_database_url: str
) -> None:
    come_up(application, network)
    seen = len(api.requests)
    job = new_job(POET_TASK, caller="u-1")
    assert job.idempotency is not None
    with psycopg.connect(empty_database_url) as another:
        # As if another instance were storing the same call.
        another.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [job.idempotency.key])
        with pytest.raises(TryAgainLater, match="busy"):
            application.accept(job)
    assert len(api.requests) == seen


def test_a_commit_that_cannot_be_settled_is_refused(
    application: Application, network: Forwarder, inbox: Inbox, api: MessagesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_up(application, network)
    seen = len(api.requests)

    def lost(*_: Any) -> None:
        raise StoreUnavailable("the connection was lost", maybe_committed=True)

    monkeypatch.setattr(application.jobs, "insert", lost)
    with pytest.raises(TryAgainLater):
        application.accept(task(POET_TASK, {"text": "Never."}))
    assert inbox.received == []
    assert len(api.requests) == seen


def test_a_call_that_comes_again_while_it_may_be_stored_is_not_run_from_memory(
    application: Application, network: Forwarder, inbox: Inbox, api: MessagesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_up(application, network)
    seen = len(api.requests)
    call, again, another = (new_job(POET_TASK, {"idempotency_key": key}) for key in ("one", "one", "two"))
    insert = application.jobs.insert

    def lost(job: Any, *_: Any) -> None:
        raise StoreUnavailable("the connection was lost", maybe_committed=job is call)

    monkeypatch.setattr(application.jobs, "insert", lost)
    for sent in (call, again):
        with pytest.raises(TryAgainLater, match="may run or may not"):
            application.accept(sent)
    assert application.accept(another).durable is False  # of this one it is known that it is not stored
    assert len(inbox.wait_for(1, 25)) == 1
    assert len(api.requests) == seen + 1
    monkeypatch.setattr(application.jobs, "insert", insert)
    assert application.accept(again).durable


def test_a_slow_database_that_has_failed_once_is_used_again(
    application: Application, network: Forwarder, monkeypatch: pytest.MonkeyPatch
) -> None:
    come_up(application, network)
    insert, tries = application.jobs.insert, []

    def slow(job: NewJob, within: float) -> Any:
        tries.append(within)
        if len(tries) == 1 or within < service_module.ACCEPT_SECONDS:
            raise StoreUnavailable(f"PostgreSQL did not answer within {within:g} s")
        return insert(job, within)

    monkeypatch.setattr(application.jobs, "insert", slow)
    monkeypatch.setattr(application.dispatcher, "submit_from_memory", lambda _: True)

    def is_stored() -> bool:
        time.sleep(0.2)  # others come more often than impatience lasts
        return application.accept(task()).durable

    assert eventually(is_stored, 15), tries
