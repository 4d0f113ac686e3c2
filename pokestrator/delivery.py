"""Brings results to Poke: takes callbacks from the outbox, posts them, and tries again until delivered or dead."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Channel, NewJob, callback_content
from pokestrator.poke import Message, Poke, Receipt
from pokestrator.store.callbacks import UNSENDABLE_HOURS, Callback, Callbacks
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

SENDERS = 32  # threads at most; each lives with one POST
PER_RECEIVER = 8  # of them, so that a slow receiver holds up nobody else's callback
POLL_SECONDS = 1.0
UPKEEP_SECONDS = 60.0
LEAVE_SECONDS = 3.0
RECORD_SECONDS = 1.0  # for writing down what became of the POSTs that were broken off
# After the try whose number is the index + 1: 5 s, 30 s, 2 min, 10 min, 30 min, 2 h, 5 h, 10 h, 14 h, 20 h, 24 h.
WAITS = (5, 30, 120, 600, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
LONGEST_ASKED_WAIT = 3_600.0  # of Retry-After and retryAfterMs
FALL_BACK_SECONDS = 600.0  # how long a callback URL may fail before the message API takes over
TRIES_FROM_MEMORY = 4
RETRIED_STATUSES = frozenset({408, 425, 429})
DEAD_TOKEN_STATUSES = frozenset({401, 403, 404, 410})
NO_KEY = f"no POKE_API_KEY was set for {UNSENDABLE_HOURS} hours"


@dataclass(frozen=True)
class NextTry:
    """When a failed callback is tried again, and where."""

    wait_seconds: float
    channel: Channel


def wait_after(tries: int, asked: float | None = None, jitter: float = 1.0) -> float | None:
    """Seconds to wait after failed try number `tries`; None when it was the last.

    `asked` is what the receiver wants us to wait at least; `jitter` (0.8 to 1.2) spreads the schedule.

    >>> wait_after(1), wait_after(3, jitter=0.8), wait_after(12)
    (5.0, 96.0, None)
    >>> wait_after(1, asked=40.0), wait_after(1, asked=1e9)
    (40.0, 3600.0)
    """
    if tries > len(WAITS):
        return None
    return max(WAITS[tries - 1] * jitter, min(asked or 0.0, LONGEST_ASKED_WAIT))


def is_worth_retrying(receipt: Receipt, channel: Channel) -> bool:
    """No answer, a server's fault, or "not now": yes. Any other refusal will be refused again.

    A callback URL that redirects is one that fails; the message API that does has another address now.

    >>> [is_worth_retrying(Receipt(False, status), Channel.API_MESSAGE) for status in (503, 400)]
    [True, False]
    >>> [is_worth_retrying(Receipt(False, 307), channel) for channel in (Channel.CALLBACK, Channel.API_MESSAGE)]
    [True, False]
    """
    status = receipt.status
    if status is None or status >= 500 or status in RETRIED_STATUSES:
        return True
    return channel is Channel.CALLBACK and 300 <= status < 400


def next_try(
    receipt: Receipt,
    *,
    channel: Channel,
    tries: int,
    age_seconds: float,
    channels: Sequence[Channel],
    jitter: float = 1.0,
) -> NextTry | None:
    """What follows from failed try number `tries`, made `age_seconds` after the schedule began; None: a dead letter.

    `channels` are those that can be used now.

    >>> both = (Channel.CALLBACK, Channel.API_MESSAGE)
    >>> next_try(Receipt(False, 503), channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both).wait_seconds
    5.0
    >>> next_try(Receipt(False, 503), channel=Channel.CALLBACK, tries=4, age_seconds=160, channels=both)
    NextTry(wait_seconds=440.0, channel=<Channel.API_MESSAGE: 'api_message'>)
    >>> next_try(Receipt(False, 401), channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both)
    NextTry(wait_seconds=0.0, channel=<Channel.API_MESSAGE: 'api_message'>)
    >>> next_try(Receipt(False, 400), channel=Channel.CALLBACK, tries=1, age_seconds=0, channels=both) is None
    True
    """
    if channel is Channel.CALLBACK and receipt.status in DEAD_TOKEN_STATUSES:
        return NextTry(0.0, Channel.API_MESSAGE)  # also without a key: there may be one in the days to come
    if not is_worth_retrying(receipt, channel):
        return None
    wait = wait_after(tries, receipt.retry_after_seconds, jitter)
    if channel is Channel.CALLBACK and Channel.API_MESSAGE in channels:
        left = max(0.0, FALL_BACK_SECONDS - max(0.0, age_seconds))
        if wait is None or wait >= left:
            return NextTry(left, Channel.API_MESSAGE)
    return None if wait is None else NextTry(wait, channel)


class Delivery:
    """One thread that looks for due callbacks, and one for each POST. `poke` is its own: close() closes it."""

    def __init__(self, callbacks: Callbacks, poke: Poke) -> None:
        self._callbacks = callbacks
        self._poke = poke
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._posting: Counter[str] = Counter()  # by address
        self._changed = threading.Condition()  # guards _posting
        self._upkeep_at = 0.0
        self._leave_at: float | None = None
        # Daemons, as the senders are: a receiver's name that is looked up for a minute must not hold up our exit.
        self._thread = threading.Thread(target=self._watch, name="delivery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """A callback was just written."""
        self._wake.set()

    def stop(self, seconds: float = LEAVE_SECONDS) -> None:
        """Post what is due now, claim no more, end all waits, and after `seconds` break off what is still being posted.

        Does not block.
        """
        if self._leave_at is None:
            self._leave_at = time.monotonic() + seconds
        self._stop.set()
        self._wake.set()

    def close(self, seconds: float = LEAVE_SECONDS) -> None:
        """Stop, and return once nothing is being posted any more; what is broken off or unsent stays in the outbox."""
        self.stop(seconds)
        if self._thread.ident is not None:
            self._thread.join(seconds + RECORD_SECONDS)  # the database may hang
        self._leave()
        if not self._is_idle(RECORD_SECONDS):
            log.warning("callbacks_abandoned", number=self._posting.total())  # their holds lapse

    def deliver(self, job_id: uuid.UUID) -> None:
        """Post this job's callback in the caller's own thread, if it is due."""
        for _ in range(2):  # a callback token that has ended makes it due again, on the message API
            for callback in self._callbacks.claim_due(self._poke.channels, 1, job_id):
                self._attempt(callback)

    def send_from_memory(self, job: NewJob, content: str) -> None:
        """Post the result of a job that could not be stored: a few tries, then it is lost, as its ack warned."""
        channel, target, began = job.channel, job.callback, time.monotonic()
        for tries in range(1, TRIES_FROM_MEMORY + 1):
            if channel not in self._poke.channels:
                break
            message = Message(job.id, job.task, callback_content(content), channel, target, str(job.id))
            receipt = self._send_counted(message)
            log.info("callback", request_id=str(job.id), status=receipt.status, error=receipt.error, durable=False)
            if receipt.delivered:
                return
            age = time.monotonic() - began
            then = next_try(
                receipt, channel=channel, tries=tries, age_seconds=age, channels=self._poke.channels, jitter=_jitter()
            )
            if then is None or tries == TRIES_FROM_MEMORY or self._stop.wait(then.wait_seconds):
                break
            channel = then.channel
        log.error("callback_lost", request_id=str(job.id), durable=False)

    # the watch -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            self._poke.cut_overdue()
            self._look()
            self._wake.wait(POLL_SECONDS)
        self._look()  # a run that ended just now has left something
        self._leave()

    def _look(self) -> None:
        try:
            self._keep_up()
            self._hand_out()
        except StoreUnavailable as error:
            log.debug("outbox_unreachable", reason=str(error))
        except Exception:
            log.exception("delivery_failed")  # this thread must outlive every fault

    def _leave(self) -> None:
        assert self._leave_at is not None, "stop() comes before"
        self._is_idle(self._leave_at - time.monotonic())
        self._poke.close()

    def _is_idle(self, within: float) -> bool:
        """Whether nothing is being posted any more, in so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._posting.total(), max(0.0, within))

    def _keep_up(self) -> None:
        if time.monotonic() < self._upkeep_at:
            return
        brought = self._callbacks.bring_forward()
        ended = self._callbacks.end_unsendable(self._poke.channels, NO_KEY)
        if brought or ended:
            log.warning("outbox_upkeep", brought_forward=brought, unsendable=ended)
        self._upkeep_at = time.monotonic() + UPKEEP_SECONDS

    def _hand_out(self) -> None:
        for _ in range(SENDERS):  # and again at once, if one of them has ended meanwhile
            with self._changed:
                if self._posting.total() >= SENDERS:
                    return
                busy = [address for address, number in self._posting.items() if number >= PER_RECEIVER]
            channels = [channel for channel in self._poke.channels if channel not in busy]
            due = self._callbacks.claim_due(channels, 1, busy=busy)
            if not due:
                return
            self._begin(_address(due[0]))
            try:
                name = f"sender {due[0].job_id}"
                threading.Thread(target=self._send, args=(due[0],), name=name, daemon=True).start()
            except BaseException:
                self._end(_address(due[0]))
                raise

    # the senders -----------------------------------------------------------------------------------------------

    def _send(self, callback: Callback) -> None:
        try:
            self._attempt(callback)
        except StoreUnavailable:
            log.warning("callback_given_up", request_id=str(callback.job_id))  # sent again when its hold lapses
        except Exception:
            log.exception("callback_failed", request_id=str(callback.job_id))
        finally:
            self._end(_address(callback))
            self._wake.set()

    def _attempt(self, callback: Callback) -> None:
        message = Message(
            callback.job_id, callback.task, callback.content, callback.channel, callback.target, str(callback.id)
        )
        started = time.monotonic()
        receipt = self._poke.send(message)
        seconds = time.monotonic() - started
        log.info(
            "callback",
            request_id=str(callback.job_id),
            channel=callback.channel,
            attempt=callback.attempt,
            delivered=receipt.delivered,
            status=receipt.status,
            error=receipt.error,
            ms=round(1000 * seconds),
        )
        while True:
            try:
                return self._record(callback, receipt, callback.age_seconds + seconds)
            except StoreUnavailable as error:
                # Unrecorded, it would be sent again once its hold lapses.
                log.warning("callback_not_recorded", request_id=str(callback.job_id), reason=str(error))
                if self._stop.wait(POLL_SECONDS):
                    raise

    def _record(self, callback: Callback, receipt: Receipt, age_seconds: float) -> None:
        if receipt.delivered:
            self._callbacks.delivered(callback, receipt.status)
            return
        channel, tries, channels = callback.channel, callback.tries, self._poke.channels
        then = next_try(
            receipt, channel=channel, tries=tries, age_seconds=age_seconds, channels=channels, jitter=_jitter()
        )
        if then is None:
            self._callbacks.dead(callback, receipt.status, receipt.error)
        else:
            wait = then.wait_seconds
            self._callbacks.retry(callback, receipt.status, receipt.error, wait_seconds=wait, channel=then.channel)

    def _send_counted(self, message: Message) -> Receipt:
        self._begin(_address(message))
        try:
            return self._poke.send(message)
        finally:
            self._end(_address(message))

    def _begin(self, address: str) -> None:
        with self._changed:
            self._posting[address] += 1

    def _end(self, address: str) -> None:
        with self._changed:
            self._posting[address] -= 1
            if not self._posting[address]:
                del self._posting[address]
            self._changed.notify_all()


def _address(sent: Callback | Message) -> str:
    """Whom a slow answer to this one comes from; the message API is one address."""
    if sent.channel is Channel.CALLBACK and sent.target is not None:
        return sent.target.url
    return Channel.API_MESSAGE


def _jitter() -> float:
    return random.uniform(0.8, 1.2)
