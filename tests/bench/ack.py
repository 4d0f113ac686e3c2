"""Milliseconds until a task is acknowledged, at 1 and at 16 clients, beside two floors of the same run.

    .venv/bin/python -m tests.bench.ack

The floors: GET /healthz (HTTP alone) and one INSERT and COMMIT of a job from here (PostgreSQL alone). A job that
hangs holds the only slot, so that no agent runs while it is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import requests

from pokestrator.intake import new_job
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.bench.stand import orchestrate, percentiles, running_service

CALLS = 800
Call = Callable[[requests.Session], object]


def measure(call: Call, clients: int) -> tuple[float, float]:
    """(p50, p99) in milliseconds of CALLS calls from `clients` threads, each with a connection of its own."""

    def client(calls: int) -> list[float]:
        taken = []
        with requests.Session() as session:
            call(session)  # connect
            for _ in range(calls):
                started = time.perf_counter()
                call(session)
                taken.append(1000 * (time.perf_counter() - started))
        return taken

    with ThreadPoolExecutor(clients) as pool:
        shares = pool.map(client, [CALLS // clients] * clients)
    return percentiles([milliseconds for share in shares for milliseconds in share])


def main() -> None:
    with running_service(POKESTRATOR_CONCURRENCY="1", POKE_DRY_RUN="1", LOG_LEVEL="WARNING") as stand:
        url = stand.service.url
        with requests.Session() as session:
            orchestrate(session, url, 'hold the slot SCRIPT:[{"hang": 600}]')
        stand.messages_api.wait_for_requests(1, 30)
        database = Database(stand.database_url, min_size=1, max_size=16)
        database.open()
        jobs = Jobs(database)
        calls: dict[str, Call] = {
            "orchestrate": lambda session: orchestrate(session, url, "split 184.50 between 5 people"),
            "healthz": lambda session: session.get(url.replace("/mcp", "/healthz"), timeout=30),
            "commit": lambda _: jobs.insert(new_job("split 184.50 between 5 people")),
        }
        print(f"{'clients':>7}  {'call':<12} {'p50 ms':>8} {'p99 ms':>8}   times healthz (p50)")
        for clients in (1, 16):
            taken = {name: measure(call, clients) for name, call in calls.items()}
            for name, (p50, p99) in taken.items():
                print(f"{clients:>7}  {name:<12} {p50:>8.1f} {p99:>8.1f}   {p50 / taken['healthz'][0]:>6.1f}")
        database.close()


if __name__ == "__main__":
    main()
