"""What is broken, and how it is mended: one function a fault. Each ends when what it broke can work again.

A function gets the stand, the instance that was drawn, how long in seconds, and the fault's entry for the ledger. It
calls `fault.end()` where the harm stops earlier than the healing. Raises Missed when there is nothing to break now.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tests.acceptance.processes import eventually
from tests.chaos.instance import Instance
from tests.chaos.ledgers import Affects, Fault
from tests.chaos.proxy import Mode, Proxy
from tests.chaos.stand import Stand

FIND_SECONDS = 8.0  # that a fault waits for an agent to kill
DAY = 86_400.0

Inflict = Callable[[Stand, Instance, float, Fault], object]


class Missed(Exception):
    """There was nothing to break."""


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `short` and `long` are the seconds it lasts in a short and in a long run.

    Two faults with the same `resource` never overlap; an `alone` one overlaps none.
    """

    name: str
    resource: str  # "instance" and "line" are those of the instance that is drawn
    affects: Affects
    doubles: bool
    inflict: Inflict
    short: tuple[float, float] = (0, 0)
    long: tuple[float, float] = (0, 0)
    alone: bool = False


# processes ---------------------------------------------------------------------------------------------------------


def kill_agent(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    _kill(lambda: next(iter(instance.agents()), None), fault)


def kill_slot(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    _kill(lambda: next(iter(instance.slots()), None), fault)


def kill_worker(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    pid = _kill(instance.worker, fault)
    _await(instance.await_answers(pid), f"instance {instance.name} has a new worker")


def kill_master(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    """And start the instance again, as the host's supervisor does."""
    _kill(lambda: instance.service.pid, fault)
    _pause(seconds)
    instance.start()


def rolling_restart(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    """SIGTERM, and a new one once it has gone; the other instance stays."""
    instance.service.stop()
    instance.start()
    fault.end()


def freeze_worker(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    pid = instance.worker()
    if pid is None:
        raise Missed
    os.kill(pid, signal.SIGSTOP)
    try:
        _pause(seconds)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    fault.end()
    _await(instance.await_answers(), f"instance {instance.name} answers again")


# PostgreSQL --------------------------------------------------------------------------------------------------------


def _ends_postgres(how: signal.Signals) -> Inflict:
    def inflict(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
        stand.postgres.end(how)
        _pause(seconds)
        stand.postgres.start()

    return inflict


def terminate_connections(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    fault.detail = f"{stand.postgres.terminate_connections()} sessions"


def freeze_postgres(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    stand.postgres.signal_all(signal.SIGSTOP)
    try:
        _pause(seconds)
    finally:
        stand.postgres.signal_all(signal.SIGCONT)


def _jumps(seconds_of_jump: float) -> Inflict:
    def inflict(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
        stand.postgres.jump(seconds_of_jump)

    return inflict


# the lines ---------------------------------------------------------------------------------------------------------


def _database_line(stand: Stand, instance: Instance) -> Proxy:
    return stand.database_lines[instance.name]


def _inbox_line(stand: Stand, instance: Instance) -> Proxy:
    return stand.inbox_line


def _api_line(stand: Stand, instance: Instance) -> Proxy:
    return stand.api_line


def _breaks(line: Callable[[Stand, Instance], Proxy], mode: Callable[[], Mode]) -> Inflict:
    def inflict(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
        chosen = mode()
        fault.detail = _words(chosen)
        with line(stand, instance).broken(chosen):
            _pause(seconds)

    return inflict


def _resets(line: Callable[[Stand, Instance], Proxy]) -> Inflict:
    def inflict(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
        """Whatever is open, each half second; the line is slow, so that there is something in mid-air."""
        ended = 0
        with line(stand, instance).broken(Mode("delay", seconds=0.2)):
            for _ in range(max(int(seconds * 2), 1)):
                _pause(0.5)
                ended += line(stand, instance).reset()
        fault.detail = f"{ended} connections"

    return inflict


def cut_off_database(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
    """An outage: both instances are refused."""
    lines = list(stand.database_lines.values())
    for line in lines:
        line.switch(Mode("refuse"))
    try:
        _pause(seconds)
    finally:
        for line in lines:
            line.switch(Mode())


# Poke --------------------------------------------------------------------------------------------------------------


def _answers(answer: dict[str, Any], times: int) -> Inflict:
    def inflict(stand: Stand, instance: Instance, seconds: float, fault: Fault) -> None:
        stand.inbox.answer_with([answer] * times)
        fault.detail = f"{times} times {answer}"

    return inflict


def _fixed(*values: Any, **fields: Any) -> Callable[[], Mode]:
    return lambda: Mode(*values, **fields)


def _cut(direction: Any, least: int = 50, most: int = 3_000) -> Callable[[], Mode]:
    return lambda: Mode("cut", after=random.randint(least, most), direction=direction)


def _slow(least: float, most: float) -> Callable[[], Mode]:
    return lambda: Mode("delay", seconds=random.uniform(least, most))


KINDS = (
    Kind("kill_agent", "agent", "nothing", False, kill_agent),
    Kind("kill_slot", "agent", "nothing", False, kill_slot),
    Kind("kill_worker", "instance", "instance", True, kill_worker),
    Kind("kill_master", "instance", "instance", True, kill_master, (1, 2), (1, 5)),
    Kind("rolling_restart", "instance", "instance", False, rolling_restart, (8, 8), (8, 8), alone=True),
    Kind("freeze_worker", "instance", "instance", True, freeze_worker, (8, 26), (25, 58)),
    Kind("kill_postgres", "database", "everything", True, _ends_postgres(signal.SIGKILL), (1, 4), (2, 15)),
    Kind("stop_postgres_fast", "database", "everything", True, _ends_postgres(signal.SIGINT), (0, 2), (0, 10)),
    Kind("stop_postgres_immediate", "database", "everything", True, _ends_postgres(signal.SIGQUIT), (0, 2), (0, 10)),
    Kind("terminate_connections", "database", "everything", True, terminate_connections),
    Kind("freeze_postgres", "database", "everything", True, freeze_postgres, (5, 10), (10, 30)),
    Kind("database_outage", "line", "everything", True, cut_off_database, (4, 8), (10, 60)),
    Kind("database_refused", "line", "instance", True, _breaks(_database_line, _fixed("refuse")), (4, 10), (10, 60)),
    Kind("database_slow", "line", "instance", True, _breaks(_database_line, _slow(0.3, 5)), (4, 8), (10, 30)),
    Kind("database_silent", "line", "instance", True, _breaks(_database_line, _fixed("drop")), (4, 10), (10, 40)),
    Kind(
        "database_half_open", "line", "instance", True, _breaks(_database_line, _fixed("half_open")), (4, 10), (10, 40)
    ),
    Kind("database_reset", "line", "instance", True, _resets(_database_line), (1, 2), (1, 4)),
    Kind(
        "database_cut_answer",
        "line",
        "instance",
        True,
        _breaks(_database_line, _cut("answer")),
        (2, 4),
        (3, 9),
    ),
    Kind(
        "database_cut_query",
        "line",
        "instance",
        True,
        _breaks(_database_line, _cut("request")),
        (2, 4),
        (3, 9),
    ),
    Kind("inbox_refused", "inbox", "nothing", False, _breaks(_inbox_line, _fixed("refuse")), (3, 8), (5, 40)),
    Kind("inbox_slow", "inbox", "nothing", False, _breaks(_inbox_line, _slow(0.5, 3)), (4, 8), (5, 20)),
    Kind("inbox_silent", "inbox", "nothing", False, _breaks(_inbox_line, _fixed("drop")), (4, 8), (5, 40)),
    Kind("inbox_reset", "inbox", "nothing", True, _resets(_inbox_line), (2, 4), (2, 8)),
    Kind("inbox_cut_request", "inbox", "nothing", False, _breaks(_inbox_line, _cut("request", 1, 300)), (3, 6), (4, 9)),
    Kind("inbox_cut_answer", "inbox", "nothing", True, _breaks(_inbox_line, _cut("answer", 0, 100)), (3, 6), (4, 9)),
    Kind("inbox_errors", "inbox", "nothing", False, _answers({"status": 503}, 4)),
    Kind("inbox_busy", "inbox", "nothing", False, _answers({"status": 429, "headers": {"Retry-After": "1"}}, 4)),
    Kind("api_refused", "api", "nothing", False, _breaks(_api_line, _fixed("refuse")), (2, 4), (3, 10)),
    Kind("api_silent", "api", "nothing", False, _breaks(_api_line, _fixed("drop")), (3, 6), (5, 20)),
    Kind("clock_forward", "database", "everything", False, _jumps(DAY)),
    Kind("clock_back", "database", "everything", False, _jumps(-DAY)),
)


def _kill(find: Callable[[], int | None], fault: Fault) -> int:
    """SIGKILL what `find` finds, as soon as it does. Raises Missed."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in [find()] if pid is not None]
        return bool(found)

    if not eventually(look, FIND_SECONDS):
        raise Missed
    try:
        os.kill(found[0], signal.SIGKILL)
    except ProcessLookupError:
        raise Missed from None
    fault.end()
    fault.detail = f"pid {found[0]}"
    return found[0]


def _await(reached: bool, what: str) -> None:
    if not reached:
        raise RuntimeError(f"it took too long until {what}")


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def _words(mode: Mode) -> str:
    extra = {"delay": f" {mode.seconds:.1f} s", "cut": f" the {mode.direction} after {mode.after} bytes"}
    return mode.kind + extra.get(mode.kind, "")
