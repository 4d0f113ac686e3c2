"""The harness's guards in the database see what a late owner writes, and nothing in what owners and sweepers do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import psycopg
import pytest

from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import Job, JobState, Outcome, Route
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store import jobs as store
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from tests.chaos.postgres import GUARDS, make_role
from tests.integration.flow import rows

LEASE = 20
DONE = Outcome(JobState.SUCCEEDED, "Done.")
FAILED = Outcome(JobState.FAILED, "It took too long.", ErrorKind.TIMEOUT)


@pytest.fixture
def instances(database_url: str) -> Iterator[list[Database]]:
    """Two instances' ways to one guarded database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(GUARDS.encode())
        for role in ("instance_a", "instance_b"):
            make_role(connection, role)
    with ExitStack() as stack:
        parts = urlsplit(database_url)
        opened = []
        for role in ("instance_a", "instance_b"):
            url = parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}").geturl()
            opened.append(Database(url))
            opened[-1].open()
            stack.callback(opened[-1].close)
        yield opened


def violations(url: str) -> list[str]:
    return [str(row["what"]) for row in rows(url, "SELECT what FROM chaos_violations ORDER BY at")]


def taken_from_a_by_b(instances: list[Database], url: str) -> tuple[Job, Job]:
    """A's claim, which is lost, and B's."""
    a, b = instances
    job = new_job("A task", caller="u-1")
    Jobs(a).insert(job)
    [lost] = Jobs(a).claim("ann:1", LEASE, 1)
    rows(url, "UPDATE jobs SET lease_until = now() - interval '1 second'")
    assert Recovery(b).sweep([], expired=True).requeued == (job.id,)
    [owned] = Jobs(b).claim("ben:2", LEASE, 1)
    return lost, owned


def test_what_owners_sweepers_and_callers_do_is_no_violation(instances: list[Database], database_url: str) -> None:
    a, b = instances
    _, owned = taken_from_a_by_b(instances, database_url)
    Jobs(b).record_route(owned, Route.BUILD_NEW, "nothing fits")
    Jobs(b).renew([owned], LEASE)
    Recovery(a).shorten_leases(LEASE / 2)
    History(a).answer(Question(Action.CANCEL, owned.id, "u-1"))
    Jobs(b).finish(owned, FAILED)
    _, owned = taken_from_a_by_b(instances, database_url)
    Jobs(b).retry(owned, 0, "HTTP 529", Usage())
    [again] = Jobs(a).claim("ann:1", LEASE, 1)
    Jobs(a).release([again])
    [again] = Jobs(b).claim("ben:2", LEASE, 1)
    Jobs(b).finish(again, DONE)
    assert violations(database_url) == []


@pytest.mark.parametrize(
    ("write", "seen"),
    [
        (lambda jobs, claim: jobs.finish(claim, DONE), "a result by another than its owner"),
        (lambda jobs, claim: jobs.finish(claim, FAILED), "a failure by another than its owner"),
        (lambda jobs, claim: jobs.retry(claim, 0, "529", Usage()), "a release by another than its owner"),
        (lambda jobs, claim: jobs.release([claim]), "a release by another than its owner"),
        (lambda jobs, claim: jobs.renew([claim], LEASE), "its run was written to by another than its owner"),
    ],
    ids=["result", "failure", "retry", "release", "renewal"],
)
def test_a_write_without_its_fence_is_seen(
    instances: list[Database],
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Jobs, Job], object],
    seen: str,
) -> None:
    lost, _ = taken_from_a_by_b(instances, database_url)
    for name in ("HOLD", "RELEASE", "RENEW"):  # as they would be if somebody had forgotten the fence
        statement = getattr(store, name)
        unfenced = statement.replace("AND claim_seq = %(fence)s ", "").replace("USING (id, claim_seq)", "USING (id)")
        unfenced = unfenced.replace("AND jobs.claim_seq = mine.claim_seq ", "")
        assert unfenced != statement
        monkeypatch.setattr(store, name, unfenced)
    write(Jobs(instances[0]), lost)
    assert violations(database_url) == [seen]
