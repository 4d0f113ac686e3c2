"""One instance with a PostgreSQL of its own that is killed, and one that is frozen: no call hangs, no task is lost."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import LocalService
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.jobs import RAN_AGAIN
from tests.acceptance.pair import Answer, call, environment, posts, scripted
from tests.acceptance.processes import eventually
from tests.integration.flow import job_row
from tests.integration.freezing import FreezablePostgres

ANSWER_SECONDS = 2.5  # 2 s to decide, and HTTP on a busy machine
BACK_SECONDS = 10.0  # after the database's return, everything goes on
REVIVED_SECONDS = 20.0
FROZEN_SECONDS = 12.0


@dataclass
class Alone:
    """One instance whose database is embedded; `postgres` reaches that past the service."""

    service: LocalService
    postgres: FreezablePostgres
    folder: Path
    inbox: Inbox
    api: MessagesApi

    def send(self, **step: object) -> Answer:
        return call(self.service.url, scripted(*([step] if step else [])))

    def is_whole(self) -> bool:
        answer = requests.get(self.service.url.replace("/mcp", "/healthz"), timeout=5)
        return bool(answer.json()["status"] == "ok")

    def messages(self, request_id: uuid.UUID, timeout: float) -> list[str]:
        """What the person was told of a job, once something has come."""
        eventually(lambda: posts(self.inbox, request_id), timeout)
        return [each.body["message"] for each in posts(self.inbox, request_id)]


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with ExitStack() as stack:
        # Not under pytest's own folder: PostgreSQL's user must reach it.
        temporary = tempfile.TemporaryDirectory(prefix="pokestrator-outage-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary)) / "data"
        inbox = stack.enter_context(Inbox())
        api = stack.enter_context(MessagesApi())
        service = stack.enter_context(LocalService(environment(inbox, api, folder)))
        postgres = FreezablePostgres(folder)
        stack.callback(postgres.leave)
        opened = Alone(service, postgres, folder, inbox, api)
        assert eventually(opened.is_whole, 30), service.log
        yield opened


def test_a_killed_embedded_postgresql_is_started_again_and_no_task_is_lost(alone: Alone) -> None:
    before = alone.send(delay=5, text="The payouts are in.")
    assert alone.api.wait_for_requests(1, 30)
    os.kill(postmaster(alone.folder), signal.SIGKILL)
    killed = time.monotonic()
    meanwhile: list[Answer] = []
    while not meanwhile or not is_durable(meanwhile[-1]):
        assert time.monotonic() - killed < REVIVED_SECONDS, alone.service.log
        meanwhile.append(alone.send())
        threading.Event().wait(0.2)  # a person does not send faster
    assert max(each.seconds for each in meanwhile) < ANSWER_SECONDS
    assert [each.text for each in meanwhile if not each.is_accepted and "again" not in each.text] == []
    assert eventually(alone.is_whole, BACK_SECONDS), alone.service.log
    after = alone.send()
    assert is_durable(after)
    for each in [before, *meanwhile, after]:
        if each.is_accepted:
            assert len(alone.messages(each.request_id, 40)) == 1, (each, alone.service.log)
    assert alone.messages(before.request_id, 0) == ["The payouts are in."]
    job = job_row(alone.postgres.url, before.request_id)
    assert (job["state"], job["runs"], job["interruptions"]) == ("succeeded", 1, 0)


def test_with_a_frozen_postgresql_every_call_is_answered_and_what_was_accepted_is_delivered(alone: Alone) -> None:
    asked = len(alone.api.requests)
    before = alone.send(delay=4, text="The payouts are in.")
    assert is_durable(before)
    assert eventually(lambda: len(alone.api.requests) > asked, 30)
    with ThreadPoolExecutor(10) as senders, alone.postgres.frozen():
        frozen = time.monotonic()
        calls = [senders.submit(alone.send) for _ in range(10)]
        answers = [each.result() for each in calls]
        threading.Event().wait(max(0.0, frozen + FROZEN_SECONDS - time.monotonic()))
    thawed = time.monotonic()
    assert max(each.seconds for each in answers) < ANSWER_SECONDS, [each.seconds for each in answers]
    assert eventually(alone.is_whole, BACK_SECONDS), alone.service.log
    after = alone.send()
    assert is_durable(after)
    assert alone.messages(after.request_id, BACK_SECONDS)
    assert time.monotonic() - thawed < BACK_SECONDS
    accepted = [each for each in answers if each.is_accepted]
    assert [each.text for each in answers if each not in accepted and "again" not in each.text] == []
    for each in [before, *accepted, after]:
        [message] = alone.messages(each.request_id, 30)
        assert RAN_AGAIN not in message


def is_durable(answer: Answer) -> bool:
    return answer.is_accepted and answer.fields.get("durable") is not False


def postmaster(folder: Path) -> int:
    return int((folder / "postgres" / "postmaster.pid").read_text(encoding="utf-8").split()[0])
