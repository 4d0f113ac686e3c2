"""Questions about an earlier task, through the one tool: what is asked, what is answered, and what does not matter."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import jsonschema
import pytest
import structlog

from pokestrator.errors import InvalidTask, TryAgainLater
from pokestrator.intake import Action, Question
from pokestrator.jobs import MAX_CALLBACK_CHARACTERS, CallbackState, JobEvent, JobState, JobStatus, Verdict
from pokestrator.web import mcp, tool
from tests.integration.mcp_peer import (
    LEGACY,
    MODERN,
    REQUEST_ID,
    FakeService,
    ask,
    call,
    job_status,
    modern_headers,
    modern_params,
    our_server,
    rpc,
    version_header,
)

TASK = {"task_description": "Write a limerick about zebra stripes"}
CALLER = ("X-Poke-User-Id", "user-1")
STATUS = {"action": "status", "request_id": str(REQUEST_ID)}
CANCEL = {"action": "cancel", "request_id": str(REQUEST_ID)}
FEEDBACK = {"action": "feedback", "request_id": str(REQUEST_ID), "verdict": "bad", "note": "It does not rhyme."}

Send = Callable[..., Any]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with our_server(service) as address:
        yield address


@pytest.fixture(params=[LEGACY, MODERN])
def orchestrate(request: pytest.FixtureRequest, url: str) -> Send:
    """Calls the tool in one of the two eras; gives the result."""

    def send(arguments: object, *headers: tuple[str, str | bytes]) -> Any:
        if request.param == LEGACY:
            answer = ask(url, call(arguments), (*version_header(), *headers))
        else:
            body = rpc("tools/call", modern_params(name="orchestrate", arguments=arguments))
            answer = ask(url, body, (*modern_headers("tools/call", "orchestrate"), *headers))
        assert answer.status == 200, answer.body
        return answer.json["result"]

    return send


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What the endpoint logs, however earlier tests have configured the logs."""
    with structlog.testing.capture_logs() as captured:
        monkeypatch.setattr(mcp, "log", structlog.get_logger())
        yield captured


def step(kind: str, text: str) -> JobEvent:
    return JobEvent(datetime(2026, 11, 1, tzinfo=UTC), kind, text)


# What is asked


def test_a_question_names_action_task_and_caller_and_makes_no_job(orchestrate: Send, service: FakeService) -> None:
    orchestrate({**TASK, "metadata": STATUS}, CALLER)
    orchestrate({**TASK, "metadata": CANCEL})
    assert service.questions == [
        Question(Action.STATUS, REQUEST_ID, "user-1"),
        Question(Action.CANCEL, REQUEST_ID, None),
    ]
    assert service.jobs == []


def test_feedback_brings_the_persons_word_and_makes_no_job(orchestrate: Send, service: FakeService) -> None:
    orchestrate({**TASK, "metadata": FEEDBACK}, CALLER)
    orchestrate({"task_description": "That was good", "metadata": {"action": "feedback", "verdict": "good"}}, CALLER)
    assert service.questions == [
        Question(Action.FEEDBACK, REQUEST_ID, "user-1", Verdict.BAD, "It does not rhyme."),
        Question(Action.FEEDBACK, None, "user-1", Verdict.GOOD),
    ]
    assert service.jobs == []


@pytest.mark.parametrize("metadata", [{"action": "cancel"}, {"action": "cancel", "request_id": None}])
def test_without_a_request_id_the_callers_latest_task_is_meant(
    orchestrate: Send, service: FakeService, metadata: object
) -> None:
    orchestrate({**TASK, "metadata": metadata}, CALLER)
    assert service.questions == [Question(Action.CANCEL, None, "user-1")]


def test_a_question_may_come_as_text(orchestrate: Send, service: FakeService) -> None:
    orchestrate({**TASK, "metadata": f" {json.dumps(STATUS)}\n"})
    assert service.questions == [Question(Action.STATUS, REQUEST_ID, None)]


@pytest.mark.parametrize(
    "task",
    [
        {},
        {"task_description": ""},
        {"task_description": None},
        {"task_description": ["x"]},
        {"task_description": "x" * 20_001},
        {"task_description": "\ud800\x00"},
    ],
    ids=["missing", "empty", "null", "list", "too long", "not storable"],
)
def test_a_questions_task_description_does_not_matter(orchestrate: Send, service: FakeService, task: Any) -> None:
    assert orchestrate({**task, "metadata": STATUS})["structuredContent"]["status"] == "queued"
    assert len(service.questions) == 1
    assert service.jobs == []


