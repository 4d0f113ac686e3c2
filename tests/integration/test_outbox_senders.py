"""Many callbacks at once: slow receivers, two instances, leaving."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pokestrator import delivery as delivery_module
from pokestrator.delivery import PER_HOST, PER_RECEIVER, SENDERS, Delivery
from pokestrator.demo.inbox import Inbox
from pokestrator.errors import StoreUnavailable
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget
from pokestrator.poke import api as poke_module
from pokestrator.poke.api import Poke
from pokestrator.store.callbacks import Callback, Callbacks
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import HERE, POKE_KEY, TOKEN, callback_row, captured_logs, contents, eventually, rows
from tests.integration.outbox import change, delivering, failed_once, finished, make_due, reaches

FAR = 1_000.0  # seconds: what polls this seldom acts only when it is woken
SLOW = {"delay": 30}


@pytest.fixture
def inbox() -> Iterator[Inbox]:
    with Inbox(api_key=POKE_KEY) as inbox:
        yield inbox


@pytest.fixture
def slow() -> Iterator[Inbox]:
    """A receiver that answers nobody in the time of a test."""
    with Inbox() as slow:
        slow.answer_with([SLOW] * 100)
        yield slow


def senders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("sender")]


# slow receivers ------------------------------------------------------------------------------------------------------


def test_a_slow_callback_url_holds_up_nobody_elses_callback(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, slow: Inbox
) -> None:
    url = slow.callback_url(TOKEN)
    held_up = [finished(jobs, f"Slow {number}.", url=url) for number in range(PER_RECEIVER + 4)]
    with delivering(database, inbox) as delivery:
        assert len(slow.wait_for(PER_RECEIVER, 10)) == PER_RECEIVER
        started = time.monotonic()
        quick = [finished(jobs, "By message."), finished(jobs, "By callback.", inbox=inbox)]
        delivery.wake()
        for job_id in quick:
            reaches(database_url, job_id, "delivered")
        assert time.monotonic() - started < 15  # a slow one takes 30
        assert len(slow.received) == PER_RECEIVER
    assert sum(callback_row(database_url, job_id)["attempts"] for job_id in held_up) == PER_RECEIVER


def test_a_slow_message_api_holds_up_no_callback_url(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, slow: Inbox
) -> None:
    for number in range(PER_RECEIVER + 4):
        finished(jobs, f"Slow {number}.")
    with delivering(database, slow) as delivery:
        assert len(slow.wait_for(PER_RECEIVER, 10)) == PER_RECEIVER
        quick = finished(jobs, "By callback.", inbox=inbox)
        delivery.wake()
        reaches(database_url, quick, "delivered")
        assert len(slow.received) == PER_RECEIVER


def test_a_slow_host_with_another_url_for_each_callback_leaves_half_of_the_senders_to_others(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, slow: Inbox
) -> None:
    held_up = [finished(jobs, f"Slow {number}.", inbox=slow) for number in range(SENDERS + 4)]
    with delivering(database, inbox) as delivery:
        assert len(slow.wait_for(PER_HOST, 20)) == PER_HOST
        started = time.monotonic()
        quick = [finished(jobs, "By message."), finished(jobs, "By callback.", inbox=inbox)]
        delivery.wake()
        for job_id in quick:
            reaches(database_url, job_id, "delivered")
        assert time.monotonic() - started < 15  # a slow one takes 30
        assert len(slow.wait_for(PER_HOST + 1, 1.5)) == PER_HOST  # a second and more: the poll has looked again
    assert sum(callback_row(database_url, job_id)["attempts"] for job_id in held_up) == PER_HOST


def test_there_are_never_more_senders_than_allowed(jobs: Jobs, database: Database, inbox: Inbox, slow: Inbox) -> None:
    with Inbox() as also_slow:
        also_slow.answer_with([SLOW] * 100)
        for _ in range(PER_HOST):
            finished(jobs, inbox=slow)
            finished(jobs, inbox=also_slow)
        for _ in range(5):
            finished(jobs)
        with delivering(database, inbox):
            assert len(slow.wait_for(PER_HOST, 20)) == len(also_slow.wait_for(PER_HOST, 20)) == PER_HOST
            assert len(senders()) == SENDERS == 2 * PER_HOST
            assert inbox.wait_for(1, 1.5) == []  # a second and more: the poll has looked again
    assert eventually(lambda: senders() == [])


def test_a_receiver_that_is_slow_beyond_the_time_of_a_post_is_broken_off(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, slow: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poke_module, "POST_SECONDS", 0.5)
    monkeypatch.setattr(delivery_module, "POLL_SECONDS", 0.1)
    job_id = finished(jobs, inbox=slow)
    with delivering(database, inbox):
        assert eventually(lambda: callback_row(database_url, job_id)["last_error"])
    row = callback_row(database_url, job_id)
    assert (row["state"], row["last_status"], row["lease_until"]) == ("pending", None, None)
    assert row["last_error"].startswith("broken off after ")
    assert row["last_error"].endswith(" s at 127.0.0.1")


class Hanging(Callbacks):
    """An outbox whose database hangs from the second claim on, or while a delivery is recorded."""

    def __init__(self, database: Database, *, claims: bool = False, records: bool = False) -> None:
        super().__init__(database)
        self.comes_back = threading.Event()
        self.failures = 0
        self._claims_left = 1 if claims else 1_000
        self._records = records

    def claim_due(self, *args: Any, **options: Any) -> list[Callback]:
        if self._claims_left <= 0:
            assert self.comes_back.wait(30)
        claimed = super().claim_due(*args, **options)
        self._claims_left -= len(claimed)
        return claimed

    def delivered(self, callback: Callback, status: int | None) -> None:
        if self._records and not self.comes_back.is_set():
            self.failures += 1
            raise StoreUnavailable("away")
        super().delivered(callback, status)


def test_a_post_that_takes_too_long_is_broken_off_while_the_database_hangs(
    jobs: Jobs, database: Database, database_url: str, slow: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(poke_module, "POST_SECONDS", 0.5)
    monkeypatch.setattr(delivery_module, "POLL_SECONDS", 0.1)
    job_id, outbox = finished(jobs, inbox=slow), Hanging(database, claims=True)
    delivery = Delivery(outbox, Poke(slow.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    delivery.start()
    try:
        assert eventually(failed_once(database_url, job_id))
        assert not outbox.comes_back.is_set()
        assert callback_row(database_url, job_id)["last_error"].startswith("broken off after ")
    finally:
        outbox.comes_back.set()
        delivery.close(0.2)


def test_what_waits_to_be_recorded_is_not_sent_again_by_its_own_process_when_its_hold_lapses(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "POLL_SECONDS", 0.1)
    job_id, outbox = finished(jobs), Hanging(database, records=True)
    delivery = Delivery(outbox, Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    delivery.start()
    try:
        assert eventually(lambda: outbox.failures > 0)
        change(database_url, job_id, "lease_until = now() - interval '1 second'")
        seen = outbox.failures
        assert eventually(lambda: outbox.failures > seen + 10)  # a second: the watch has looked often
        outbox.comes_back.set()
        row = reaches(database_url, job_id, "delivered")
    finally:
        delivery.close(0.2)
    assert row["attempts"] == len(inbox.received) == 1


# two instances -------------------------------------------------------------------------------------------------------


def test_two_deliveries_never_send_one_callback_twice(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    for number in range(50):
        finished(jobs, f"Result {number}.", inbox=inbox if number % 2 else None)
    with delivering(database, inbox), delivering(database, inbox):
        inbox.wait_for(50, 20)
        assert eventually(lambda: not rows(database_url, "SELECT id FROM callbacks WHERE state = 'pending'"))
    assert sorted(contents(inbox.received)) == sorted(f"Result {number}." for number in range(50))
    assert rows(database_url, "SELECT DISTINCT attempts FROM callbacks") == [{"attempts": 1}]


# leaving -------------------------------------------------------------------------------------------------------------


def test_leaving_waits_for_a_receiver_that_answers_soon(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    inbox.answer_with([{"delay": 1}])
    job_id = finished(jobs)
    delivery = Delivery(Callbacks(database), Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    delivery.start()
    assert inbox.wait_for(1, 10)
    delivery.close()
    assert callback_row(database_url, job_id)["state"] == "delivered"


def test_leaving_breaks_a_slow_receiver_off_and_another_instance_sends_it_again(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, slow: Inbox
) -> None:
    job_id = finished(jobs, "Once more.")
    leaving = Delivery(Callbacks(database), Poke(slow.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    leaving.start()
    assert slow.wait_for(1, 10)
    started = time.monotonic()
    leaving.close(0.3)
    assert time.monotonic() - started < 10  # of the 30 that the receiver takes
    assert senders() == []
    assert eventually(lambda: [each for each in threading.enumerate() if each.name.startswith("delivery")] == [])
    row = callback_row(database_url, job_id)
    assert (row["state"], row["lease_until"]) == ("pending", None)
    assert row["last_error"].startswith("broken off after ")
    make_due(database_url)
    with delivering(database, inbox):
        reaches(database_url, job_id, "delivered")
    [first], [second] = slow.received, inbox.received
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"] == str(row["id"])


def test_what_is_due_when_it_leaves_is_still_posted(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_module, "POLL_SECONDS", FAR)
    with delivering(database, inbox) as delivery:
        left = finished(jobs)  # a drain ends its last run, and tells nobody
        delivery.stop()
    assert callback_row(database_url, left)["state"] == "delivered"
    late = finished(jobs)
    delivery.wake()
    assert callback_row(database_url, late)["attempts"] == 0


def test_what_could_not_be_sent_any_more_is_left_to_others_as_if_never_claimed(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    job_id = finished(jobs)
    poke = Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE)
    poke.close()
    Delivery(Callbacks(database), poke).deliver(job_id)
    row = callback_row(database_url, job_id)
    assert (row["state"], row["lease_until"], row["last_error"]) == ("pending", None, None)
    assert row["attempts"] == row["attempts_before"] > 0
    with delivering(database, inbox):
        reaches(database_url, job_id, "delivered")
    assert len(inbox.received) == 1


def test_the_time_to_leave_is_what_the_first_stop_said(
    jobs: Jobs, database: Database, database_url: str, inbox: Inbox
) -> None:
    inbox.answer_with([{"delay": 1.5}])
    job_id = finished(jobs)
    delivery = Delivery(Callbacks(database), Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE))
    delivery.start()
    assert inbox.wait_for(1, 10)
    delivery.stop(10)
    delivery.close(0.1)
    assert callback_row(database_url, job_id)["state"] == "delivered"


def test_a_delivery_that_was_never_started_can_be_closed(database: Database, inbox: Inbox) -> None:
    started = time.monotonic()
    Delivery(Callbacks(database), Poke(inbox.message_url, POKE_KEY, dry_run=False, callback_hosts=HERE)).close()
    assert time.monotonic() - started < 3


# from memory ---------------------------------------------------------------------------------------------------------


def test_from_memory_a_dead_callback_token_falls_back_to_the_message_api(database: Database, inbox: Inbox) -> None:
    target = CallbackTarget(inbox.callback_url(TOKEN), "a-token-that-has-ended")
    with delivering(database, inbox) as delivery:
        delivery.send_from_memory(new_job("a task", callback=target), "The result.")
    assert [(each.channel, each.status) for each in inbox.received] == [("callback", 401), ("api_message", 200)]


@pytest.mark.parametrize("fault", [SLOW, {"status": 503}], ids=["in a POST", "in the wait for the next try"])
def test_stopping_ends_what_is_sent_from_memory(
    database: Database, inbox: Inbox, fault: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox.answer_with([fault])
    with captured_logs(monkeypatch, delivery_module) as logs, delivering(database, inbox) as delivery:
        sender = threading.Thread(target=delivery.send_from_memory, args=(new_job("a task"), "The result."))
        sender.start()
        assert inbox.wait_for(1, 10)
        delivery.stop(0.2)
        sender.join(15)
        assert not sender.is_alive()
    assert [entry["event"] for entry in logs][-1] == "callback_lost"
    assert len(inbox.received) == 1


@pytest.mark.parametrize("status", [400, 302])
def test_what_is_refused_from_memory_is_logged_as_lost(
    database: Database, inbox: Inbox, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox.answer_with([{"status": status}])
    with captured_logs(monkeypatch, delivery_module) as logs, delivering(database, inbox) as delivery:
        delivery.send_from_memory(new_job("a task"), "The result.")
    assert [entry["event"] for entry in logs][-1] == "callback_lost"
    assert len(inbox.received) == 1
