"""How a job ends, and what of its result is sent."""

from __future__ import annotations

import pytest

from pokestrator.jobs import (
    CANCELLED,
    MAX_CALLBACK_CHARACTERS,
    RAN_AGAIN,
    TOO_LATE,
    JobState,
    Outcome,
    callback_content,
    ending,
)
from pokestrator.runs import ErrorKind, Usage, sentence

DONE = Outcome(JobState.SUCCEEDED, "Three sheep.", usage=Usage(cost_usd=0.1))
FAILED = Outcome(JobState.FAILED, sentence(ErrorKind.TIMEOUT, 90), ErrorKind.TIMEOUT, "after 90 s", Usage(cost_usd=0.1))


# How it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [DONE, FAILED])
@pytest.mark.parametrize("runs", [0, 1])
def test_what_comes_from_the_first_run_ends_the_job_as_it_is(outcome: Outcome, runs: int) -> None:
    assert ending(outcome, cancel_requested=False, runs=runs) == outcome


@pytest.mark.parametrize("outcome", [DONE, FAILED])
def test_what_comes_from_a_second_run_says_that_it_may_have_happened_twice(outcome: Outcome) -> None:
    end = ending(outcome, cancel_requested=False, runs=2)
    assert end.text == f"{outcome.text}\n\n{RAN_AGAIN}"
    assert (end.state, end.error, end.usage) == (outcome.state, outcome.error, outcome.usage)


def test_a_run_that_was_to_be_cancelled_is_cancelled_and_no_failure() -> None:
    end = ending(FAILED, cancel_requested=True, runs=2)
    assert (end.state, end.text, end.error) == (JobState.CANCELLED, CANCELLED, None)
    assert (end.detail, end.usage) == (FAILED.detail, FAILED.usage)


def test_a_run_that_had_succeeded_before_it_could_be_cancelled_is_told_as_done() -> None:
    end = ending(DONE, cancel_requested=True, runs=1)
    assert (end.state, end.text) == (JobState.SUCCEEDED, f"{TOO_LATE}\n\n{DONE.text}")


# What is sent ----------------------------------------------------------------------------------------------------


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


def test_a_shortened_result_of_a_second_run_still_says_so() -> None:
    sent = callback_content("x" * 10_000 + f"\n\n{RAN_AGAIN}")
    assert len(sent) == MAX_CALLBACK_CHARACTERS
    assert sent.endswith(f"xx… (shortened)\n\n{RAN_AGAIN}")