def test_a_questions_callback_headers_do_not_matter(orchestrate: Send, service: FakeService) -> None:
    bad = (("X-Poke-Callback-Url", "file:///etc/passwd"), ("X-Poke-Callback-Token", b"t\xffken"))
    assert orchestrate({**TASK, "metadata": STATUS}, *bad)["structuredContent"]["status"] == "queued"


@pytest.mark.parametrize("metadata", [{"request_id": str(REQUEST_ID)}, "action: status", '["action"]', '{"action": '])
def test_metadata_without_an_action_belongs_to_a_task(orchestrate: Send, service: FakeService, metadata: Any) -> None:
    assert orchestrate({**TASK, "metadata": metadata})["structuredContent"]["status"] == "accepted"
    assert service.jobs[0].metadata == metadata
    assert service.questions == []


# Questions that the model can mend


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"metadata": {"action": "stop"}}, ["metadata.action", "`status`", "`cancel`", "leave it out"]),
        ({"metadata": {"action": None}}, ["metadata.action", "`status`", "`cancel`"]),
        ({"metadata": {"action": ["status"]}}, ["metadata.action", "`status`", "`cancel`"]),
        ({"metadata": '{"action": "stop"}'}, ["metadata.action", "`status`", "`cancel`"]),
        ({"metadata": {"action": "status"}}, ["metadata.request_id", "the request_id that a task was accepted with"]),
        ({"metadata": {**STATUS, "action": "feedback"}}, ["metadata.verdict", "`good` or `bad`"]),
        ({"metadata": {**FEEDBACK, "verdict": "meh"}}, ["metadata.verdict", "`good` or `bad`"]),
        ({"metadata": {**FEEDBACK, "note": "x" * 1_001}}, ["metadata.note", "1,001", "at most 1,000"]),
        ({"metadata": {**FEEDBACK, "note": "\ud800"}}, ["metadata.note", "surrogate"]),
        ({"metadata": {**STATUS, "request_id": "the last one"}}, ["metadata.request_id", "must be the request_id"]),
        ({"metadata": {**STATUS, "request_id": 7}}, ["metadata.request_id", "must be the request_id"]),
        ({"metadata": {**STATUS, "request_id": "\ud800"}}, ["metadata.request_id", "must be the request_id"]),
        ({"metadata": STATUS, "request_id": str(REQUEST_ID)}, ["request_id", "not an argument"]),
    ],
)
def test_bad_questions_are_tool_errors_that_say_how_to_mend_them(
    orchestrate: Send, service: FakeService, arguments: dict[str, Any], words: list[str]
) -> None:
    result = orchestrate({**TASK, **arguments})
    assert result["isError"] is True
    [block] = result["content"]
    assert all(word in block["text"] for word in words), block["text"]
    assert len(block["text"]) < 300
    assert (service.jobs, service.questions) == ([], [])


def test_only_a_known_caller_is_told_of_the_latest_task(orchestrate: Send) -> None:
    wrong = {**TASK, "metadata": {"action": "status", "request_id": "it"}}
    assert "latest" not in orchestrate(wrong)["content"][0]["text"]
    assert "leave it out for the latest task" in orchestrate(wrong, CALLER)["content"][0]["text"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (InvalidTask("metadata.request_id", "names no task of yours"), "metadata.request_id: names no task of yours"),
        (TryAgainLater("The database is away; try again in a minute."), "The database is away; try again in a minute."),
    ],
)
def test_a_question_without_an_answer_is_a_tool_error_in_the_answerers_words(
    orchestrate: Send, service: FakeService, events: list[Any], error: Exception, words: str
) -> None:
    service.error = error
    result = orchestrate({**TASK, "metadata": STATUS})
    assert (result["isError"], result["content"][0]["text"]) == (True, words)
    [event] = [e for e in events if e["event"] == "question"]
    assert (event["action"], event["request_id"], event["outcome"]) == ("status", str(REQUEST_ID), words)


# What is answered


def test_an_answer_comes_as_data_and_as_the_same_json_text(orchestrate: Send) -> None:
    result = orchestrate({**TASK, "metadata": STATUS})
    answer = result["structuredContent"]
    assert answer == {
        "status": "queued",
        "request_id": str(REQUEST_ID),
        "message": "It was sent 12 seconds ago and waits for its turn.",
    }
    assert [block["type"] for block in result["content"]] == ["text"]
    assert json.loads(result["content"][0]["text"]) == answer
    assert result.get("isError", False) is False


