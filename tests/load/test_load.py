"""Sixteen threads send two hundred tasks to the real gunicorn, whose agents are real CLIs; nothing is sent to Poke."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psycopg
import requests

from pokestrator.demo.local import LocalService
from tests.acceptance.conftest import inbox, messages_api, service_environment  # noqa: F401  fixtures
from tests.acceptance.processes import children, eventually, living, sockets, threads
from tests.no_limits import NO_LIMITS

CLIENTS = 16
WAVES = 2
TASKS_IN_A_WAVE = 100
WAVE_SECONDS = 240.0  # generous: about a second of CPU a job, and the machine may be busy


@dataclass(frozen=True)
class Held:
    """What the worker process holds while it is idle."""

    threads: int
    sockets: int
    children: int
    connections: int


def test_two_hundred_tasks_from_sixteen_threads_are_all_recorded_and_nothing_is_left_over(
    service_environment: dict[str, str],  # noqa: F811
    database_url: str,
) -> None:
    marker = f"load-{uuid.uuid4().hex}"
    environment = {**service_environment, **NO_LIMITS, "POKE_DRY_RUN": "1", "LANG": marker}
    acknowledged: list[str] = []
    held: list[Held] = []
    with LocalService(environment) as service:
        key = service_environment["POKESTRATOR_API_KEY"]
        for wave in range(WAVES):
            tasks = [f"Split {wave}{number:03}.50 between 5 people with a tip" for number in range(TASKS_IN_A_WAVE)]
            acknowledged += send_all(service.url, key, tasks)
            total = (wave + 1) * TASKS_IN_A_WAVE
            assert eventually(lambda n=total: ended(database_url) == n, WAVE_SECONDS), ended(database_url)
            assert eventually(lambda n=total: delivered(database_url) == n, 30), delivered(database_url)
            held.append(held_by(service, database_url))
    assert len(set(acknowledged)) == WAVES * TASKS_IN_A_WAVE
    assert recorded(database_url) == set(acknowledged)
    first, second = held
    # Pools grow to their size in the first wave; the second one must find all it needs.
    assert second.threads <= first.threads
    assert second.sockets <= first.sockets
    assert second.children == first.children
    assert second.connections <= 5 + 3
    assert eventually(lambda: not living(marker)), living(marker)
    assert eventually(lambda: connections(database_url) == 0), connections(database_url)


def send_all(url: str, key: str, tasks: list[str]) -> list[str]:
    """Send each task from one of CLIENTS threads, as Poke's client frames it; returns the request ids."""

    def send(task: str) -> str:
        body = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "orchestrate", "arguments": {"task_description": task}},
        }
        headers = {
            "Authorization": f"Bearer {key}",
            "Accept": "application/json, text/event-stream",
            "MCP-Protocol-Version": "2025-06-18",
        }
        result = requests.post(url, json=body, headers=headers, timeout=30).json()["result"]
        while result.get("isError"):  # a machine that is too slow to store it within a second says so: then again
            assert "ry again" in result["content"][0]["text"], result
            result = requests.post(url, json=body, headers=headers, timeout=30).json()["result"]
        ack = result["structuredContent"]
        assert ack["status"] == "accepted"
        assert "durable" not in ack
        request_id: str = ack["request_id"]
        return request_id

    with ThreadPoolExecutor(CLIENTS) as clients:
        return list(clients.map(send, tasks))


def held_by(service: LocalService, database_url: str) -> Held:
    [worker] = children(service.pid)
    # Closed connections of the clients leave the worker's table a moment after their answers.
    eventually(lambda: sockets(worker) <= 5 + 3 + 8, 10)
    return Held(threads(worker), sockets(worker), len(children(worker)), connections(database_url))


def recorded(database_url: str) -> set[str]:
    with psycopg.connect(database_url) as connection:
        return {str(row[0]) for row in connection.execute("SELECT id FROM jobs WHERE state = 'succeeded'")}


def ended(database_url: str) -> int:
    return count(database_url, "SELECT count(*) FROM jobs WHERE finished_at IS NOT NULL")


def delivered(database_url: str) -> int:
    return count(database_url, "SELECT count(*) FROM callbacks WHERE state = 'delivered'")


def connections(database_url: str) -> int:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    return count(database_url, query)


def count(database_url: str, query: str) -> int:
    with psycopg.connect(database_url) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])
