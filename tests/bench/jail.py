"""What confining an agent adds to a run: milliseconds, processor time and memory. The two kinds of run take turns.

    .venv/bin/python -m tests.bench.jail

`bare` starts the CLI itself; both go through the relay. On a busy machine a run's time says little: so there is also
what it takes to start a program that does nothing, in the jail and out of it.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pokestrator.claude import worker
from pokestrator.claude.confinement import FOLDERS, Confinement, launcher
from pokestrator.claude.pool import Inline
from pokestrator.claude.probing import probe
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import RunEvent
from tests.bench.memory import memory_of
from tests.integration.agent_runs import agent_environment, agents, bash, scripted

ROUNDS = 20
STARTS = 60

Launcher = Callable[..., AbstractContextManager[tuple[Path, dict[str, str]]]]


@contextmanager
def bare(
    _confinement: Confinement, _folder: Path, program: Path, variables: Mapping[str, str], _seconds: float
) -> Iterator[tuple[Path, dict[str, str]]]:
    """In the place of the launcher: the program itself."""
    yield program, dict(variables)


KINDS: dict[str, Launcher] = {"bare": bare, "confined": launcher}


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def start(launch: Launcher) -> tuple[float, float]:
    """Start a program that does nothing: milliseconds, and ms of processor time."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        for each in FOLDERS:
            (Path(name) / each).mkdir()
        variables = {"PATH": os.defpath, "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
        used, began = processor_seconds(), time.perf_counter()
        with launch(probe(), Path(name), Path("/bin/true"), variables, 60) as (program, environment):
            subprocess.run([program], env=environment, cwd=Path(name) / "work", check=True)
        return 1000 * (time.perf_counter() - began), 1000 * (processor_seconds() - used)


def run(claude: Inline) -> tuple[float, float, float, float]:
    """One run with a command: milliseconds, ms of processor time, MB of the CLI, MB of the process that runs it."""
    megabytes: list[tuple[float, float]] = []

    def look(event: RunEvent) -> None:
        if event.kind == "tool":
            megabytes.append((memory_of(agents()[0])[1], memory_of(os.getpid())[1]))

    used, began = processor_seconds(), time.perf_counter()
    result = claude.run(scripted(bash("sleep 0.3"), {"text": "Done."}, timeout_seconds=60), look)
    taken = time.perf_counter() - began
    assert result.text == "Done.", result
    return 1000 * taken, 1000 * (processor_seconds() - used), *megabytes[0]


def show(name: str, rows: list[tuple[float, ...]]) -> None:
    columns = list(zip(*rows, strict=True))
    print(f"{name:<18}", *(f"{statistics.median(column):>9.1f} {min(column):>9.1f}" for column in columns))


def main() -> None:
    print(probe())
    starts: dict[str, list[tuple[float, ...]]] = {name: [] for name in KINDS}
    for _ in range(STARTS):
        for name, launch in KINDS.items():
            starts[name].append(start(launch))
    print(f"{'start (median min)':<18} {'ms':>19} {'CPU ms':>19}")
    for name, rows in starts.items():
        show(name, rows)
    runs: dict[str, list[tuple[float, ...]]] = {name: [] for name in KINDS}
    with MessagesApi() as api:
        claude = Inline(agent_environment(api.url))
        for turn in range(ROUNDS + 1):
            for name, launch in KINDS.items():
                worker.launcher = launch  # type: ignore[assignment]
                measured = run(claude)
                if turn:  # the first warms up
                    runs[name].append(measured)
    print(f"{'run (median min)':<18} {'ms':>19} {'CPU ms':>19} {'MB of the CLI':>19} {'MB of its slot':>19}")
    for name, rows in runs.items():
        show(name, rows)


if __name__ == "__main__":
    main()
