"""What a person says of a result: through the tool and by the owner, what it changes, and whose word counts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pokestrator.bootstrap import Application
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import InvalidTask, TryAgainLater
from pokestrator.intake import Action, Question, new_job
from pokestrator.jobs import CANCELLED, Channel, Job, JobState, JobStatus, NewJob, Outcome, Route, Verdict
from pokestrator.store.credentials import Credentials
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.secrets import Vault, new_key
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Subagent
from tests.integration.flow import (
    POET_TASK,
    POKE_KEY,
    Borrowed,
    Forwarder,
    eventually,
    job_row,
    outcome_of,
    poet,
    row,
    rows,
    running,
    settings_for,
    task,
    write_template,
)
from tests.integration.lessons import (
    DONE,
    FAILED,
    begun,
    done,
    examples,
    found_by,
    put_on_probation,
    remembered,
    state_of,
    trusted,
)
from tests.integration.mcp_peer import ask, call, our_server, version_header

BUOY = "Describe how a buoy rocks in fog"
CALLER = "u-1"
KEY = new_key()
GOOD, BAD = Verdict.GOOD, Verdict.BAD


@pytest.fixture
def subagent(subagents: Subagents) -> Subagent:
    return subagents.adopt(poet())


def judge(
    history: History, verdict: Verdict, job: uuid.UUID | None = None, note: str = "", *, caller: str | None = CALLER
) -> JobStatus | None:
    return history.answer(Question(Action.FEEDBACK, job, caller, verdict, note))


def told(history: History, job: Job) -> list[str]:
    return [event.text for event in history.timeline(job.id) if event.kind == "feedback"]


# what a verdict changes ----------------------------------------------------------------------------------------------


def test_a_bad_verdict_takes_the_example_away_and_a_good_one_brings_it_back(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    job = done(jobs, subagent, BUOY, caller=CALLER)
    for _ in range(2):
        status = judge(history, BAD, job.id, "It did not rock.")
        assert status is not None
        assert (status.request_id, status.state, status.result, status.verdict) == (
            job.id,
            JobState.SUCCEEDED,
            DONE.text,
            BAD,
        )
        assert remembered(database_url, subagent) == {}
        assert found_by(database_url, "buoy") == []
    for _ in range(2):
        status = judge(history, GOOD, job.id)
        assert status is not None
        assert status.verdict is GOOD
        assert remembered(database_url, subagent) == {BUOY: 0}
        assert found_by(database_url, "buoy") == [subagent.name]
    assert told(history, job) == ["bad: It did not rock.", "good"]


def test_a_verdict_is_kept_with_its_note_and_its_time(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    job = done(jobs, subagent, BUOY, caller=CALLER)
    judge(history, BAD, job.id, "It did not\x1b[2J\nrock.")
    kept = job_row(database_url, job.id)
    assert (kept["verdict"], kept["verdict_note"]) == ("bad", "It did not\x1b[2J\nrock.")
    assert told(history, job) == ["bad: It did not·[2J rock."]
    judge(history, BAD, job.id)
    assert job_row(database_url, job.id) == kept  # said again: nothing is new
    judge(history, BAD, job.id, "It sank.")
    again = job_row(database_url, job.id)
    assert (again["verdict_note"], again["verdict_at"] > kept["verdict_at"]) == ("It sank.", True)
    judge(history, GOOD, job.id)
    assert job_row(database_url, job.id)["verdict_note"] is None


def test_a_bad_verdict_takes_away_the_remembered_example_that_the_task_was_like(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    done(jobs, subagent, BUOY, caller="another")
    second = done(jobs, subagent, BUOY.upper(), caller=CALLER)
    assert remembered(database_url, subagent) == {BUOY: 1}
    judge(history, BAD, second.id)
    assert remembered(database_url, subagent) == {}
    judge(history, GOOD, second.id)
    assert remembered(database_url, subagent) == {BUOY.upper(): 0}


@pytest.mark.parametrize("praised_before", [True, False])
def test_an_example_stays_that_another_persons_praise_vouches_for(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent, praised_before: bool
) -> None:
    first = done(jobs, subagent, BUOY, caller="another")
    second = done(jobs, subagent, BUOY, caller=CALLER)
    if praised_before:
        judge(history, GOOD, first.id, caller="another")
        judge(history, BAD, second.id)
    else:  # the first taught it, the second vouches for it now
        judge(history, GOOD, second.id)
        judge(history, BAD, first.id, caller="another")
    assert remembered(database_url, subagent) == {BUOY: 0}
    judge(history, BAD, (first if praised_before else second).id, caller="another" if praised_before else CALLER)
    assert remembered(database_url, subagent) == {}


def test_a_given_example_stays_and_counts_as_before_the_job(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    before = examples(database_url, subagent)
    job = done(jobs, subagent, POET_TASK, caller=CALLER)
    assert examples(database_url, subagent) != before
    for _ in range(2):
        judge(history, BAD, job.id)
        assert examples(database_url, subagent) == before
    judge(history, GOOD, job.id)
    assert examples(database_url, subagent)[POET_TASK] == ("template", 1)
    assert row(database_url, "SELECT job_id FROM subagent_examples WHERE task = %s", POET_TASK)["job_id"] is None


def test_praise_brings_back_an_example_that_had_to_leave(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    job = done(jobs, subagent, BUOY, caller=CALLER)
    rows(database_url, "DELETE FROM subagent_examples WHERE task = %s", BUOY)
    judge(history, GOOD, job.id)
    assert remembered(database_url, subagent) == {BUOY: 0}


def test_what_holds_a_secret_is_not_remembered_for_praise_either(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    job = done(jobs, subagent, BUOY, caller=CALLER, outcome=replace(DONE, holds_secret=True))
    for verdict in (GOOD, BAD, GOOD):
        judge(history, verdict, job.id)
        assert remembered(database_url, subagent) == {}
    assert job_row(database_url, job.id)["verdict"] == "good"


def test_a_verdict_on_the_task_that_a_subagent_was_built_for_changes_no_example(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    before = examples(database_url, subagent)
    job = done(jobs, subagent, POET_TASK, caller=CALLER, route=Route.BUILD_NEW)
    for verdict in (BAD, GOOD, BAD):
        judge(history, verdict, job.id)
        assert examples(database_url, subagent) == before


def test_a_job_of_no_subagent_may_be_judged(jobs: Jobs, history: History, database_url: str) -> None:
    job = jobs.insert_claimed(new_job(BUOY, caller=CALLER), "me", 60)
    jobs.finish(job, DONE)
    status = judge(history, BAD, job.id)
    assert status is not None
    assert status.verdict is BAD


# probation -----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_judged_bad_does_not_count_for_the_end_of_a_probation(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    put_on_probation(database_url, subagent)
    first = done(jobs, subagent, BUOY, caller=CALLER)
    judge(history, BAD, first.id)
    second = done(jobs, subagent, "Tell of mermaids", caller=CALLER)
    assert state_of(database_url, subagent) == "probation"
    judge(history, GOOD, first.id)  # on second thoughts
    assert state_of(database_url, subagent) == "active"
    assert (trusted(history, first), trusted(history, second)) == (True, False)
    judge(history, BAD, first.id)
    assert state_of(database_url, subagent) == "active"


# whose word, and on what ---------------------------------------------------------------------------------------------


def test_without_an_id_the_callers_task_is_meant_that_ended_last(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    assert judge(history, BAD) is None
    early = begun(jobs, subagent, BUOY, caller=CALLER)
    late = done(jobs, subagent, "Tell of mermaids", caller=CALLER)
    done(jobs, subagent, "Sing of gulls", caller="another")
    begun(jobs, subagent, "Sing of hulls", caller=CALLER)
    status = judge(history, BAD)
    assert status is not None
    assert status.request_id == late.id
    jobs.finish(early, DONE)
    status = judge(history, GOOD)
    assert status is not None
    assert (status.request_id, status.verdict) == (early.id, GOOD)
    assert job_row(database_url, late.id)["verdict"] == "bad"


@pytest.mark.parametrize("outcome", [FAILED, Outcome(JobState.CANCELLED, CANCELLED)])
def test_what_has_no_result_is_not_judged(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent, outcome: Outcome
) -> None:
    job = begun(jobs, subagent, BUOY, caller=CALLER)
    for _ in range(2):  # while it runs, and when it has ended
        before, timeline = job_row(database_url, job.id), history.timeline(job.id)
        status = judge(history, GOOD, job.id)
        assert status is not None
        assert (status.state, status.verdict) == (JobState(before["state"]), None)
        assert (job_row(database_url, job.id), history.timeline(job.id)) == (before, timeline)
        if before["state"] == "running":
            jobs.finish(job, outcome)


def test_nobody_judges_the_jobs_of_others(jobs: Jobs, history: History, database_url: str, subagent: Subagent) -> None:
    mine = done(jobs, subagent, BUOY, caller=CALLER)
    nobodys = done(jobs, subagent, BUOY)
    terminals = done(jobs, subagent, BUOY, caller=CALLER, channel=Channel.NONE)
    for job, caller in [(mine, "another"), (mine, None), (nobodys, CALLER), (terminals, CALLER), (terminals, None)]:
        assert judge(history, BAD, job.id, caller=caller) is None
    assert judge(history, BAD, caller=None) is None
    assert judge(history, BAD, uuid.uuid4()) is None
    assert {each["verdict"] for each in rows(database_url, "SELECT verdict FROM jobs")} == {None}
    assert judge(history, BAD, nobodys.id, caller=None) is not None  # by its id


def test_the_owner_judges_any_job(jobs: Jobs, history: History, database_url: str, subagent: Subagent) -> None:
    for number, more in enumerate([{"caller": CALLER}, {}, {"channel": Channel.NONE}]):
        job = done(jobs, subagent, f"Sing of {['gulls', 'hulls', 'kelp'][number]}", **more)  # type: ignore[arg-type]
        status = history.judge(job.id, BAD, "no")
        assert status is not None
        assert status.verdict is BAD
    assert remembered(database_url, subagent) == {}
    assert history.judge(uuid.uuid4(), BAD, "") is None
    running_one = begun(jobs, subagent, BUOY)
    status = history.judge(running_one.id, BAD, "")
    assert status is not None
    assert (status.state, status.verdict) == (JobState.RUNNING, None)


# through the service and its door ------------------------------------------------------------------------------------


@pytest.fixture
def parts(slots: Slots, tmp_path: Path) -> dict[str, Any]:
    return {"claude": Borrowed(slots), "templates_folder": write_template(tmp_path / "templates")}


@pytest.fixture
def application(api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]) -> Iterator[Application]:
    settings = settings_for(api, inbox, POKESTRATOR_SECRET_KEY=KEY)
    with running(settings, database_url, **parts) as application:
        yield application


def ran(application: Application, job: NewJob) -> uuid.UUID:
    """The request_id of a task that was accepted and has succeeded."""
    application.accept(job)
    assert outcome_of(application, job).state is JobState.SUCCEEDED
    return job.id


def feedback(application: Application, metadata: dict[str, object], caller: str = CALLER) -> Any:
    """The tool's result for a call with this action, over HTTP."""
    arguments = {"task_description": "The person says it was so.", "metadata": {"action": "feedback", **metadata}}
    with our_server(DoorTo(application)) as url:  # type: ignore[arg-type]
        return ask(url, call(arguments), (*version_header(), ("X-Poke-User-Id", caller))).json["result"]


