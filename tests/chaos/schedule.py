"""Which fault when, and against which instance: drawn from a seed, then carried out in threads of their own."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.chaos.faults import Kind, Missed
from tests.chaos.ledgers import Fault
from tests.chaos.stand import INSTANCES, Stand

HEALING_SECONDS = 4.0  # kept free after a fault before the same thing is broken again
BETWEEN_SECONDS = 1.0  # at least, between the starts of two faults
LONG_RUN_SECONDS = 600.0  # a run of so long has the long faults


@dataclass(frozen=True)
class Planned:
    at: float  # seconds after the start
    kind: Kind
    instance: str
    seconds: float


def plan(seed: int, count: int, seconds: float, kinds: Sequence[Kind]) -> list[Planned]:
    """`count` faults over `seconds`. Each kind comes before any comes again; no two at once on one resource."""
    chance = random.Random(seed)
    free_at: dict[str, float] = {}
    planned: list[Planned] = []
    bag: list[Kind] = []
    gap = seconds / max(count, 1)
    for number in range(count):
        at = number * gap + chance.uniform(0, gap / 2)
        if not bag:
            bag = chance.sample(kinds, len(kinds))
        instance = chance.choice(INSTANCES)
        # The first in the bag whose resource is free; if there is none, the first, later.
        kind = next((k for k in bag if all(free_at.get(r, 0) <= at for r in resources(k, instance))), bag[0])
        bag.remove(kind)
        at = max([at, *(free_at.get(r, 0) for r in resources(kind, instance))])
        least, most = kind.long if seconds >= LONG_RUN_SECONDS else kind.short
        lasts = min(chance.uniform(least, most), max(seconds - at, least))  # so that the end of the run is the end
        for resource in resources(kind, instance):
            free_at[resource] = at + lasts + HEALING_SECONDS
        planned.append(Planned(at, kind, instance, lasts))
    return sorted(planned, key=lambda each: each.at)


def resources(kind: Kind, instance: str) -> list[str]:
    """What a fault has for itself alone."""
    if kind.alone:
        return ["database", "inbox", "api", *(f"{what} {name}" for what in ("instance", "line") for name in INSTANCES)]
    if kind.resource == "line" and kind.affects == "everything":
        return [f"line {name}" for name in INSTANCES]
    return [f"{kind.resource} {instance}" if kind.resource in ("instance", "line", "agent") else kind.resource]


class Runner:
    """Carries a plan out. `start()`, then `join()`."""

    def __init__(self, stand: Stand, planned: Sequence[Planned], seconds: float) -> None:
        self._stand = stand
        self._planned = planned
        self._seconds = seconds
        self._locks = {r: threading.Lock() for each in planned for r in resources(each.kind, each.instance)}
        self._threads: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run, name="schedule", daemon=True)
        self.dropped = 0  # faults for which no time was left

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        for number, each in enumerate(self._planned):
            _sleep(max(began + each.at - time.monotonic(), BETWEEN_SECONDS if number else 0))
            if time.monotonic() - began > self._seconds:
                self.dropped = len(self._planned) - number
                break
            if each.kind.alone:
                self._join_all()
                _sleep(HEALING_SECONDS)
            thread = threading.Thread(target=self._inflict, args=(each,), name=each.kind.name, daemon=True)
            thread.start()
            self._threads.append(thread)
            if each.kind.alone:
                thread.join()
        self._join_all()

    def _join_all(self) -> None:
        for thread in self._threads:
            thread.join()

    def _inflict(self, each: Planned) -> None:
        ledgers = self._stand.ledgers
        # Always in the same order, so that two that want the same never wait for each other.
        held = [self._locks[r] for r in sorted(resources(each.kind, each.instance))]
        for lock in held:
            lock.acquire()
        kind = each.kind
        aimed = kind.affects == "instance" or kind.resource == "agent"
        fault = Fault(kind.name, each.instance if aimed else None, kind.affects, kind.doubles, time.time())
        try:
            kind.inflict(self._stand, self._stand.instances[each.instance], each.seconds, fault)
        except Missed:
            ledgers.missed.add(kind.name)
            return
        except Exception as error:  # noqa: BLE001 - a fault that fails is part of the verdict
            ledgers.errors.add(f"{kind.name} of {each.instance}: {type(error).__name__}: {error}")
        finally:
            for lock in held:
                lock.release()
        if fault.ended:
            fault.whole = time.time()
        else:
            fault.end()
        ledgers.faults.add(fault)


def _sleep(seconds: float) -> None:
    threading.Event().wait(seconds)
