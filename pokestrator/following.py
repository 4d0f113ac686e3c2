"""A job's timeline, told as it happens: for the demo and for `run`."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable

from pokestrator.jobs import Outcome
from pokestrator.store.history import History

LOOK_SECONDS = 0.05  # between two looks


class Timeline:
    """One job's timeline. Each of its events is handed to `tell` once, as (kind, text), in its order."""

    def __init__(self, history: History, job_id: uuid.UUID, tell: Callable[[str, str], None]) -> None:
        self._history = history
        self._job_id = job_id
        self._tell = tell
        self._told: list[str] = []

    def follow(self, is_given_up: Callable[[], bool]) -> Outcome | None:
        """Tell what happens until the job has ended, and return how; None when `is_given_up`, which is asked before
        each look, says so before. Raises StoreUnavailable."""
        pause = threading.Event()
        while True:
            given_up = is_given_up()
            outcome = self._history.outcome(self._job_id)
            self._tell_news()
            if outcome is not None or given_up:
                return outcome
            pause.wait(LOOK_SECONDS)

    def follow_to(self, kind: str, seconds: float) -> bool:
        """Tell what happens until there is an event of this kind: whether there was one within `seconds`."""
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while True:
            self._tell_news()
            if kind in self._told:
                return True
            if time.monotonic() > deadline:
                return False
            pause.wait(LOOK_SECONDS)

    def _tell_news(self) -> None:
        for event in self._history.timeline(self._job_id)[len(self._told) :]:
            self._told.append(event.kind)
            self._tell(event.kind, event.text)