class DoorTo:
    """An application as the door knows it, with nothing to do after an answer."""

    def __init__(self, application: Application) -> None:
        self.accept, self.ask = application.accept, application.ask

    def after_ack(self, _request_id: uuid.UUID) -> None: ...


def test_what_a_person_says_comes_through_the_tool(application: Application, database_url: str) -> None:
    first = ran(application, replace(task(POET_TASK, {"text": "One."}), caller=CALLER))
    subagent = application.subagents.get("sea_poet")
    assert subagent is not None
    second = done(application.jobs, subagent, BUOY, caller=CALLER).id
    known = {BUOY: 0}
    assert remembered(database_url, subagent) == known

    answer = feedback(application, {"verdict": "bad", "note": f"It knew {POKE_KEY}."})["structuredContent"]
    assert (answer["status"], answer["request_id"], answer["verdict"]) == ("succeeded", str(second), "bad")
    assert "bad" in answer["message"]
    assert remembered(database_url, subagent) == {}
    assert job_row(database_url, second)["verdict_note"] == "It knew [secret]."
    answer = feedback(application, {"verdict": "good", "request_id": str(second)})["structuredContent"]
    assert (answer["request_id"], answer["verdict"]) == (str(second), "good")
    assert remembered(database_url, subagent) == known
    assert feedback(application, {"verdict": "good", "request_id": str(first)}, "another")["isError"] is True


