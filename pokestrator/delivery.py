"""Brings results to Poke: takes callbacks from the outbox, posts them, and tries again until delivered or dead."""

from __future__ import annotations

import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Channel, NewJob, callback_content
from pokestrator.poke import Message, Poke, Receipt
from pokestrator.store.callbacks import Callback, Callbacks
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

SENDERS = 8  # a slow receiver holds one of them
POLL_SECONDS = 1.0
# After the try whose number is the index + 1: 5 s, 30 s, 2 min, 10 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h.
WAITS = (5, 30, 120, 600, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
LONGEST_ASKED_WAIT = 3_600.0  # of Retry-After and retryAfterMs
RETRIED_STATUSES = frozenset({408, 425, 429})
DEAD_TOKEN_STATUSES = frozenset({401, 403, 404, 410})


def wait_after(attempt: int, asked: float | None = None, jitter: float = 1.0) -> float | None:
    """Seconds to wait after failed try number `attempt`; None when it was the last.

    `asked` is what the receiver wants us to wait at least; `jitter` (0.8 to 1.2) spreads the schedule.

    >>> wait_after(1), wait_after(3, jitter=0.8), wait_after(12)
    (5.0, 96.0, None)
    >>> wait_after(1, asked=40.0), wait_after(1, asked=1e9)
    (40.0, 3600.0)
    """
    if attempt > len(WAITS):
        return None
    return max(WAITS[attempt - 1] * jitter, min(asked or 0.0, LONGEST_ASKED_WAIT))


def is_worth_retrying(receipt: Receipt) -> bool:
    """No answer, a server's fault, or "not now": yes. Any other refusal will be refused again."""
    return receipt.status is None or receipt.status >= 500 or receipt.status in RETRIED_STATUSES


class Delivery:
    """One thread that looks for due callbacks and a few that post them."""

    def __init__(self, callbacks: Callbacks, poke: Poke) -> None:
        self._callbacks = callbacks
        self._poke = poke
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._free = threading.Semaphore(SENDERS)
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="sender")
        self._thread = threading.Thread(target=self._watch, name="delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """A callback was just written."""
        self._wake.set()

    def close(self) -> None:
        """Finish what is being posted; the rest stays in the outbox."""
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self._senders.shutdown(wait=True)

    def deliver(self, job_id: uuid.UUID) -> None:
        """Post this job's callback in the caller's own thread, if it is due."""
        for _ in range(2):  # a callback token that has ended makes it due again, on the message API
            for callback in self._callbacks.claim_due(self._poke.channels, 1, job_id):
                self._attempt(callback)

    def send_from_memory(self, job: NewJob, content: str) -> None:
        """Post the result of a job that could not be stored: a few tries, then it is lost, as its ack warned."""
        message = Message(job.id, job.task, callback_content(content), job.channel, job.callback, str(job.id))
        for attempt in (1, 2, 3, 4):
            if message.channel not in self._poke.channels:
                break
            receipt = self._poke.send(message)
            log.info("callback", request_id=str(job.id), status=receipt.status, error=receipt.error, durable=False)
            wait = wait_after(attempt, receipt.retry_after_seconds)
            if receipt.delivered or not is_worth_retrying(receipt) or wait is None or self._stop.wait(wait):
                return
        log.error("callback_lost", request_id=str(job.id), durable=False)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                self._hand_out()
            except StoreUnavailable as error:
                log.debug("outbox_unreachable", reason=str(error))
            except Exception:
                log.exception("delivery_failed")  # this thread must outlive every fault
            self._wake.wait(POLL_SECONDS)

    def _hand_out(self) -> None:
        while not self._stop.is_set() and self._free.acquire(blocking=False):
            try:
                due = self._callbacks.claim_due(self._poke.channels, 1)
            except BaseException:
                self._free.release()
                raise
            if not due:
                self._free.release()
                return
            self._senders.submit(self._send, due[0])

    def _send(self, callback: Callback) -> None:
        try:
            self._attempt(callback)
        except StoreUnavailable as error:
            # The row's hold lapses and it is sent again: delivered at least once.
            log.warning("callback_not_recorded", request_id=str(callback.job_id), reason=str(error))
        except Exception:
            log.exception("callback_failed", request_id=str(callback.job_id))
        finally:
            self._free.release()
            self._wake.set()

    def _attempt(self, callback: Callback) -> None:
        message = Message(
            callback.job_id, callback.task, callback.content, callback.channel, callback.target, str(callback.id)
        )
        started = time.monotonic()
        receipt = self._poke.send(message)
        log.info(
            "callback",
            request_id=str(callback.job_id),
            channel=callback.channel,
            attempt=callback.attempt,
            delivered=receipt.delivered,
            status=receipt.status,
            error=receipt.error,
            ms=round(1000 * (time.monotonic() - started)),
        )
        self._record(callback, receipt)

    def _record(self, callback: Callback, receipt: Receipt) -> None:
        if receipt.delivered:
            self._callbacks.delivered(callback, receipt.status)
            return
        if callback.channel is Channel.CALLBACK and receipt.status in DEAD_TOKEN_STATUSES:
            # The address that the request carried has ended; Poke's message API takes over.
            self._callbacks.retry(callback, receipt.status, receipt.error, wait_seconds=0, channel=Channel.API_MESSAGE)
            return
        wait = wait_after(callback.attempt, receipt.retry_after_seconds, random.uniform(0.8, 1.2))
        if wait is None or not is_worth_retrying(receipt):
            self._callbacks.dead(callback, receipt.status, receipt.error)
            return
        self._callbacks.retry(callback, receipt.status, receipt.error, wait_seconds=wait, channel=callback.channel)
