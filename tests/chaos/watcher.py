"""Looks at the database every half second, by a connection of its own: which runs are orphans, and since when."""

from __future__ import annotations

import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg.rows import dict_row

from tests.chaos.ledgers import Ledgers, Orphan

SAMPLE_SECONDS = 0.5
# A lease that has just run out is nobody's fault: the sweep looks every five seconds.
RUNNING = "SELECT id, claim_seq, owner, lease_until < now() AS expired FROM jobs WHERE state = 'running'"

Key = tuple[str, int]


@dataclass
class _Open:
    owner: str
    cause: Literal["death", "lease"]
    started: float


class Watcher:
    """A thread between start() and stop(), which closes what is still open."""

    def __init__(self, url: str, ledgers: Ledgers) -> None:
        self._url = url
        self._ledgers = ledgers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._open: dict[Key, _Open] = {}
        self.samples = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        for key in list(self._open):
            self._end(key)

    def _watch(self) -> None:
        while not self._stop.is_set():
            # While the database is away it is looked for again and again; its faults are in a ledger of their own.
            with suppress(psycopg.Error), connected(self._url) as connection:
                while not self._stop.wait(SAMPLE_SECONDS):
                    self._sample(connection.execute(RUNNING).fetchall())
            self._stop.wait(SAMPLE_SECONDS)

    def _sample(self, rows: list[dict[str, Any]]) -> None:
        self.samples += 1
        seen: set[Key] = set()
        for row in rows:
            key = str(row["id"]), int(row["claim_seq"])
            cause = _cause(row)
            if cause is None:
                continue
            seen.add(key)
            self._open.setdefault(key, _Open(row["owner"], cause, time.time()))
        for key in self._open.keys() - seen:
            self._end(key)

    def _end(self, key: Key) -> None:
        was = self._open.pop(key)
        self._ledgers.orphans.add(Orphan(*key, was.owner, was.cause, was.started, time.time()))


def connected(url: str) -> psycopg.Connection[dict[str, Any]]:
    """A direct connection that gives up on a frozen server after two seconds."""
    options = "-c statement_timeout=2s -c application_name=chaos"
    return psycopg.connect(url, autocommit=True, row_factory=dict_row, connect_timeout=2, options=options)


def _cause(row: dict[str, Any]) -> Literal["death", "lease"] | None:
    if not _lives(row["owner"]):
        return "death"
    return "lease" if row["expired"] else None


def _lives(owner: str) -> bool:
    """Whether the process that an owner's name tells (`host:pid:…`) is there, frozen ones included."""
    found = re.search(r":(\d+)(?::|$)", owner)
    if found is None:
        return True
    try:
        stat = Path(f"/proc/{found[1]}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
