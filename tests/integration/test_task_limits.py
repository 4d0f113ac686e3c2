"""Tasks per caller: so many a minute, a day and at once, counted where all workers and instances meet."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pokestrator.errors import TooManyTasks
from pokestrator.intake import TaskLimits, new_job
from pokestrator.jobs import Channel, JobState, NewJob, Outcome
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from tests.integration.flow import rows

LIMITS = TaskLimits(per_minute=3, per_day=5, unfinished=4)


@pytest.fixture
def limited(database: Database) -> Jobs:
    return Jobs(database, limits=LIMITS)


def call(caller: str | None = "u-1", metadata: object = "", channel: Channel | None = None) -> NewJob:
    """A task that repeats no other."""
    return new_job(f"Task {uuid.uuid4()}", metadata, caller=caller, channel=channel)


def send(jobs: Jobs, count: int, caller: str | None = "u-1") -> list[uuid.UUID]:
    return [jobs.insert(call(caller)) for _ in range(count)]


def refusal(jobs: Jobs, caller: str | None = "u-1") -> tuple[str, int, float | None]:
    with pytest.raises(TooManyTasks) as refused:
        jobs.insert(call(caller))
    return refused.value.limit, refused.value.most, refused.value.wait_seconds


def let_pass(url: str, time: str) -> None:
    """Let all that was stored be older by `time`."""
    rows(url, f"UPDATE jobs SET created_at = created_at - interval '{time}', run_at = run_at - interval '{time}'")


def end_all(jobs: Jobs) -> None:
    for job in jobs.claim("me", 20, 100):
        jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done."))


def stored(url: str) -> int:
    [row] = rows(url, "SELECT count(*) AS jobs FROM jobs")
    return int(row["jobs"])


def test_one_more_in_a_minute_is_refused_and_stores_nothing(limited: Jobs, database_url: str) -> None:
    send(limited, 3)
    let_pass(database_url, "40 seconds")
    limit, most, wait = refusal(limited)
    assert (limit, most) == ("minute", 3)
    assert wait is not None and 10 < wait <= 20
    assert stored(database_url) == 3
    assert len(rows(database_url, "SELECT 1 FROM job_events")) == 3
    let_pass(database_url, "20 seconds")
    send(limited, 1)


def test_a_day_is_counted_too_whether_or_not_the_tasks_have_ended(limited: Jobs, database_url: str) -> None:
    for _ in range(2):
        send(limited, 2)
        end_all(limited)
        let_pass(database_url, "2 hours")
    send(limited, 1)
    let_pass(database_url, "19 hours")
    limit, most, wait = refusal(limited)
    assert (limit, most) == ("day", 5)
    assert wait is not None and 3_500 < wait <= 3_600
    let_pass(database_url, "1 hour")
    send(limited, 2)


def test_tasks_under_way_are_counted_until_they_end(limited: Jobs, database_url: str) -> None:
    send(limited, 3)
    let_pass(database_url, "2 minutes")
    send(limited, 1)
    assert refusal(limited) == ("unfinished", 4, None)
    end_all(limited)
    send(limited, 1)


def test_callers_have_limits_of_their_own_and_those_without_a_name_share_one(limited: Jobs) -> None:
    send(limited, 3, "u-1")
    send(limited, 3, "u-2")
    send(limited, 3, None)
    assert [refusal(limited, caller)[0] for caller in ("u-1", "u-2", None)] == ["minute"] * 3


def test_a_repetition_is_answered_beyond_every_limit(limited: Jobs) -> None:
    own_key = new_job("Book a table", {"idempotency_key": "dinner"}, caller="u-1")
    same_words = call()
    anonymous = call(None)
    for job in (own_key, same_words, anonymous):
        limited.insert(job)
    send(limited, 1)
    send(limited, 2, None)
    assert refusal(limited)[0] == refusal(limited, None)[0] == "minute"
    assert limited.insert(new_job("Again", {"idempotency_key": "dinner"}, caller="u-1")) == own_key.id
    assert limited.insert(new_job(same_words.task, caller="u-1")) == same_words.id
    assert limited.insert(anonymous) == anonymous.id  # the answer to its COMMIT was lost


def test_a_terminal_has_no_limit_and_uses_up_nobodys(limited: Jobs) -> None:
    for _ in range(8):
        limited.insert_claimed(call(None, channel=Channel.NONE), "terminal", 20)
    send(limited, 3, None)
    limited.insert_claimed(call(None, channel=Channel.NONE), "terminal", 20)


@pytest.fixture
def instances(database_url: str) -> Iterator[list[Jobs]]:
    """Two instances on one database."""
    opened = [Database(database_url, max_size=6) for _ in range(2)]
    for database in opened:
        database.open()
    yield [Jobs(database, limits=LIMITS) for database in opened]
    for database in opened:
        database.close()


@pytest.mark.parametrize("caller", ["u-1", None])
def test_many_at_once_on_two_instances_get_no_more_than_one_alone(
    instances: list[Jobs], database_url: str, caller: str | None
) -> None:
    def is_accepted(number: int) -> bool:
        try:
            instances[number % 2].insert(call(caller))
        except TooManyTasks:
            return False
        return True

    with ThreadPoolExecutor(12) as callers:
        accepted = list(callers.map(is_accepted, range(36)))
    assert sum(accepted) == stored(database_url) == 3


def test_tasks_from_before_the_clock_went_back_are_not_held_against_anybody(limited: Jobs, database_url: str) -> None:
    send(limited, 3)
    let_pass(database_url, "-1 hour")
    send(limited, 1)
