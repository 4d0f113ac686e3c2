"""Resident and proportional memory of the master, the worker and an idle slot, and of a running agent.

    .venv/bin/python -m tests.bench.memory

Resident counts shared pages in full; proportional divides them among those who share them.
"""

from __future__ import annotations

from pathlib import Path

import requests

from tests.acceptance.processes import children, eventually
from tests.bench.stand import orchestrate, running_service


def memory_of(pid: int) -> tuple[float, float]:
    """(resident, proportional) in MB."""
    values = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, *_ = line.split()
        values[name] = int(amount) / 1024
    return values["Rss:"], values["Pss:"]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def show(what: str, pid: int) -> None:
    resident, proportional = memory_of(pid)
    print(f"{what:<16} {resident:>8.0f} {proportional:>8.0f}")


def main() -> None:
    with running_service(POKESTRATOR_CONCURRENCY="1", LOG_LEVEL="WARNING") as stand, requests.Session() as session:
        # A first job warms everything up; the second is held while it is looked at.
        orchestrate(session, stand.service.url, "Split 184.50 between 5 people with a 20% tip")
        stand.inbox.wait_for(1, 60)
        master = stand.service.pid
        [worker] = children(master)
        slot = next(pid for pid in children(worker) if "spawn_main" in command_of(pid))
        print(f"{'MB':<16} {'resident':>8} {'proport.':>8}")
        show("master", master)
        show("worker", worker)
        show("idle slot", slot)
        asked = len(stand.messages_api.requests)
        orchestrate(session, stand.service.url, 'hold SCRIPT:[{"hang": 600}]')
        eventually(lambda: len(stand.messages_api.requests) > asked, 30)
        show("running CLI", children(slot)[0])


if __name__ == "__main__":
    main()
