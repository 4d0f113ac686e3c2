"""Daily ceilings: what is reserved, what is spent, and what a job does that would pass them."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pokestrator import service
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import LeaseLost
from pokestrator.intake import new_job
from pokestrator.jobs import Job, JobState, NewJob, Outcome
from pokestrator.runs import ErrorKind, Usage, sentence
from pokestrator.store.budgets import Budgets, Reservation
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.recovery import Recovery
from tests.integration.flow import (
    POET_TASK,
    UNFITTING_TASK,
    Borrowed,
    contents,
    eventually,
    job_row,
    outcome_of,
    rows,
    running,
    settings_for,
    task,
    write_template,
)

MADE, MUST_WAIT, TOO_LATE = Reservation.MADE, Reservation.MUST_WAIT, Reservation.TOO_LATE


@pytest.fixture
def budgets(database: Database) -> Budgets:
    return Budgets(database, 10.0, 4.0)


def running_job(jobs: Jobs, caller: str | None = None, owner: str = "me:1") -> Job:
    job = new_job(f"Task {uuid.uuid4()}", caller=caller)
    jobs.insert(job)
    claimed = jobs.claim_one(job.id, owner, 60)
    assert claimed is not None
    return claimed


def end(jobs: Jobs, job: Job, usd: float) -> None:
    jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done.", usage=Usage(cost_usd=usd)))


def spent(url: str) -> dict[str, float]:
    return {row["caller"]: row["usd"] for row in rows(url, "SELECT caller, usd FROM spending")}


# the store -----------------------------------------------------------------------------------------------------------


def test_what_running_jobs_reserve_and_what_was_spent_fill_a_callers_ceiling(jobs: Jobs, budgets: Budgets) -> None:
    first, second = running_job(jobs, "ann"), running_job(jobs, "ann")
    assert budgets.reserve(first, 3.0) is MADE
    assert budgets.reserve(second, 2.0) is MUST_WAIT
    assert budgets.reserve(running_job(jobs, "ben"), 2.0) is MADE
    end(jobs, first, 1.0)
    assert budgets.reserve(second, 3.0) is MADE
    end(jobs, second, 3.0)
    assert budgets.reserve(running_job(jobs, "ann"), 0.5) is TOO_LATE
    assert budgets.reserve(running_job(jobs), 4.0) is MADE


def test_the_ceiling_for_all_holds_over_all_callers(jobs: Jobs, budgets: Budgets) -> None:
    for caller in ("ann", "ben"):
        job = running_job(jobs, caller)
        assert budgets.reserve(job, 4.0) is MADE
        end(jobs, job, 4.0)
    assert budgets.reserve(running_job(jobs, "cem"), 3.0) is TOO_LATE
    holds = running_job(jobs, "cem")
    assert budgets.reserve(holds, 1.5) is MADE
    assert budgets.reserve(running_job(jobs, "dee"), 1.5) is MUST_WAIT


def test_a_job_that_reserves_again_does_so_in_place_of_what_it_had(jobs: Jobs, budgets: Budgets) -> None:
    job = running_job(jobs, "ann")
    assert [budgets.reserve(job, usd) for usd in (3.0, 4.0, 2.0, 4.5)] == [MADE, MADE, MADE, TOO_LATE]


def test_a_job_that_was_lost_reserves_nothing(jobs: Jobs, budgets: Budgets) -> None:
    job = running_job(jobs, "ann")
    jobs.release([job])
    with pytest.raises(LeaseLost):
        budgets.reserve(job, 1.0)


def test_a_run_that_cannot_say_what_it_cost_is_charged_what_it_had_reserved(
    jobs: Jobs, recovery: Recovery, budgets: Budgets, database_url: str
) -> None:
    released, orphan, unknown = (running_job(jobs, name, f"{name}:1") for name in ("ann", "ben", "cem"))
    for job in (released, orphan, unknown):
        assert budgets.reserve(job, 2.0) is MADE
    jobs.release([released])
    recovery.sweep([], dead_owners=["ben:1"])
    recovery.release_unknown("cem:1", [])
    assert spent(database_url) == {"ann": 2.0, "ben": 2.0, "cem": 2.0}
    again = jobs.claim_one(orphan.id, "me:1", 60)
    assert again is not None
    jobs.release([again])  # it had not begun
    assert spent(database_url)["ben"] == 2.0


def test_what_is_tried_again_has_spent_what_it_says(jobs: Jobs, budgets: Budgets, database_url: str) -> None:
    job = running_job(jobs, "ann")
    budgets.reserve(job, 2.0)
    jobs.retry(job, 5, "HTTP 529", Usage(cost_usd=0.25))
    assert spent(database_url) == {"ann": 0.25}
    other = running_job(jobs)
    jobs.interrupt(other, "the slot died", Usage(cost_usd=0.5))
    assert spent(database_url) == {"ann": 0.25, "": 0.5}


def test_yesterday_is_over(jobs: Jobs, budgets: Budgets, database_url: str) -> None:
    job = running_job(jobs, "ann")
    end(jobs, job, 4.0)
    assert budgets.reserve(running_job(jobs, "ann"), 1.0) is TOO_LATE
    rows(database_url, "UPDATE spending SET day = day - 1")
    assert budgets.reserve(running_job(jobs, "ann"), 1.0) is MADE


def test_of_many_that_reserve_at_once_no_more_are_let_in_than_fit(jobs: Jobs, budgets: Budgets) -> None:
    claimed = [running_job(jobs, f"caller {number}") for number in range(16)]
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda job: budgets.reserve(job, 1.0), claimed))
    assert sorted(made) == [MADE] * 10 + [MUST_WAIT] * 6


# the flow ------------------------------------------------------------------------------------------------------------

CENT = {"input_tokens": 100_000}  # of haiku 5.5
CALLER = "f2f4d1d6-1111-4f6e-9f3e-0c2b5cf1a001"


@pytest.fixture
def parts(slots: Slots, tmp_path: Path) -> dict[str, Any]:
    folder = write_template(tmp_path / "templates", model="claude-haiku-5-5", max_budget_usd=0.02)
    return {"claude": Borrowed(slots), "templates_folder": folder}


def of_caller(*steps: dict[str, Any], description: str = POET_TASK) -> NewJob:
    job = task(description, *steps)
    return new_job(job.task, job.metadata, caller=CALLER)


def test_a_spent_day_ends_the_next_task_and_says_when_it_works_again(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]
) -> None:
    settings = settings_for(api, inbox, POKESTRATOR_CALLER_DAILY_BUDGET_USD="0.025")
    with running(settings, database_url, **parts) as application:
        first, second = of_caller({"text": "One.", "usage": CENT}), of_caller({"text": "Two."})
        application.accept(first)
        assert outcome_of(application, first).state is JobState.SUCCEEDED
        assert job_row(database_url, first.id)["cost_usd"] == pytest.approx(0.01, rel=0.01)
        application.accept(second)
        outcome = outcome_of(application, second)
        assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.BUDGET_SPENT)
        assert "tomorrow" in contents(inbox.wait_for(2, 10))[1]
        assert job_row(database_url, second.id)["runs"] == 0
        # Somebody else's day is not over.
        other = task(POET_TASK, {"text": "Three."})
        application.accept(other)
        assert outcome_of(application, other).text == "Three."


def test_a_task_waits_for_what_another_run_holds_and_then_runs(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "BUDGET_WAIT", 0.2)
    settings = settings_for(api, inbox, POKESTRATOR_CALLER_DAILY_BUDGET_USD="0.03")
    with running(settings, database_url, **parts) as application:
        first, second = of_caller({"text": "One.", "delay": 2}), of_caller({"text": "Two."})
        application.accept(first)
        assert eventually(lambda: job_row(database_url, first.id)["reserved_usd"])
        application.accept(second)
        assert outcome_of(application, second).text == "Two."
        row = job_row(database_url, second.id)
        assert (row["runs"], row["api_retries"], row["interruptions"]) == (1, 0, 0)
        assert "waits" in [event.kind for event in application.history.timeline(second.id)]


def test_what_the_route_has_cost_is_part_of_the_run_and_not_beside_it(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]
) -> None:
    settings = settings_for(api, inbox, POKESTRATOR_DAILY_BUDGET_USD="0.02", POKESTRATOR_FAST_MODEL="claude-haiku-5-5")
    with running(settings, database_url, **parts) as application:
        chosen = {"for": "route", "structured": {"subagent": "sea_poet", "reason": "It rhymes."}}
        job = of_caller(chosen, {"for": "run", "text": "Foam."}, description="Something in rhyme, please")
        application.accept(job)
        assert outcome_of(application, job).text == "Foam."
    assert job_row(database_url, job.id)["reserved_usd"] == pytest.approx(0.02)  # all that a day allows


def test_the_drafters_run_counts_too(api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]) -> None:
    settings = settings_for(api, inbox, POKESTRATOR_FAST_MODEL="claude-haiku-5-5")
    with running(settings, database_url, **parts) as application:
        job = of_caller(description=UNFITTING_TASK)
        application.accept(job)
        assert outcome_of(application, job).state is JobState.SUCCEEDED
        reserved = job_row(database_url, job.id)["reserved_usd"]
        assert reserved == pytest.approx(0.5, abs=0.001)  # for two tries, and what the route has cost
    assert spent(database_url)[CALLER] == pytest.approx(job_row(database_url, job.id)["cost_usd"])
    assert spent(database_url)[CALLER] > 0


def test_no_run_is_allowed_more_than_a_day(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]
) -> None:
    settings = settings_for(api, inbox, POKESTRATOR_DAILY_BUDGET_USD="0.005")
    with running(settings, database_url, **parts) as application:
        job = of_caller({"text": "One.", "usage": CENT})
        application.accept(job)
        outcome = outcome_of(application, job)
        assert (outcome.error, outcome.text) == (ErrorKind.BUDGET_LIMIT, sentence(ErrorKind.BUDGET_LIMIT))
        assert job_row(database_url, job.id)["reserved_usd"] == 0.005