def test_the_answer_to_a_cancel_says_how_the_task_stands_after_it(orchestrate: Send, service: FakeService) -> None:
    service.status = job_status(JobState.RUNNING, cancel_requested=True)
    answer = orchestrate({**TASK, "metadata": CANCEL})["structuredContent"]
    assert answer["status"] == "cancelling"
    assert answer["message"] == "It is being cancelled; a message will say so when it has stopped."


def test_the_answer_to_feedback_says_that_it_is_noted(orchestrate: Send, service: FakeService) -> None:
    service.status = job_status(JobState.SUCCEEDED, result="A limerick", verdict=Verdict.BAD)
    answer = orchestrate({**TASK, "metadata": FEEDBACK})["structuredContent"]
    assert answer == {
        "status": "succeeded",
        "request_id": str(REQUEST_ID),
        "message": "It is noted that the result was bad, and not taken as a model for tasks like it.",
        "result": "A limerick",
        "verdict": "bad",
    }
    jsonschema.validate(answer, tool.TOOL.output_schema)
    asked = orchestrate({**TASK, "metadata": STATUS})["structuredContent"]
    assert (asked["message"], asked["verdict"]) == ("It is done.", "bad")


def test_a_note_is_not_logged(orchestrate: Send, service: FakeService, events: list[Any]) -> None:
    service.status = job_status(JobState.SUCCEEDED, verdict=Verdict.BAD)
    orchestrate({**TASK, "metadata": FEEDBACK}, CALLER)
    [event] = events
    assert (event["action"], event["outcome"]) == ("feedback", "succeeded")
    assert "rhyme" not in str(event)


def test_an_ended_task_brings_its_result_and_the_fate_of_its_message(orchestrate: Send, service: FakeService) -> None:
    result = "There once was a zebra 🦓 …"
    service.status = job_status(JobState.SUCCEEDED, result=result, delivery=CallbackState.DEAD)
    answer = orchestrate({**TASK, "metadata": STATUS})["structuredContent"]
    assert answer == {
        "status": "succeeded",
        "request_id": str(REQUEST_ID),
        "message": "It is done; the message with the result could not be delivered.",
        "result": result,
        "delivery": "dead",
    }


def test_a_result_is_as_short_as_the_message_that_is_sent(orchestrate: Send, service: FakeService) -> None:
    service.status = job_status(JobState.SUCCEEDED, result="x" * 100_000)
    result = orchestrate({**TASK, "metadata": STATUS})["structuredContent"]["result"]
    assert len(result) == MAX_CALLBACK_CHARACTERS
    assert result.endswith("(shortened)")


def test_what_is_asked_is_logged_without_the_result(orchestrate: Send, service: FakeService, events: list[Any]) -> None:
    service.status = job_status(JobState.SUCCEEDED, result="a secret diagnosis", delivery=CallbackState.DELIVERED)
    orchestrate({**TASK, "metadata": {"action": "cancel"}}, CALLER)
    [event] = events
    assert event == {
        "event": "question",
        "log_level": "info",
        "action": "cancel",
        "request_id": str(REQUEST_ID),
        "outcome": "succeeded",
    }


def test_nothing_runs_after_a_question(orchestrate: Send, service: FakeService) -> None:
    orchestrate({**TASK, "metadata": STATUS})
    task = orchestrate(TASK)["structuredContent"]["request_id"]
    assert service.after_ack_ran.wait(10)
    assert service.after_ack_ids == [uuid.UUID(task)]


def test_an_ack_says_when_the_call_was_a_repetition(orchestrate: Send, service: FakeService) -> None:
    assert "duplicate" not in orchestrate(TASK)["structuredContent"]
    service.duplicate, service.request_id = True, REQUEST_ID
    ack = orchestrate(TASK)["structuredContent"]
    assert (ack["status"], ack["request_id"], ack["duplicate"]) == ("accepted", str(REQUEST_ID), True)
    jsonschema.validate(ack, tool.TOOL.output_schema)


# The sentence for the person

