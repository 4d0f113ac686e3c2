"""What happens to a job whose run did not come to its end: it runs again, within bounds, and says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pokestrator.bootstrap import Application
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.jobs import RAN_AGAIN, JobState
from pokestrator.runs import ErrorKind, sentence
from tests.integration.flow import (
    POET_TASK,
    Borrowed,
    bash,
    contents,
    eventually,
    job_row,
    outcome_of,
    running,
    settings_for,
    task,
    write_template,
)

pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.fixture
def application(
    api: MessagesApi, inbox: Inbox, database_url: str, slots: Slots, tmp_path: Path
) -> Iterator[Application]:
    folder = write_template(tmp_path / "templates")
    settings = settings_for(api, inbox, POKESTRATOR_DATA_DIR=str(tmp_path / "data"))
    with running(settings, database_url, claude=Borrowed(slots), templates_folder=folder) as application:
        yield application


def test_a_run_whose_agent_was_killed_runs_again_and_its_result_says_so(
    application: Application, inbox: Inbox, database_url: str, tmp_path: Path
) -> None:
    been = tmp_path / "been-here"
    once = bash(f"test -e {been} || {{ kill -9 $PPID; sleep 5; }}")
    job = task(POET_TASK, once, {"text": "Waves and light."})
    application.accept(job)
    assert eventually(lambda: job_row(database_url, job.id)["interruptions"], 30)
    been.touch()
    outcome = outcome_of(application, job, 30)
    assert (outcome.state, outcome.text) == (JobState.SUCCEEDED, f"Waves and light.\n\n{RAN_AGAIN}")
    assert contents(inbox.wait_for(1, 10)) == [outcome.text]
    row = job_row(database_url, job.id)
    assert (row["interruptions"], row["runs"], row["claim_seq"]) == (1, 2, 2)
    assert "interrupted" in [event.kind for event in application.history.timeline(job.id)]


def test_the_third_interruption_fails_the_job(application: Application, inbox: Inbox, database_url: str) -> None:
    job = task(POET_TASK, bash("kill -9 $PPID; sleep 5"))
    application.accept(job)
    outcome = outcome_of(application, job, 60)
    assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.INTERRUPTED)
    [told] = contents(inbox.wait_for(1, 10))
    assert told.startswith(sentence(ErrorKind.INTERRUPTED))
    assert job_row(database_url, job.id)["runs"] == 3


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 429, "type": "rate_limit_error"}, ErrorKind.RATE_LIMITED),
        ({"status": 529, "type": "overloaded_error"}, ErrorKind.OVERLOADED),
        ({"status": 500, "type": "api_error"}, ErrorKind.API_ERROR),
        ({"cut": True}, ErrorKind.STREAM_CUT),
    ],
    ids=["429", "529", "500", "cut"],
)
def test_transient_trouble_of_the_api_is_tried_twice_more(
    application: Application, inbox: Inbox, database_url: str, fault: dict[str, Any], kind: ErrorKind
) -> None:
    job = task(POET_TASK, fault)
    application.accept(job)
    outcome = outcome_of(application, job, 60)
    assert (outcome.state, outcome.error) == (JobState.FAILED, kind)
    row = job_row(database_url, job.id)
    assert (row["api_retries"], row["runs"], row["interruptions"]) == (2, 3, 0)
    [told] = contents(inbox.wait_for(1, 10))
    assert told == f"{sentence(kind)}\n\n{RAN_AGAIN}"


def test_trouble_that_is_over_by_the_next_try_is_only_told_as_a_second_run(
    application: Application, inbox: Inbox, database_url: str
) -> None:
    # The CLI itself asks three times a run.
    job = task(POET_TASK, {"status": 529, "type": "overloaded_error", "times": 3}, {"text": "Calm sea."})
    application.accept(job)
    outcome = outcome_of(application, job, 60)
    assert (outcome.state, outcome.text) == (JobState.SUCCEEDED, f"Calm sea.\n\n{RAN_AGAIN}")
    assert job_row(database_url, job.id)["api_retries"] == 1


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ({"status": 400, "type": "invalid_request_error"}, ErrorKind.API_ERROR),
        ({"refusal": True}, ErrorKind.REFUSAL),
    ],
    ids=["400", "refusal"],
)
def test_what_would_only_happen_again_is_not_repeated(
    application: Application, database_url: str, fault: dict[str, Any], kind: ErrorKind
) -> None:
    job = task(POET_TASK, fault)
    application.accept(job)
    outcome = outcome_of(application, job, 45)
    assert (outcome.state, outcome.error) == (JobState.FAILED, kind)
    row = job_row(database_url, job.id)
    assert (row["runs"], row["api_retries"], row["interruptions"]) == (1, 0, 0)
    assert RAN_AGAIN not in outcome.text