def test_a_task_with_a_stored_credential_in_it_is_done_and_marked_as_never_to_be_remembered(
    application: Application, database: Database, database_url: str
) -> None:
    assert not job_row(database_url, ran(application, task(POET_TASK, {"text": "So."})))["holds_secret"]
    Credentials(database, Vault(KEY)).set("STRIPE_API_KEY", "lighthouse at dusk")
    job = job_row(database_url, ran(application, task(POET_TASK, {"text": "So."})))
    assert (job["route"], job["result"], job["holds_secret"]) == ("match", "So.", True)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "metadata.request_id: names no task of yours that is still known; leave it out for your latest task"),
        ("running", "metadata.request_id: names a task that has not ended; say what its result is like"),
        ("failed", "metadata.request_id: names a task that failed, so there is no result to judge"),
        ("cancelled", "metadata.request_id: names a task that was cancelled, so there is no result to judge"),
    ],
)
def test_a_verdict_on_no_result_is_an_error_that_says_why(
    application: Application, subagent: Subagent, state: str | None, words: str
) -> None:
    job = begun(application.jobs, subagent, BUOY, caller=CALLER)
    if state not in (None, "running"):
        outcome = FAILED if state == "failed" else Outcome(JobState.CANCELLED, CANCELLED)
        application.jobs.finish(job, outcome)
    with pytest.raises(InvalidTask) as caught:
        application.ask(Question(Action.FEEDBACK, job.id if state else uuid.uuid4(), CALLER, GOOD))
    assert str(caught.value).startswith(words)


def test_without_an_id_the_errors_say_which_task_was_meant(application: Application, subagent: Subagent) -> None:
    asked = Question(Action.FEEDBACK, None, CALLER, BAD)
    with pytest.raises(InvalidTask, match="is missing, and no task of yours has ended"):
        application.ask(asked)
    done(application.jobs, subagent, BUOY, caller=CALLER)
    done(application.jobs, subagent, BUOY, caller=CALLER, outcome=FAILED)
    with pytest.raises(InvalidTask, match="is missing, and your task that ended last failed, so there is no result"):
        application.ask(asked)


def test_while_the_database_is_away_a_verdict_is_to_be_said_again(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]
) -> None:
    asked = Question(Action.FEEDBACK, uuid.uuid4(), CALLER, GOOD)
    with Forwarder(database_url) as road, running(settings_for(api, inbox), road.url, **parts) as application:
        with pytest.raises(TryAgainLater):
            application.ask(asked)
        road.open()
        assert eventually(lambda: application.degraded_because() is None)
        with pytest.raises(InvalidTask):
            application.ask(asked)