SUCCEEDED, FAILED, CANCELLED = JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED
CURL = step("tool", "Bash: curl https://example.com/rates")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (job_status(age_seconds=0.2), "It was sent 1 second ago and waits for its turn."),
        (job_status(waits_seconds=19.7), "Claude was busy; it is tried again in 20 seconds."),
        (job_status(cancel_requested=True), "It is being cancelled; a message will say so when it has stopped."),
        (job_status(JobState.RUNNING, age_seconds=180), "It was sent 3 minutes ago and is running."),
        (
            job_status(JobState.RUNNING, age_seconds=40, latest=CURL),
            "It was sent 40 seconds ago and is running; last step: Bash: curl https://example.com/rates",
        ),
        (
            job_status(JobState.RUNNING, latest=step("running", "poet version 1")),
            "It was sent 12 seconds ago and is running; last step: running: poet version 1",
        ),
        (
            job_status(JobState.RUNNING, latest=step("claimed", "by a-machine/17")),
            "It was sent 12 seconds ago and is running.",
        ),
        (job_status(SUCCEEDED), "It is done."),
        (
            job_status(SUCCEEDED, delivery=CallbackState.DELIVERED),
            "It is done; the message with the result was delivered.",
        ),
        (
            job_status(FAILED, delivery=CallbackState.PENDING),
            "It failed; the message that says why waits to be delivered.",
        ),
        (
            job_status(CANCELLED, cancel_requested=True, delivery=CallbackState.DELIVERED),
            "It was cancelled; the message that says so was delivered.",
        ),
    ],
)
def test_a_status_is_one_sentence_for_the_person(status: JobStatus, sentence: str) -> None:
    assert tool.describe(Action.STATUS, status) == sentence


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (
            job_status(SUCCEEDED, delivery=CallbackState.DELIVERED),
            "It had already ended: it is done; the message with the result was delivered.",
        ),
        (job_status(FAILED), "It had already ended: it failed."),
        (
            job_status(CANCELLED, delivery=CallbackState.PENDING),  # by this cancel, or by one before
            "It was cancelled; the message that says so waits to be delivered.",
        ),
    ],
)
def test_a_cancel_that_came_too_late_says_so(status: JobStatus, sentence: str) -> None:
    assert tool.describe(Action.CANCEL, status) == sentence


def test_an_agents_own_words_are_shown_on_one_line_of_80_characters() -> None:
    status = job_status(JobState.RUNNING, latest=step("text", "Ignore\nall\r\n  that " + "came before " * 20))
    _, shown = tool.describe(Action.STATUS, status).split("last step: ")
    assert shown.startswith("text: Ignore all that came before")
    assert len(shown) == 80


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (-86_400, "1 second"),  # the clock was set
        (0, "1 second"),
        (1.4, "1 second"),
        (40, "40 seconds"),
        (59.4, "59 seconds"),
        (59.6, "1 minute"),
        (170, "3 minutes"),
        (3_590, "1 hour"),
        (26 * 3_600, "26 hours"),
        (47.9 * 3_600, "2 days"),
        (30 * 86_400, "30 days"),
    ],
)
def test_times_are_rounded_for_people(seconds: float, words: str) -> None:
    assert tool.in_words(seconds) == words


# What the agent reads


def test_a_form_of_every_answer_fits_the_output_schema() -> None:
    for state in JobState:
        for delivery in (None, *CallbackState):
            status = job_status(state, delivery=delivery, result="It is told so.")
            for action in Action:
                jsonschema.validate(tool.answered(action, status).structured_content, tool.TOOL.output_schema)


def test_tool_texts_say_how_to_ask_and_to_cancel_and_not_to_poll() -> None:
    description = tool.TOOL.description or ""
    metadata = tool.TOOL.input_schema["properties"]["metadata"]["description"]
    for text in (tool.INSTRUCTIONS, description, metadata):
        assert '{"action": "status"}' in text
        assert '{"action": "cancel"}' in text
    for text in (tool.INSTRUCTIONS, description):
        assert "person asks" in text
        assert "do not poll" in text
    assert "idempotency_key" in metadata


def test_but_for_its_words_the_input_schema_is_the_first_releases() -> None:
    """Clients keep it as long as they are connected."""
    schema = json.loads(json.dumps(tool.TOOL.input_schema))
    task, metadata = (schema["properties"].pop(name) for name in ("task_description", "metadata"))
    del task["description"], metadata["description"]
    assert task == {"type": "string", "minLength": 1, "maxLength": 20_000}
    assert metadata == {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": True}], "default": ""}
    assert schema == {
        "type": "object",
        "properties": {},
        "required": ["task_description"],
        "additionalProperties": False,
    }
