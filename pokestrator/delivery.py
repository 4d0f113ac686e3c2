"""Brings results to Poke: takes callbacks from the outbox, posts them, and tries again until delivered or dead."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Channel, NewJob, callback_content
from pokestrator.poke.api import Message, Poke
from pokestrator.poke.post import Receipt
from pokestrator.schedule import NextTry, next_try
from pokestrator.store.callbacks import UNSENDABLE_HOURS, Callback, Callbacks, host_of
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

SENDERS = 32  # threads at most; each lives with one POST
PER_RECEIVER = 8  # of them for one address, so that a slow receiver holds up nobody else's callback
PER_HOST = 16  # of them for the callback URLs of one host, which may be another for each request
POLL_SECONDS = 1.0
UPKEEP_SECONDS = 60.0
LEAVE_SECONDS = 3.0
RECORD_SECONDS = 1.0  # for writing down what became of the POSTs that were broken off
TRIES_FROM_MEMORY = 4
NO_KEY = f"no POKE_API_KEY was set for {UNSENDABLE_HOURS} hours"


class Delivery:
    """One thread that looks for due callbacks, one that breaks off POSTs which take too long, and one for each POST.

    `poke` is its own: close() closes it.
    """

    def __init__(self, callbacks: Callbacks, poke: Poke) -> None:
        self._callbacks = callbacks
        self._poke = poke
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._left = threading.Event()
        self._sending: dict[uuid.UUID, str] = {}  # what is posted or recorded now, with its address
        self._changed = threading.Condition()  # guards _sending
        self._upkeep_at = 0.0
        self._leave_at: float | None = None
        # Daemons, as the senders are: a receiver's name that is looked up for a minute must not hold up our exit.
        self._thread = threading.Thread(target=self._watch, name="delivery", daemon=True)
        self._cutter = threading.Thread(target=self._cut, name="delivery deadlines", daemon=True)

    def start(self) -> None:
        self._thread.start()
        self._cutter.start()

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
        """Stop, and return once nothing is being posted any more; what is broken off or unsent stays in the outbox.

        After an earlier stop() its `seconds` count.
        """
        self.stop(seconds)
        if self._thread.ident is not None:
            self._thread.join(self._seconds_to_leave() + RECORD_SECONDS)  # the database may hang
        self._leave()
        if not self._is_idle(RECORD_SECONDS):
            log.warning("callbacks_abandoned", number=len(self._sending))  # their holds lapse

    def deliver(self, job_id: uuid.UUID) -> None:
        """Post this job's callback in the caller's own thread, if it is due."""
        for _ in range(2):  # a callback token that has ended makes it due again, on the message API
            for callback in self._callbacks.claim_due(self._poke.channels, 1, job_id, not_ids=self._ids()):
                with self._counted(callback.id, _address(callback)):
                    self._attempt(callback)

    def send_from_memory(self, job: NewJob, content: str) -> None:
        """Post the result of a job that could not be stored: a few tries, then it is lost, as its ack warned."""
        channel, target, began = job.channel, job.callback, time.monotonic()
        for tries in range(1, TRIES_FROM_MEMORY + 1):
            if channel not in self._poke.channels:
                break
            message = Message(job.id, job.task, callback_content(content), channel, target, str(job.id))
            with self._counted(job.id, _address(message)):
                receipt = self._post(message)
            log.info("callback", request_id=str(job.id), status=receipt.status, error=receipt.error, durable=False)
            if receipt.delivered:
                return
            then = self._next_try(receipt, channel, tries, time.monotonic() - began)
            if then is None or tries == TRIES_FROM_MEMORY or self._stop.wait(then.wait_seconds):
                break
            channel = then.channel
        log.error("callback_lost", request_id=str(job.id), durable=False)

    # the watch -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
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

    def _cut(self) -> None:
        while not self._left.wait(POLL_SECONDS):  # not the watch's work: that one may be waiting for the database
            self._poke.cut_overdue()

    def _leave(self) -> None:
        self._is_idle(self._seconds_to_leave())
        self._left.set()
        self._poke.close()

    def _seconds_to_leave(self) -> float:
        assert self._leave_at is not None, "stop() comes before"
        return max(0.0, self._leave_at - time.monotonic())

    def _is_idle(self, within: float) -> bool:
        """Whether nothing is being posted any more, in so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._sending, within)

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
            callback = self._claim()
            if callback is None:
                return
            self._begin(callback.id, _address(callback))
            try:
                name = f"sender {callback.job_id}"
                threading.Thread(target=self._send, args=(callback,), name=name, daemon=True).start()
            except BaseException:
                self._end(callback.id)
                raise

    def _claim(self) -> Callback | None:
        """One that is due, unless all senders or those for its receiver are busy."""
        with self._changed:
            sending = dict(self._sending)
        if len(sending) >= SENDERS or self._left.is_set():
            return None
        addresses, hosts = Counter(sending.values()), Counter(host_of(address) for address in sending.values())
        busy = [address for address, number in addresses.items() if number >= PER_RECEIVER]
        due = self._callbacks.claim_due(
            [channel for channel in self._poke.channels if channel not in busy],
            1,
            busy=busy,
            busy_hosts=[host for host, number in hosts.items() if host and number >= PER_HOST],
            not_ids=list(sending),
        )
        return due[0] if due else None

    # the senders -----------------------------------------------------------------------------------------------

    def _send(self, callback: Callback) -> None:
        try:
            self._attempt(callback)
        except StoreUnavailable:
            log.warning("callback_given_up", request_id=str(callback.job_id))  # sent again when its hold lapses
        except Exception:
            log.exception("callback_failed", request_id=str(callback.job_id))
        finally:
            self._end(callback.id)
            self._wake.set()

    def _attempt(self, callback: Callback) -> None:
        message = Message(
            callback.job_id, callback.task, callback.content, callback.channel, callback.target, str(callback.id)
        )
        started = time.monotonic()
        receipt = self._post(message)
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

    def _post(self, message: Message) -> Receipt:
        try:
            return self._poke.send(message)
        except Exception as error:  # a fault of ours must not keep the schedule from going on
            log.exception("post_failed", request_id=str(message.request_id))
            return Receipt(False, None, type(error).__name__)

    def _record(self, callback: Callback, receipt: Receipt, age_seconds: float) -> None:
        if receipt.delivered:
            return self._callbacks.delivered(callback, receipt.status)
        if receipt.is_unsent:
            return self._callbacks.give_back(callback)
        then = self._next_try(receipt, callback.channel, callback.tries, age_seconds)
        if then is None:
            return self._callbacks.dead(callback, receipt.status, receipt.error)
        wait, channel = then.wait_seconds, then.channel
        return self._callbacks.retry(callback, receipt.status, receipt.error, wait_seconds=wait, channel=channel)

    def _next_try(self, receipt: Receipt, channel: Channel, tries: int, age_seconds: float) -> NextTry | None:
        return next_try(
            receipt.status,
            receipt.retry_after_seconds,
            channel=channel,
            tries=tries,
            age_seconds=age_seconds,
            channels=self._poke.channels,
            jitter=random.uniform(0.8, 1.2),
            is_refused=receipt.is_refused,
        )

    # what is under way -----------------------------------------------------------------------------------------

    def _ids(self) -> list[uuid.UUID]:
        with self._changed:
            return list(self._sending)

    def _begin(self, callback_id: uuid.UUID, address: str) -> None:
        with self._changed:
            self._sending[callback_id] = address

    def _end(self, callback_id: uuid.UUID) -> None:
        with self._changed:
            self._sending.pop(callback_id, None)
            self._changed.notify_all()

    @contextmanager
    def _counted(self, callback_id: uuid.UUID, address: str) -> Iterator[None]:
        self._begin(callback_id, address)
        try:
            yield
        finally:
            self._end(callback_id)


def _address(sent: Callback | Message) -> str:
    """Whom a slow answer to this one comes from; the message API is one address."""
    if sent.channel is Channel.CALLBACK and sent.target is not None:
        return sent.target.url
    return Channel.API_MESSAGE
