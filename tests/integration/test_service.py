"""Whole jobs, from accept() to the person's phone: real PostgreSQL, agent slots and CLI; Claude's API is scripted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pokestrator.bootstrap import Application
from pokestrator.claude.pool import Slots
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import Job, JobState, NewJob, Route
from pokestrator.runs import ErrorKind, sentence
from pokestrator.store.shortlist import Shortlists
from pokestrator.subagents import Origin
from tests.integration.flow import (
    POET_TASK,
    UNFITTING_TASK,
    Borrowed,
    bash,
    contents,
    draft,
    eventually,
    job_row,
    outcome_of,
    quiet_task,
    rows,
    running,
    settings_for,
    task,
    write_template,
)

SCARF = draft("scarf_coder", tools=("Bash",)).model_dump(mode="json")
DRAFTS_SCARF = {"structured": SCARF, "for": "draft"}


@pytest.fixture
def parts(slots: Slots, tmp_path: Path) -> dict[str, Any]:
    """What an application is built with here: lent slots and one template."""
    return {"claude": Borrowed(slots), "templates_folder": write_template(tmp_path / "templates")}


@pytest.fixture
def application(api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]) -> Iterator[Application]:
    with running(settings_for(api, inbox), database_url, **parts) as application:
        yield application


def done(application: Application, job: NewJob) -> str:
    """The result of a job that succeeds."""
    acknowledgement = application.accept(job)
    assert acknowledgement.durable
    assert acknowledgement.request_id == job.id
    outcome = outcome_of(application, job)
    assert outcome.state is JobState.SUCCEEDED, outcome
    return outcome.text


# the three roads ---------------------------------------------------------------------------------------------------


def test_a_task_that_a_template_fits_stores_it_and_runs_it(application: Application, inbox: Inbox) -> None:
    assert application.subagents.get("sea_poet") is None
    job = task(POET_TASK, {"text": "The light turns round."}, inbox=inbox)
    assert done(application, job) == "The light turns round."
    assert application.history.road(job.id) == (Route.TEMPLATE, "sea_poet")
    stored = application.subagents.get("sea_poet")
    assert stored is not None
    assert stored.origin is Origin.TEMPLATE
    [received] = inbox.wait_for(1, 10)
    assert (received.channel, received.body) == ("callback", {"content": "The light turns round.", "hasMore": False})


def test_the_second_task_of_a_template_matches_the_stored_subagent(application: Application, api: MessagesApi) -> None:
    done(application, task(POET_TASK, {"text": "One."}))
    second = task(POET_TASK, {"text": "Two."})
    assert done(application, second) == "Two."
    assert application.history.road(second.id) == (Route.MATCH, "sea_poet")
    asked = api.requests[-1].body
    assert "You write poems of at most four lines" in str(asked["system"])
    assert POET_TASK in str(asked["messages"])


def test_the_timeline_says_where_an_agent_could_not_go(application: Application) -> None:
    job = task(POET_TASK, bash("curl -sS https://elsewhere.example/ 2>&1 || true"), {"text": "It is closed."})
    assert done(application, job) == "It is closed."
    refused = [event.text for event in application.history.timeline(job.id) if event.kind == "refused"]
    assert refused == ["elsewhere.example: not in this subagent's hosts; its owner can list it there"]


def test_a_task_that_nothing_fits_builds_a_subagent_and_asks_to_send_it_again(
    application: Application, inbox: Inbox, database_url: str
) -> None:
    first = task(UNFITTING_TASK, DRAFTS_SCARF)
    text = done(application, first)
    assert application.history.road(first.id) == (Route.BUILD_NEW, None)
    [received] = inbox.wait_for(1, 10)
    assert contents([received]) == [text]
    assert "scarf coder" in text
    assert "send the task again" in text
    built = application.subagents.get("scarf_coder")
    assert built is not None
    assert built.definition.system_prompt == SCARF["system_prompt"]
    examples = rows(database_url, "SELECT task FROM subagent_examples ORDER BY created_at, task = %s DESC", first.task)
    assert examples[0]["task"] == UNFITTING_TASK

    second = task(UNFITTING_TASK, {"text": "-.- -. .. -"})
    assert done(application, second) == "-.- -. .. -"
    assert application.history.road(second.id) == (Route.MATCH, "scarf_coder")


def test_with_after_build_run_the_new_subagent_runs_at_once(
    api: MessagesApi, inbox: Inbox, database_url: str, parts: dict[str, Any]
) -> None:
    steps = (DRAFTS_SCARF, {"text": "Here is your scarf.", "for": "run"})
    with running(settings_for(api, inbox, POKESTRATOR_AFTER_BUILD="run"), database_url, **parts) as application:
        job = task(UNFITTING_TASK, *steps)
        assert done(application, job) == "Here is your scarf."
        assert application.subagents.get("scarf_coder") is not None
        inbox.wait_for(1, 10)
    assert contents(inbox.received) == ["Here is your scarf."]
    # Both runs are paid for: 10 tokens in each question.
    assert job_row(database_url, job.id)["input_tokens"] >= 20


def test_two_jobs_that_draft_one_name_end_with_one_subagent(application: Application, database_url: str) -> None:
    tasks = (UNFITTING_TASK, "Say the scarf of my uncle in semaphore flags")
    # The delay keeps both in the drafter at the same time.
    jobs = [task(text, {**DRAFTS_SCARF, "delay": 1}) for text in tasks]
    for job in jobs:
        application.accept(job)
    for job in jobs:
        assert outcome_of(application, job).state is JobState.SUCCEEDED
    assert [subagent.name for subagent in application.subagents.all()] == ["scarf_coder"]
    examples = {row["task"] for row in rows(database_url, "SELECT task FROM subagent_examples")}
    assert set(tasks) <= examples


# building that fails -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_backoff")
def test_while_claude_cannot_be_reached_nothing_is_built_and_the_person_is_told(
    inbox: Inbox, database_url: str, tmp_path: Path
) -> None:
    with MessagesApi() as gone:
        settings = settings_for(gone, inbox, POKESTRATOR_CONCURRENCY="1")
    folder = write_template(tmp_path / "templates")
    with running(settings, database_url, templates_folder=folder) as application:
        job = task(UNFITTING_TASK)
        application.accept(job)
        outcome = outcome_of(application, job, 40)
        inbox.wait_for(1, 10)
        assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.UNREACHABLE)
        assert application.subagents.all() == []
    assert contents(inbox.received) == [sentence(ErrorKind.UNREACHABLE)]  # drafting has no effects that could double


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        # The CLI holds the answer to the JSON Schema and lets the model try again; blanks pass that, and not our rules.
        ({"description": " " * 40}, ErrorKind.INVALID_DRAFT),
        ({"tools": ["Sudo"]}, ErrorKind.NO_OUTPUT),
    ],
    ids=["our rules", "the schema"],
)
def test_a_draft_that_breaks_the_rules_is_not_stored(
    application: Application, inbox: Inbox, changes: dict[str, Any], kind: ErrorKind
) -> None:
    job = task(UNFITTING_TASK, {"structured": {**SCARF, **changes}, "for": "draft"})
    application.accept(job)
    outcome = outcome_of(application, job)
    assert (outcome.state, outcome.error) == (JobState.FAILED, kind), outcome
    assert application.subagents.all() == []
    inbox.wait_for(1, 10)
    assert contents(inbox.received) == [sentence(kind)]


# the record --------------------------------------------------------------------------------------------------------


def test_the_timeline_tells_the_way_of_a_task(application: Application) -> None:
    job = task(POET_TASK, bash("echo  the\necho sea"), {"text": "The\nsea."})
    done(application, job)
    assert eventually(lambda: application.history.timeline(job.id)[-1].kind == "delivered")
    told = [(event.kind, event.text) for event in application.history.timeline(job.id)]
    kinds = [kind for kind, _ in told]
    assert kinds == ["accepted", "claimed", "routed", "running", "tool", "text", "finished", "delivered"]
    said = dict(told)
    assert said["routed"].startswith("template: it equals an example of sea_poet")
    assert said["running"] == "sea_poet version 1"
    assert said["tool"] == "Bash: echo the echo sea"
    assert said["text"] == "The sea."
    assert said["finished"] == "succeeded"


def test_the_timeline_of_a_build_tells_what_was_built(application: Application) -> None:
    job = task(UNFITTING_TASK, DRAFTS_SCARF)
    done(application, job)
    said = {event.kind: event.text for event in application.history.timeline(job.id)}
    assert said["drafting"] == "asking haiku for a new subagent"
    assert said["built"].startswith("scarf_coder: Takes tasks of the kind scarf coder.")


def test_what_a_run_cost_is_stored(application: Application, database_url: str) -> None:
    usage = {"input_tokens": 1_000, "cache_read_input_tokens": 200, "output_tokens": 50}
    job = task(POET_TASK, {**bash("true"), "usage": usage}, {"text": "Done.", "usage": usage})
    done(application, job)
    row = job_row(database_url, job.id)
    assert (row["input_tokens"], row["output_tokens"], row["turns"]) == (2_400, 100, 2)
    assert row["cost_usd"] > 0


def test_metadata_reaches_the_agent(application: Application, api: MessagesApi) -> None:
    done(application, task(POET_TASK, {"text": "Done."}))
    sent = str(api.requests[-1].body["messages"])
    assert f"<task>\\n{POET_TASK}\\n</task>" in sent
    assert "<metadata>\\nJob " in sent


# limits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template_seconds", "service_seconds", "told"), [(5, "30", 5), (3_600, "6", 6)], ids=["lowers", "never raises"]
)
def test_a_template_may_lower_the_time_of_a_run_and_never_raise_it(
    api: MessagesApi,
    inbox: Inbox,
    database_url: str,
    slots: Slots,
    tmp_path: Path,
    template_seconds: int,
    service_seconds: str,
    told: int,
) -> None:
    folder = write_template(tmp_path / "templates", timeout_seconds=template_seconds)
    settings = settings_for(api, inbox, POKESTRATOR_AGENT_TIMEOUT=service_seconds)
    with running(settings, database_url, claude=Borrowed(slots), templates_folder=folder) as application:
        job = task(POET_TASK, {"hang": 60})
        application.accept(job)
        outcome = outcome_of(application, job)
        inbox.wait_for(1, 10)
    assert outcome.error is ErrorKind.TIMEOUT
    assert contents(inbox.received) == [sentence(ErrorKind.TIMEOUT, told)]
    assert job_row(database_url, job.id)["claim_seq"] == 1  # it would only happen again
    assert f"({told} seconds)" in outcome.text


# honest ends -------------------------------------------------------------------------------------------------------


def test_whatever_ends_a_run_the_person_is_told_which(application: Application, inbox: Inbox) -> None:
    ends: dict[ErrorKind, dict[str, Any]] = {
        ErrorKind.UNAUTHORIZED: {"status": 401, "type": "authentication_error"},
        ErrorKind.API_ERROR: {"status": 400, "type": "invalid_request_error"},
        ErrorKind.REFUSAL: {"refusal": True},
        ErrorKind.NO_OUTPUT: {"empty": True},
    }
    jobs = {kind: task(POET_TASK, step) for kind, step in ends.items()}
    for job in jobs.values():
        application.accept(job)
    for kind, job in jobs.items():
        outcome = outcome_of(application, job, 60)
        assert (outcome.state, outcome.error, outcome.text) == (JobState.FAILED, kind, sentence(kind)), outcome
        assert outcome.detail
    told = inbox.wait_for(len(ends), 10)
    got = {received.body["request_id"]: received.body["message"] for received in told}
    assert got == {str(job.id): sentence(kind) for kind, job in jobs.items()}


def test_a_fault_of_ours_is_told_too(application: Application, inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> None:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Shortlists, "find", breaks)
    job = task(POET_TASK, {"text": "Never said."})
    application.accept(job)
    outcome = outcome_of(application, job)
    assert (outcome.error, outcome.detail) == (ErrorKind.INTERNAL, "ZeroDivisionError: a fault of ours")
    inbox.wait_for(1, 10)
    assert contents(inbox.received) == [sentence(ErrorKind.INTERNAL)]


def test_a_task_asked_for_at_a_terminal_sends_nothing(application: Application, inbox: Inbox) -> None:
    # Of an owner of its own, as `run` has: the service gives back what it holds in its name and does not know.
    job = application.jobs.insert_claimed(quiet_task(), "a terminal", 60)
    assert application.service.run_job(job) is None
    outcome = application.history.outcome(job.id)
    assert outcome is not None
    assert outcome.text.startswith("[scripted answer]")
    assert done(application, task(POET_TASK, {"text": "Sent."})) == "Sent."
    assert contents(inbox.wait_for(1, 10)) == ["Sent."]


def test_when_the_instance_leaves_its_run_is_not_told_as_a_crash(
    api: MessagesApi, inbox: Inbox, database_url: str, tmp_path: Path
) -> None:
    folder = write_template(tmp_path / "templates")
    settings = settings_for(api, inbox, POKESTRATOR_CONCURRENCY="1")
    job = task(POET_TASK, {"hang": 60})
    seen = len(api.requests)
    with running(settings, database_url, templates_folder=folder) as leaving:
        leaving.accept(job)
        assert eventually(lambda: len(api.requests) > seen)
    row = job_row(database_url, job.id)
    assert (row["state"], row["interruptions"], row["error_kind"]) == ("queued", 0, None)
    assert inbox.received == []


def test_an_end_that_cannot_be_written_waits_for_the_database(
    application: Application, inbox: Inbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, tries = application.jobs.finish, []

    def away_at_first(job: Job, outcome: Any) -> None:
        tries.append(outcome.text)
        if len(tries) == 1:
            raise StoreUnavailable("connection refused")
        finish(job, outcome)

    monkeypatch.setattr(application.jobs, "finish", away_at_first)
    assert done(application, task(POET_TASK, {"text": "Kept."})) == "Kept."
    assert tries == ["Kept.", "Kept."]
    assert contents(inbox.wait_for(1, 10)) == ["Kept."]


def test_a_run_that_the_database_stopped_is_released_and_not_counted_as_interrupted(
    application: Application, inbox: Inbox, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Shortlists.find
    asked: list[str] = []

    def away_once(*arguments: Any) -> Any:
        asked.append("find")
        if len(asked) == 1:
            raise StoreUnavailable("the connection was lost")
        return find(*arguments)

    monkeypatch.setattr(Shortlists, "find", away_once)
    job = task(POET_TASK, {"text": "After all."})
    application.accept(job)
    assert contents(inbox.wait_for(1, 20)) == ["After all."]
    row = job_row(database_url, job.id)
    assert (row["claim_seq"], row["interruptions"]) == (2, 0)
