"""`python -m tests.chaos`: breaks two instances of the real service on purpose, and says whether anything was lost.

Exit code 0: all that must hold held. 1: it did not; the reasons and the file with the whole story are named.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.chaos.faults import KINDS, Kind
from tests.chaos.report import table, write
from tests.chaos.run import Plan, run


def main(arguments: list[str]) -> int:
    asked = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # everything is ended in order
    began = time.monotonic()
    plan = Plan(asked.jobs, asked.faults, asked.seconds, asked.seed, _chosen(asked.only, asked.without))
    result = run(plan, lambda text: print(f"[{time.monotonic() - began:5.0f} s] {text}", file=sys.stderr, flush=True))
    command = shlex.join(["python", "-m", "tests.chaos", *arguments])
    text = table(result.verdict, command, asked.seed, result.postgres_version)
    print(text)
    if asked.table is not None:
        write(text + "\n", asked.table)
    if asked.details is not None or not result.passed:
        path = asked.details or Path(tempfile.gettempdir()) / f"chaos-{asked.seed}-{os.getpid()}.log"
        write(f"{text}\n\n{result.details}", path)
        print(f"\nThe whole story: {path}")
    for reason in result.verdict.failures:
        print(f"\nFAILED: {reason}")
    return 0 if result.passed else 1


def _parse(arguments: list[str]) -> argparse.Namespace:
    names = ", ".join(kind.name for kind in KINDS)
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, epilog=f"Faults: {names}")
    parser.add_argument("--jobs", type=_bounded(1, 10_000), default=100, help="tasks to send (default: 100)")
    parser.add_argument(
        "--faults", type=_bounded(0, 2_000), default=len(KINDS), help="faults to inflict (default: each once)"
    )
    parser.add_argument("--seconds", type=_bounded(10, 14_400), default=120, help="over which both are spread")
    parser.add_argument("--seed", type=int, default=7, help="of the schedule and the tasks")
    parser.add_argument("--only", nargs="+", metavar="FAULT", default=[], help="only these faults")
    parser.add_argument("--without", nargs="+", metavar="FAULT", default=[], help="all but these faults")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write the whole story there, also if all is well")
    asked = parser.parse_args(arguments)
    unknown = {*asked.only, *asked.without} - {kind.name for kind in KINDS}
    if unknown:
        parser.error(f"no such faults: {', '.join(sorted(unknown))}; there are {names}")
    return asked


def _chosen(only: list[str], without: list[str]) -> tuple[Kind, ...]:
    return tuple(kind for kind in KINDS if (not only or kind.name in only) and kind.name not in without)


def _bounded(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most}")
        return value

    return read


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
