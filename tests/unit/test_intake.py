"""What `orchestrate` takes as a task, as a question about one, and as a repetition of one."""

from __future__ import annotations

import json
import math
import uuid
from typing import Any

import pytest

from pokestrator.errors import InvalidTask
from pokestrator.intake import (
    MAX_KEY_CHARACTERS,
    MAX_METADATA_BYTES,
    MAX_METADATA_LEVELS,
    MAX_NOTE_CHARACTERS,
    Action,
    Question,
    new_job,
    question,
    read_metadata,
)
from pokestrator.jobs import CallbackTarget, Channel, Idempotency, Verdict

TARGET = CallbackTarget("https://poke.com/callback/1", "token")
LONE_SURROGATES = ["\ud800", "\udbff", "\udc00", "\udfff"]
REQUEST_ID = uuid.UUID("0b0f6c3e-8d5c-4a55-9d5e-2f4a3c1b7a90")


def refused(field: str, task: object = "count my sheep", metadata: object = "") -> str:
    """What is said about a task that must be refused for `field`."""
    with pytest.raises(InvalidTask) as caught:
        new_job(task, metadata)
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.problem}"
    return caught.value.problem


def unanswerable(field: str, metadata: object, caller: str | None = None) -> str:
    """What is said about a question that must be refused for `field`."""
    with pytest.raises(InvalidTask) as caught:
        question(metadata, caller=caller)
    assert caught.value.field == field
    return caught.value.problem


def repeated(task: str = "count my sheep", metadata: object = "", caller: str | None = "someone") -> Idempotency:
    """What names the calls that this one may repeat."""
    idempotency = new_job(task, metadata, caller=caller).idempotency
    assert idempotency is not None
    return idempotency


# The task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        "x",
        "  spaces around stay  ",
        "two\nlines\tand a tab",
        "🦓🧵 limerick, \U0010ffff",
        "naïve Übung 日本語 ‮‭",
        "x" * 20_000,
        "🦓" * 20_000,
        "'; DROP TABLE jobs; --",
    ],
    ids=lambda task: ascii(task[:10]),
)
def test_a_task_is_kept_exactly_as_it_was_sent(task: str) -> None:
    assert new_job(task).task == task


@pytest.mark.parametrize("task", ["", " ", "\n\t \r\n", "\u2003\u00a0"])
def test_a_task_without_a_word_is_refused(task: str) -> None:
    assert "empty" in refused("task_description", task)


@pytest.mark.parametrize("task", [None, 3, True, b"bytes", ["a list"], {"an": "object"}])
def test_a_task_that_is_no_text_is_refused(task: object) -> None:
    assert refused("task_description", task) == "must be text"


def test_a_task_may_have_20000_characters_and_not_one_more() -> None:
    assert len(new_job("🦓" * 20_000).task) == 20_000
    assert refused("task_description", "x" * 20_001) == "has 20,001 characters; at most 20,000 are taken"


def test_a_task_with_a_nul_character_is_refused() -> None:
    assert "U+0000" in refused("task_description", "count\x00sheep")


@pytest.mark.parametrize("surrogate", LONE_SURROGATES)
def test_a_task_with_half_a_surrogate_pair_is_refused(surrogate: str) -> None:
    assert "surrogate" in refused("task_description", f"count {surrogate} sheep")


def test_every_job_has_an_id_of_its_own() -> None:
    assert new_job("the same").id != new_job("the same").id


# Metadata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    ["", "plain words", "🦓", {}, {"a": [1, 2.5, None, True, {"b": "c"}]}, {"": ""}, {"日本": "🧵"}, {"n": 10**30}],
)
def test_metadata_may_be_text_or_any_object(metadata: Any) -> None:
    assert new_job("x", metadata).metadata == metadata


@pytest.mark.parametrize("metadata", [None, 0, 1.5, True, [], ["a"], (), b"bytes"])
def test_metadata_of_another_kind_is_refused(metadata: object) -> None:
    assert refused("metadata", metadata=metadata) == "must be text or an object"


