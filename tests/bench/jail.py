"""What confining an agent adds to a run: milliseconds, processor time and memory. The two kinds of run take turns.

    .venv/bin/python -m tests.bench.jail

`bare` starts the CLI itself, as an owner would get it who allows agents everything; both go through the relay.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from pokestrator.claude import worker
from pokestrator.claude.confinement import Confinement, launcher
from pokestrator.claude.pool import Inline
from pokestrator.claude.probing import probe
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import RunEvent
from tests.bench.memory import memory_of
from tests.integration.agent_runs import agent_environment, agents, bash, scripted

ROUNDS = 20


@contextmanager
def bare(
    _confinement: Confinement, _folder: Path, program: Path, variables: Mapping[str, str], _seconds: float
) -> Iterator[tuple[Path, dict[str, str]]]:
    """In the place of the launcher: the CLI itself."""
    yield program, dict(variables)


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def measure(claude: Inline) -> tuple[float, float, float, float]:
    """One run with a command: milliseconds, ms of processor time, MB of the CLI and MB of this process."""
    megabytes: list[tuple[float, float]] = []

    def look(event: RunEvent) -> None:
        if event.kind == "tool":
            megabytes.append((memory_of(agents()[0])[1], memory_of(os.getpid())[1]))

    used, began = processor_seconds(), time.perf_counter()
    result = claude.run(scripted(bash("sleep 0.3"), {"text": "Done."}, timeout_seconds=60), look)
    taken = time.perf_counter() - began
    assert result.text == "Done.", result
    return 1000 * taken, 1000 * (processor_seconds() - used), *megabytes[0]


def main() -> None:
    print(probe())
    kinds = {"bare": bare, "confined": launcher}
    rows: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in kinds}
    with MessagesApi() as api:
        claude = Inline(agent_environment(api.url))
        for turn in range(ROUNDS + 1):
            for name, start in kinds.items():
                worker.launcher = start
                measured = measure(claude)
                if turn:  # the first warms up
                    rows[name].append(measured)
    print(f"medians of {ROUNDS} rounds {'ms':>6} {'CPU ms':>7} {'MB of the CLI':>14} {'MB of its slot':>15}")
    medians = {
        name: [statistics.median(column) for column in zip(*values, strict=True)] for name, values in rows.items()
    }
    for name, values in medians.items():
        print(f"{name:<20} {values[0]:>6.0f} {values[1]:>7.0f} {values[2]:>14.1f} {values[3]:>15.1f}")
    added = [confined - without for confined, without in zip(medians["confined"], medians["bare"], strict=True)]
    print(f"{'added':<20} {added[0]:>+6.0f} {added[1]:>+7.0f} {added[2]:>+14.1f} {added[3]:>+15.1f}")


if __name__ == "__main__":
    main()
