"""What the tests of the outbox share: callbacks of jobs that have just ended, and deliveries to an inbox."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pokestrator.delivery import Delivery
from pokestrator.demo.inbox import Inbox
from pokestrator.intake import new_job
from pokestrator.jobs import CallbackTarget, JobState, Outcome
from pokestrator.poke.api import Poke
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import HERE, POKE_KEY, TOKEN, callback_row, eventually, rows


@contextmanager
def delivering(
    database: Database, inbox: Inbox, *, key: str | None = POKE_KEY, dry_run: bool = False
) -> Iterator[Delivery]:
    delivery = Delivery(Callbacks(database), Poke(inbox.message_url, key, dry_run=dry_run, callback_hosts=HERE))
    delivery.start()
    try:
        yield delivery
    finally:
        delivery.close(0.2)


def finished(
    jobs: Jobs, text: str = "Done.", *, inbox: Inbox | None = None, token: str = TOKEN, url: str | None = None
) -> uuid.UUID:
    """A job that has just ended; with `inbox` or `url` it wants its answer at a callback address."""
    address = inbox.callback_url(TOKEN) if inbox else url
    target = CallbackTarget(address, token) if address else None
    job = jobs.insert_claimed(new_job("A task with a result", callback=target), "me", 60)
    jobs.finish(job, Outcome(JobState.SUCCEEDED, text))
    return job.id


def change(url: str, job_id: uuid.UUID, assignments: str) -> None:
    """Write to a job's callback from outside."""
    rows(url, f"UPDATE callbacks SET {assignments} WHERE job_id = %s", job_id)


def make_due(url: str) -> None:
    rows(url, "UPDATE callbacks SET next_attempt_at = now() WHERE state = 'pending'")


def reaches(url: str, job_id: uuid.UUID, state: str, timeout: float = 15) -> dict[str, Any]:
    """The callback's row, once it has this state."""

    def there() -> dict[str, Any] | None:
        row = callback_row(url, job_id)
        return row if row["state"] == state else None

    row = eventually(there, timeout)
    assert row, callback_row(url, job_id)
    return dict(row)


def failed_once(url: str, job_id: uuid.UUID) -> Callable[[], bool]:
    return lambda: callback_row(url, job_id)["last_error"] is not None


def wait_left(url: str, job_id: uuid.UUID) -> float:
    """Seconds until the next try."""
    query = "SELECT extract(epoch FROM next_attempt_at - now())::float AS left FROM callbacks WHERE job_id = %s"
    return float(rows(url, query, job_id)[0]["left"])
