"""The door against too much: requests of an address, tasks of a caller, at a service of two workers."""

from __future__ import annotations

import http.client
import json
import re
import uuid
from collections.abc import Iterator

import pytest

from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.processes import eventually
from tests.integration.flow import job_row
from tests.integration.mcp_peer import JSON_HEADERS, rpc
from tests.security.attacks import attack
from tests.security.door import PATIENCE, Door, key_header, open_door

WORKERS = 2
REQUESTS = 40  # of one address in a minute, and in one worker
TASKS = 5
UNFINISHED = 3
HANGS = 'SCRIPT: [{"hang": 600}]'
Headers = http.client.HTTPMessage


@pytest.fixture(scope="module")
def door(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Door]:
    with open_door(
        postgres,
        migrated,
        WEB_CONCURRENCY=str(WORKERS),
        POKESTRATOR_REQUESTS_PER_MINUTE=str(REQUESTS),
        POKESTRATOR_TASKS_PER_MINUTE=str(TASKS),
        POKESTRATOR_UNFINISHED_TASKS=str(UNFINISHED),
    ) as opened:
        yield opened
        assert "Traceback" not in opened.service.log


def knock(door: Door, source: str, *, key: str | None) -> tuple[int, Headers, bytes]:
    """One ping from an address of this machine."""
    connection = http.client.HTTPConnection(*door.address, timeout=PATIENCE, source_address=(source, 0))
    headers = {name: str(value) for name, value in JSON_HEADERS}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        connection.request("POST", "/mcp", rpc("ping"), headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def flood(door: Door, source: str, *, key: str | None) -> tuple[list[int], Headers, bytes]:
    """Knock until it is enough: the statuses before, and the answer that said so."""
    before: list[int] = []
    while len(before) <= WORKERS * REQUESTS:
        status, headers, body = knock(door, source, key=key)
        if status == 429:
            return before, headers, body
        before.append(status)
    raise AssertionError(before)


def right_key() -> str:
    return key_header()[1].removeprefix(b"Bearer ").decode("latin-1")


@attack(
    "a flood of wrong keys", "401, then 429 with `Retry-After`; the owner's own requests are answered all the while"
)
@pytest.mark.parametrize("key", ["wrong", None])
def test_wrong_keys_use_up_nothing_of_the_right_one(door: Door, key: str | None) -> None:
    source = "127.0.0.2" if key else "127.0.0.3"
    before, headers, body = flood(door, source, key=key)
    assert set(before) == {401}
    assert len(before) >= REQUESTS
    assert 1 <= int(headers["Retry-After"]) <= 60
    assert b"Try again in" in body
    for _ in range(10):
        assert knock(door, source, key=right_key())[0] == 200


@attack("a flood of requests with the key, from one address", "429 that says how long to wait; others are served")
def test_more_requests_than_may_be_are_told_to_wait(door: Door) -> None:
    before, headers, body = flood(door, "127.0.0.4", key=right_key())
    assert set(before) == {200}
    assert len(before) >= REQUESTS
    told = f"Too many requests. Try again in {headers['Retry-After']} seconds."
    assert json.loads(body) == {"jsonrpc": "2.0", "id": None, "error": {"code": -32_000, "message": told}}
    assert knock(door, "127.0.0.5", key=right_key())[0] == 200
    assert door.healthz().status_code == 200


@attack("a flood of tasks of one caller", "a tool error with the limit and the time to wait; no row; others are served")
@pytest.mark.parametrize("caller", ["flooder", None])
def test_more_tasks_than_may_be_are_refused_and_not_stored(door: Door, caller: str | None) -> None:
    who = {"X_Poke_User_Id": caller} if caller else {}
    tasks = [f"Split a bill of 184.50 between 5 people {uuid.uuid4()}. {HANGS}" for _ in range(UNFINISHED + 1)]
    stored = door.tasks()
    answers = [door.orchestrate(task, **who) for task in tasks]
    assert ["isError" in each and each["isError"] for each in answers] == [False] * UNFINISHED + [True]
    assert answers[-1]["content"][0]["text"] == (
        f"Not accepted: {UNFINISHED} of this person's tasks are under way, and no more may be at once. "
        "Try again when one of them has ended."
    )
    assert door.tasks() == stored + UNFINISHED
    if caller:  # the same words again are the same task, and no new one
        assert door.orchestrate(tasks[0], **who)["structuredContent"]["duplicate"] is True
    assert "structuredContent" in door.orchestrate(
        "Split a bill of 90 between 3 people", X_Poke_User_Id=f"other-{caller}"
    )


def test_tasks_of_a_minute_are_counted_by_both_workers_together(door: Door) -> None:
    who = {"X_Poke_User_Id": "quick"}
    for number in range(TASKS):
        answer = door.orchestrate(f"Split a bill of 184.50 between 5 people {number}. {HANGS}", **who)
        request_id = uuid.UUID(answer["structuredContent"]["request_id"])
        door.orchestrate("", {"action": "cancel", "request_id": str(request_id)}, **who)
        assert eventually(lambda job=request_id: job_row(door.database_url, job)["finished_at"], 30)
    refused = door.orchestrate("Split a bill of 184.50 between 5 people once more", **who)
    assert refused["isError"]
    limit = f"Not accepted: at most {TASKS} tasks a minute are taken from one person. Try again in "
    assert re.fullmatch(re.escape(limit) + r"\d+ (second|minute)s?\.", refused["content"][0]["text"])
