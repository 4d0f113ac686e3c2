"""SIGTERM: no new claims, time for runs to end, the rest handed over, nobody's request dropped, nothing left behind."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests

from pokestrator.intake import new_job
from pokestrator.jobs import RAN_AGAIN
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.acceptance.pair import DRAIN_SECONDS, HANGS_ONCE, TASK, Answer, Pair, call, pair_on, posts, scripted
from tests.acceptance.processes import backlog, eventually, is_pending, is_read, living
from tests.chaos.instance import Instance
from tests.integration.flow import rows

CLAIMS_END_SECONDS = 1.0
HANDED_OVER_SECONDS = 5.0
GRACEFUL_TIMEOUT = DRAIN_SECONDS + 10  # gunicorn.conf.py; at its end the master kills the worker
TASKS = 60
MOST_TASKS = 100
SENDERS = 6
PAUSE_SECONDS = 0.33  # between two tasks; beyond TASKS, where the restarts take longer than that, 1 s


@pytest.fixture(scope="module")
def pair_of_module(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Pair]:
    with pair_on(postgres, migrated) as opened:
        yield opened


@pytest.fixture
def pair(pair_of_module: Pair) -> Pair:
    pair_of_module.start_missing()
    return pair_of_module


def connect(instance: Instance) -> socket.socket:
    parts = urlsplit(instance.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def send_past_the_door(pair: Pair) -> uuid.UUID:
    """Queue a task by the store alone, as any other instance would."""
    database = Database(pair.database_url)
    database.open()
    try:
        return Jobs(database).insert(new_job(TASK, scripted()))
    finally:
        database.close()


def test_sigterm_lets_a_run_end_hands_another_over_and_leaves_no_process(pair: Pair) -> None:
    ends, hangs = pair.send_to_run(
        pair.a, [{"delay": 2, "text": "The payouts are in."}], [HANGS_ONCE, {"text": "The balance is in."}]
    )
    leaving = pair.a.worker()
    with connect(pair.a) as slow:
        slow.sendall(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\n")  # and never any more
        assert eventually(lambda: is_read(slow))  # by a thread that now waits for the rest
        with pair.held_back(pair.b):
            pair.a.service.terminate()
            told = time.time()
            waits = send_past_the_door(pair)  # A will have a free slot, and nobody else is awake
            assert eventually(lambda: posts(pair.inbox, ends), 10), pair.story(ends)
            threading.Event().wait(max(0.0, told + 3 - time.time()))
        assert is_refused(pair.a)  # who comes now must be free to go elsewhere at once
        assert eventually(lambda: not living(pair.marker(pair.a)), GRACEFUL_TIMEOUT + 5), living(pair.marker(pair.a))
        gone = time.time()
    assert gone - told < GRACEFUL_TIMEOUT
    assert pair.a.service.stop() == 0
    claims = "SELECT extract(epoch FROM at)::float8 AS at FROM job_events WHERE kind = 'claimed' AND text LIKE %s"
    late = [each["at"] - told for each in rows(pair.database_url, claims, f"by %:{leaving}:%")]
    assert [seconds for seconds in late if seconds > CLAIMS_END_SECONDS] == []

    assert pair.delivered(ends) == "The payouts are in."
    assert pair.delivered(hangs) == f"The balance is in.\n\n{RAN_AGAIN}"
    [released] = pair.events(hangs, "released")
    _, taken = pair.events(hangs, "claimed")
    assert released["at"] - told >= DRAIN_SECONDS
    assert taken["at"] - released["at"] < HANDED_OVER_SECONDS
    assert (pair.row(hangs)["runs"], pair.row(hangs)["interruptions"]) == (2, 0)
    pair.delivered(waits)


def test_a_worker_whose_master_was_killed_leaves_as_if_it_had_been_told_to(pair: Pair) -> None:
    [hangs] = pair.send_to_run(pair.a, [HANGS_ONCE, {"text": "The balance is in."}])
    with connect(pair.a) as slow:
        slow.sendall(b"POST /mcp HTTP/1.1\r\n")
        assert eventually(lambda: is_read(slow))
        os.kill(pair.a.service.pid, signal.SIGKILL)
        killed = time.time()
        assert eventually(lambda: is_refused(pair.a), CLAIMS_END_SECONDS + 2)  # its port is free for a new one
        assert eventually(lambda: not living(pair.marker(pair.a)), GRACEFUL_TIMEOUT), living(pair.marker(pair.a))
    assert pair.delivered(hangs) == f"The balance is in.\n\n{RAN_AGAIN}"
    [released] = pair.events(hangs, "released")
    assert released["at"] - killed >= DRAIN_SECONDS
    assert pair.row(hangs)["interruptions"] == 0


def is_refused(instance: Instance) -> bool:
    try:
        connect(instance).close()
    except ConnectionRefusedError:
        return True
    return False


def test_what_waits_in_the_backlog_at_sigterm_is_answered(pair: Pair) -> None:
    worker, port = pair.a.worker(), urlsplit(pair.a.url).port
    assert worker is not None and port is not None
    with ThreadPoolExecutor(8) as senders:
        os.kill(worker, signal.SIGSTOP)  # so that it accepts none of them before the signal
        try:
            calls = [senders.submit(call, pair.a.url, scripted(), within=90) for _ in range(8)]
            assert eventually(lambda: backlog(port) == 8, 30), backlog(port)
            pair.a.service.terminate()
            told = eventually(lambda: is_pending(worker, signal.SIGTERM), 30)
            assert told, [Path(f"/proc/{pid}/status").read_text() for pid in (pair.a.service.pid, worker)]
        finally:
            os.kill(worker, signal.SIGCONT)
        answers = [each.result() for each in calls]
    assert all(each.is_accepted for each in answers), answers
    assert pair.a.service.stop() == 0
    for each in answers:
        pair.delivered(each.request_id, 60)


def test_a_rolling_restart_under_load_fails_no_call_and_delivers_each_task_once(pair: Pair) -> None:
    numbers, restarted, began = itertools.count(), threading.Event(), time.monotonic()

    def send_steadily() -> list[Answer]:
        answers = []
        while (number := next(numbers)) < MOST_TASKS and not (number >= TASKS and restarted.is_set()):
            threading.Event().wait(max(0.0, began + due(number) - time.monotonic()))
            answers.append(send_somewhere(pair, number))
        return answers

    with ThreadPoolExecutor(SENDERS) as senders:
        sending = [senders.submit(send_steadily) for _ in range(SENDERS)]
        try:
            for instance in (pair.a, pair.b):
                assert eventually(partial(took_tasks, instance), 60)
                assert instance.service.stop() == 0
                pair.start(instance)
                assert eventually(instance.healthy, 30), instance.log
        finally:
            restarted.set()
        answers = [answer for each in sending for answer in each.result()]
    assert len(answers) >= TASKS
    assert [each for each in answers if not each.is_accepted or "durable" in each.fields] == []
    wanted = {str(each.request_id) for each in answers}
    assert len(wanted) == len(answers)
    assert eventually(lambda: wanted <= came(pair).keys(), 180), wanted - came(pair).keys()
    assert {request_id: times for request_id, times in came(pair).items() if times > 1} == {}


def due(number: int) -> float:
    """Seconds after which a task is sent."""
    return number * PAUSE_SECONDS + max(0, number - TASKS) * (1 - PAUSE_SECONDS)


def took_tasks(instance: Instance) -> bool:
    """Whether the instance, as it was started last, has accepted some tasks and is running one."""
    return instance.service.log.count('"event": "accepted"') >= 3 and bool(instance.agents())


def send_somewhere(pair: Pair, number: int) -> Answer:
    """Hand a task to the first instance that takes the connection."""
    for instance in (pair.a, pair.b) if number % 2 else (pair.b, pair.a):
        try:
            return call(instance.url, scripted())
        except requests.ConnectionError as error:
            if "Connection refused" not in str(error):
                raise
    raise AssertionError("nobody listens")


def came(pair: Pair) -> Counter[str]:
    """How many messages came about each job."""
    return Counter(str(each.body.get("request_id")) for each in pair.inbox.received)
