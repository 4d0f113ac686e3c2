"""Calls of Claude.run that have not returned: until when each may take, who listens to it, whether it must end now."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pokestrator.claude.outcomes import failure
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

OnEvent = Callable[[RunEvent], None]

CANCELLED = "cancelled"
STOPPING = "the service is stopping"


@dataclass(eq=False)
class Call:
    """One call. `deadline` is of time.monotonic(); `end_reason` is why it must end before that, or empty."""

    request: RunRequest
    deadline: float
    on_event: OnEvent
    end_reason: str = ""

    def tell(self, event: RunEvent) -> None:
        """Hand an event to who listens; what is wrong with them is no matter of the run."""
        try:
            self.on_event(event)
        except Exception:
            log.exception("event_lost", kind=event.kind)

    def ended(self) -> RunResult | None:
        """The result of a call that was told to end, None for others."""
        return failure(ErrorKind.AGENT_CRASHED, self.end_reason) if self.end_reason else None


class Calls:
    """All calls that have not returned; `changed` guards and announces what they wait for. Thread-safe."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._calls: set[Call] = set()
        self._closed = False

    @contextmanager
    def open(self, request: RunRequest, on_event: OnEvent) -> Iterator[Call]:
        """A call for as long as the block lasts; after close() it has to end at once."""
        call = Call(request, time.monotonic() + request.timeout_seconds, on_event)
        with self.changed:
            call.end_reason = STOPPING if self._closed else ""
            self._calls.add(call)
        try:
            yield call
        finally:
            with self.changed:
                self._calls.remove(call)

    def wait(self, call: Call, is_ready: Callable[[], object]) -> bool:
        """Wait with `changed` held; False when the call must end, or its deadline has come, before `is_ready`."""
        self.changed.wait_for(lambda: call.end_reason or is_ready(), call.deadline - time.monotonic())
        return not call.end_reason and bool(is_ready())

    def pause(self, call: Call, seconds: float) -> bool:
        """Let `seconds` pass; False at once when the call's deadline comes before, and when it must end meanwhile."""
        if time.monotonic() + seconds >= call.deadline:
            return False
        with self.changed:
            return not self.changed.wait_for(lambda: call.end_reason, seconds)

    def cancel(self, run_id: str) -> list[Call]:
        """Tell the calls of this id to end; returns those that had not been told yet. An empty id names no call."""
        return self._tell_to_end(CANCELLED, lambda call: run_id != "" and call.request.run_id == run_id)

    def close(self) -> list[Call]:
        """Tell all calls, and each later one, to end; returns those that had not been told yet."""
        with self.changed:
            self._closed = True
            return self._tell_to_end(STOPPING, lambda _: True)

    def _tell_to_end(self, reason: str, is_meant: Callable[[Call], bool]) -> list[Call]:
        with self.changed:
            told = [call for call in self._calls if is_meant(call) and not call.end_reason]
            for call in told:
                call.end_reason = reason
            self.changed.notify_all()
        return told