@pytest.mark.parametrize("letter", ["x", "é", "日", "🦓"])
def test_metadata_may_have_16_kilobytes_of_utf8_and_not_one_more(letter: str) -> None:
    quotes = 2  # it is stored as a JSON string
    fitting, rest = divmod(MAX_METADATA_BYTES - quotes, len(letter.encode()))
    metadata = letter * fitting + "." * rest
    assert new_job("x", metadata).metadata == metadata
    assert refused("metadata", metadata=metadata + ".") == "is 16,385 bytes; at most 16,384 (16 KB) are taken"


def test_the_keys_of_metadata_count_too() -> None:
    overhead = len('{"": ""}')
    key = "k" * (MAX_METADATA_BYTES - overhead)
    assert new_job("x", {key: ""}).metadata == {key: ""}
    assert "16,385 bytes" in refused("metadata", metadata={key: "."})


@pytest.mark.parametrize("bad", ["\x00", *LONE_SURROGATES])
@pytest.mark.parametrize("place", ["text", "value", "key", "nested value", "nested key"])
def test_metadata_with_characters_that_cannot_be_stored_is_refused(bad: str, place: str) -> None:
    metadata = {
        "text": bad,
        "value": {"a": f"x{bad}"},
        "key": {f"x{bad}": 1},
        "nested value": {"a": [1, {"b": [bad]}]},
        "nested key": {"a": [{"b": {bad: None}}]},
    }[place]
    problem = refused("metadata", metadata=metadata)
    assert ("U+0000" if bad == "\x00" else "surrogate") in problem


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_metadata_with_a_number_that_is_none_is_refused(number: float) -> None:
    assert "NaN" in refused("metadata", metadata={"a": [number]})


@pytest.mark.parametrize("value", [{1, 2}, object(), b"x", 10**5_000], ids=["set", "object", "bytes", "huge integer"])
def test_metadata_that_json_cannot_carry_is_refused(value: object) -> None:
    assert "JSON cannot carry" in refused("metadata", metadata={"a": value})


def test_metadata_nested_too_deep_is_refused() -> None:
    metadata: dict[str, Any] = {}
    for _ in range(5_000):
        metadata = {"a": metadata}
    assert "JSON cannot carry" in refused("metadata", metadata=metadata)


def test_metadata_that_holds_itself_is_refused() -> None:
    metadata: dict[str, Any] = {}
    metadata["self"] = metadata
    assert "JSON cannot carry" in refused("metadata", metadata=metadata)


def test_metadata_nested_a_level_too_deep_is_refused_with_the_limit() -> None:
    metadata: dict[str, Any] = {}
    for _ in range(MAX_METADATA_LEVELS - 1):
        metadata = {"a": metadata}
    assert new_job("x", metadata).metadata == metadata
    assert refused("metadata", metadata={"a": metadata}) == "is nested more than 100 levels deep"


def test_an_object_in_text_is_taken_up_to_the_same_depth_and_a_deeper_one_breaks_nothing() -> None:
    for depth in range(1, 1_200):  # Python's JSON gives up on the way, at a depth that hangs on who calls it
        text = '{"a":' * depth + "1" + "}" * depth
        try:
            metadata = new_job("x", text, caller="someone").metadata
        except InvalidTask as error:
            assert (error.field, depth >= MAX_METADATA_LEVELS) == ("metadata", True)
        else:
            assert isinstance(metadata, dict) is (depth < MAX_METADATA_LEVELS)


@pytest.mark.parametrize("value", [{}, {"zone": "Europe/Madrid"}, {"a": [1, None, {"b": "🦓"}]}])
def test_text_that_holds_a_json_object_is_that_object(value: dict[str, Any]) -> None:
    for text in (json.dumps(value), f" \n{json.dumps(value, ensure_ascii=False)}\t"):
        assert read_metadata(text) == value
        assert new_job("x", text).metadata == value


@pytest.mark.parametrize(
    "text",
    ["", "{", "{zone: Madrid}", '{"a": 1} and more', '["a"]', '"a"', "7", "null", "{" * 10_000, '{"a":' * 10_000],
)
def test_text_that_holds_anything_else_stays_text(text: str) -> None:
    assert read_metadata(text) == text
    assert new_job("x", text[:100]).metadata == text[:100]


