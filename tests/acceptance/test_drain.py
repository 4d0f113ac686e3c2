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
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import requests

from pokestrator.intake import new_job
from pokestrator.jobs import RAN_AGAIN
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.acceptance.pair import DRAIN_SECONDS, HANGS_ONCE, KEY, TASK, Pair, call, pair_on, posts, scripted
from tests.acceptance.processes import eventually, living
from tests.chaos.instance import Instance
from tests.integration.flow import rows

CLAIMS_END_SECONDS = 1.0
HANDED_OVER_SECONDS = 5.0
GRACEFUL_TIMEOUT = DRAIN_SECONDS + 10  # gunicorn.conf.py; at its end the master kills the worker
TASKS = 60
MOST_TASKS = 150
SENDERS = 6


@pytest.fixture(scope="module")
def pair_of_module(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Pair]:
    with pair_on(postgres, migrated) as opened:
        yield opened


@pytest.fixture
def pair(pair_of_module: Pair) -> Pair:
    pair_of_module.start_missing()
    return pair_of_module


@contextmanager
def connection(instance: Instance) -> Iterator[socket.socket]:
    parts = urlsplit(instance.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as opened:
        yield opened


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
    with connection(pair.a) as slow:
        slow.sendall(b"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1\r\n")  # and never any more
        assert eventually(lambda: is_being_read(slow))
        with pair.held_back(pair.b):
            pair.a.service.terminate()
            told = time.time()
            waits = [send_past_the_door(pair) for _ in range(2)]  # nobody but A could claim these, and it has a free slot
            assert eventually(lambda: posts(pair.inbox, ends), 10), pair.story(ends)
            threading.Event().wait(max(0.0, told + 3 - time.time()))
        with pytest.raises(ConnectionRefusedError), connection(pair.a):
            """Who comes now must be free to go elsewhere at once."""
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
    assert DRAIN_SECONDS <= released["at"] - told
    assert taken["at"] - released["at"] < HANDED_OVER_SECONDS
    assert (pair.row(hangs)["runs"], pair.row(hangs)["interruptions"]) == (2, 0)
    for each in waits:
        pair.delivered(each)


def is_being_read(client: socket.socket) -> bool:
    """Whether the service has taken everything that was sent on this connection."""
    own = "%02X%02X%02X%02X:%04X" % (1, 0, 0, 127, client.getpeername()[1])
    mine = "%02X%02X%02X%02X:%04X" % (1, 0, 0, 127, client.getsockname()[1])
    with open("/proc/net/tcp", encoding="ascii") as table:
        lines = [line.split() for line in table]
    return any(line[1] == own and line[2] == mine and line[4].endswith(":00000000") for line in lines)


def test_what_waits_in_the_backlog_at_sigterm_is_answered(pair: Pair) -> None:
    worker = pair.a.worker()
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)  # so that it accepts none of them before the signal
    with ThreadPoolExecutor(8) as senders:
        calls = [senders.submit(call, pair.a.url, scripted()) for _ in range(8)]
        assert eventually(lambda: backlog(pair.a) == 8), backlog(pair.a)
        pair.a.service.terminate()
        assert eventually(lambda: has_pending_sigterm(worker))
        os.kill(worker, signal.SIGCONT)
        answers = [each.result() for each in calls]
    assert all(each.is_accepted for each in answers), answers
    assert pair.a.service.stop() == 0
    for each in answers:
        pair.delivered(each.request_id, 60)


def backlog(instance: Instance) -> int:
    """Connections that the kernel has taken for the service, and the service has not."""
    own = "%02X%02X%02X%02X:%04X" % (1, 0, 0, 127, urlsplit(instance.url).port or 0)
    with open("/proc/net/tcp", encoding="ascii") as table:
        lines = [line.split() for line in table]
    return sum(int(line[4].split(":")[1], 16) for line in lines if line[1] == own and line[3] == "0A")


def has_pending_sigterm(pid: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        [pending] = [int(line.split()[1], 16) for line in status if line.startswith("ShdPnd")]
    return bool(pending & 1 << (signal.SIGTERM - 1))
