"""What `orchestrate` takes as a task, and what of a result is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pokestrator.errors import InvalidTask
from pokestrator.jobs import (
    MAX_CALLBACK_CHARACTERS,
    MAX_METADATA_BYTES,
    CallbackTarget,
    Channel,
    callback_content,
    new_job,
)

TARGET = CallbackTarget("https://poke.com/callback/1", "token")
LONE_SURROGATES = ["\ud800", "\udbff", "\udc00", "\udfff"]


def refused(field: str, task: object = "count my sheep", metadata: object = "") -> str:
    """What is said about a task that must be refused for `field`."""
    with pytest.raises(InvalidTask) as caught:
        new_job(task, metadata)
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.problem}"
    return caught.value.problem


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


# The way back ----------------------------------------------------------------------------------------------------


def test_a_result_goes_to_the_address_the_request_carried_or_else_to_the_message_api() -> None:
    assert new_job("x", callback=TARGET).channel is Channel.CALLBACK
    assert new_job("x").channel is Channel.API_MESSAGE


def test_a_channel_that_was_asked_for_wins() -> None:
    assert new_job("x", channel=Channel.NONE).channel is Channel.NONE
    job = new_job("x", callback=TARGET, channel=Channel.API_MESSAGE, caller="someone")
    assert (job.channel, job.callback, job.caller) == (Channel.API_MESSAGE, TARGET, "someone")


@pytest.mark.parametrize("letter", ["x", "🦓"])
def test_a_result_of_up_to_4000_characters_is_sent_whole(letter: str) -> None:
    result = letter * MAX_CALLBACK_CHARACTERS
    assert callback_content(result) == result
    assert callback_content("") == ""


def test_a_longer_result_is_shortened_to_4000_characters_and_says_so() -> None:
    sent = callback_content("🦓" * (MAX_CALLBACK_CHARACTERS + 1))
    assert len(sent) == MAX_CALLBACK_CHARACTERS
    assert sent.startswith("🦓🦓")
    assert sent.endswith("🦓… (shortened)")