@pytest.mark.parametrize("value", [None, 7, [1], {"action": "status"}, {"a": '{"b": 1}'}])
def test_what_is_no_text_stays_what_it_is(value: object) -> None:
    assert read_metadata(value) is value


@pytest.mark.parametrize(("text", "why"), [('{"a": "\\u0000"}', "U+0000"), ('{"a": "\\ud800"}', "surrogate")])
def test_an_object_in_text_is_checked_like_any_other(text: str, why: str) -> None:
    assert why in refused("metadata", metadata=text)


# Questions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", [Action.STATUS, Action.CANCEL])
def test_an_action_makes_a_question_whether_object_or_text(action: Action) -> None:
    fields = {"action": action.value, "request_id": str(REQUEST_ID), "zone": "Europe/Madrid"}
    assert question(fields) == Question(action, REQUEST_ID, None)
    assert question(json.dumps(fields), caller="someone") == Question(action, REQUEST_ID, "someone")


@pytest.mark.parametrize(
    "metadata", [None, "", "action", 7, [], ["action"], {}, {"request_id": "x"}, '["action"]', "{"]
)
def test_without_an_action_there_is_no_question(metadata: object) -> None:
    assert question(metadata) is None


@pytest.mark.parametrize("action", ["", "Status", "status ", "stop", None, 7, True, [], {}, ["status"], "\ud800"])
def test_an_unknown_action_is_refused_with_those_that_there_are(action: object) -> None:
    problem = unanswerable("metadata.action", {"action": action, "request_id": str(REQUEST_ID)})
    assert "`status`" in problem
    assert "`cancel`" in problem
    assert "`feedback`" in problem


@pytest.mark.parametrize("metadata", [{"action": "status"}, {"action": "status", "request_id": None}])
def test_without_a_request_id_a_callers_latest_is_meant_and_nobody_elses(metadata: object) -> None:
    assert question(metadata, caller="someone") == Question(Action.STATUS, None, "someone")
    assert unanswerable("metadata.request_id", metadata) == "must be the request_id that a task was accepted with"


@pytest.mark.parametrize("value", ["", "latest", str(REQUEST_ID)[:-1], 7, 10**31, True, [], {}, "\ud800"])
def test_a_request_id_that_is_none_is_refused(value: object) -> None:
    metadata = {"action": "cancel", "request_id": value}
    assert "leave it out for the latest" in unanswerable("metadata.request_id", metadata, caller="someone")
    assert "leave it out" not in unanswerable("metadata.request_id", metadata)


FEEDBACK = {"action": "feedback", "request_id": str(REQUEST_ID), "verdict": "bad"}


@pytest.mark.parametrize("verdict", list(Verdict))
def test_feedback_brings_a_verdict_and_a_note(verdict: Verdict) -> None:
    fields = {**FEEDBACK, "verdict": verdict.value, "note": " It rhymed\ntwice. "}
    assert question(fields) == Question(Action.FEEDBACK, REQUEST_ID, None, verdict, "It rhymed\ntwice.")
    assert question(json.dumps(fields), caller="someone") == Question(
        Action.FEEDBACK, REQUEST_ID, "someone", verdict, "It rhymed\ntwice."
    )


@pytest.mark.parametrize("note", [{}, {"note": None}, {"note": ""}, {"note": " \n"}])
def test_a_verdict_needs_no_note(note: dict[str, object]) -> None:
    asked = question({**FEEDBACK, **note})
    assert asked is not None
    assert (asked.verdict, asked.note) == (Verdict.BAD, "")


@pytest.mark.parametrize("verdict", [None, "", "Good", "bad ", "so so", 1, True, [], ["bad"], {}, "\ud800"])
def test_a_verdict_that_is_none_is_refused_with_those_that_there_are(verdict: object) -> None:
    problem = unanswerable("metadata.verdict", {**FEEDBACK, "verdict": verdict})
    assert "`good` or `bad`" in problem


@pytest.mark.parametrize("note", [7, True, ["no"], {"why": "no"}, "x" * 1_001, "\x00", *LONE_SURROGATES])
def test_a_note_that_is_no_short_text_is_refused(note: object) -> None:
    unanswerable("metadata.note", {**FEEDBACK, "note": note})


def test_a_note_may_have_1000_characters() -> None:
    asked = question({**FEEDBACK, "note": "é" * MAX_NOTE_CHARACTERS})
    assert asked is not None
    assert asked.note == "é" * 1_000


def test_a_verdict_and_a_note_do_not_matter_to_other_questions() -> None:
    fields = {**FEEDBACK, "action": "status", "verdict": 7, "note": 7}
    assert question(fields) == Question(Action.STATUS, REQUEST_ID, None)


# Repetitions -----------------------------------------------------------------------------------------------------


def test_the_same_task_of_the_same_caller_is_a_repetition_for_two_minutes_while_it_is_unfinished() -> None:
    first, second = repeated(metadata={"a": 1, "b": 2}), repeated(metadata={"b": 2, "a": 1})
    assert first == second
    assert (first.seconds, first.while_unfinished) == (120, True)


def test_metadata_counts_alike_as_text_and_as_the_object_it_holds() -> None:
    assert repeated(metadata='{"zone": "Europe/Madrid"}') == repeated(metadata={"zone": "Europe/Madrid"})


@pytest.mark.parametrize(
    "other", [{"task": "count my sheep."}, {"metadata": "x"}, {"metadata": {}}, {"caller": "someone else"}]
)
def test_another_task_other_metadata_or_another_caller_make_another_task(other: dict[str, Any]) -> None:
    assert repeated(**other).key != repeated().key


def test_an_unknown_callers_words_are_never_taken_for_a_repetition() -> None:
    assert new_job("count my sheep").idempotency is None


def test_a_key_of_the_callers_own_names_the_task_for_a_day_whatever_its_words() -> None:
    first = repeated("count my sheep", {"idempotency_key": "k-1", "zone": "Europe/Madrid"})
    assert first == repeated("count my goats", '{"idempotency_key": "k-1"}')
    assert (first.seconds, first.while_unfinished) == (86_400, False)


def test_keys_are_each_callers_own() -> None:
    keys = {repeated(metadata={"idempotency_key": "k-1"}, caller=caller).key for caller in ("a", "b", None)}
    keys.add(repeated(metadata={"idempotency_key": "k-2"}, caller="a").key)
    assert len(keys) == 4


def test_a_key_is_not_taken_for_the_words_of_a_task() -> None:
    assert repeated("k-1").key != repeated("x", {"idempotency_key": "k-1"}).key


@pytest.mark.parametrize("key", ["", " \n", "k" * (MAX_KEY_CHARACTERS + 1), 7, True, ["k"], {"k": 1}])
def test_a_key_that_is_no_short_text_is_refused(key: object) -> None:
    assert "1 to 200 characters" in refused("metadata.idempotency_key", metadata={"idempotency_key": key})


def test_a_null_key_counts_as_left_out() -> None:
    assert new_job("x", {"idempotency_key": None}).idempotency is None
    assert repeated(metadata={"idempotency_key": None}).while_unfinished is True


def test_a_key_is_kept_only_as_a_digest() -> None:
    assert len(repeated(metadata={"idempotency_key": "🦓" * MAX_KEY_CHARACTERS}).key) == 64


# The way back ----------------------------------------------------------------------------------------------------


def test_a_result_goes_to_the_address_the_request_carried_or_else_to_the_message_api() -> None:
    assert new_job("x", callback=TARGET).channel is Channel.CALLBACK
    assert new_job("x").channel is Channel.API_MESSAGE


def test_a_channel_that_was_asked_for_wins() -> None:
    assert new_job("x", channel=Channel.NONE).channel is Channel.NONE
    job = new_job("x", callback=TARGET, channel=Channel.API_MESSAGE, caller="someone")
    assert (job.channel, job.callback, job.caller) == (Channel.API_MESSAGE, TARGET, "someone")
