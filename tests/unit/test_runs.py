"""What the person is told about each way a run can fail, and how costs add up."""

from __future__ import annotations

import re

import pytest

from pokestrator.runs import ErrorKind, RunRequest, Usage, sentence

LONGEST = 160  # characters: one text message
JARGON = re.compile(
    r"\b(HTTP|JSON|SDK|CLI|SQL|Postgres\w*|database|exception|traceback|lease|callback|slot|subagent|stderr|schema"
    r"|subprocess|process|token|null|None|[45]\d\d)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_error_is_told_in_one_plain_sentence(kind: ErrorKind) -> None:
    text = sentence(kind, timeout_seconds=3_600)
    assert re.fullmatch(r"[A-Z][^.!?\n]*\.", text), "one sentence"
    assert len(text) <= LONGEST
    assert not re.search(r"[{}]|\w_\w", text), "nothing left of a template or of a name in the code"
    assert not JARGON.search(text)


def test_no_two_errors_are_told_alike() -> None:
    assert len({sentence(kind) for kind in ErrorKind}) == len(ErrorKind)


@pytest.mark.parametrize(("seconds", "shown"), [(90, "(90 seconds)"), (89.6, "(90 seconds)"), (3_600.0, "(3600 sec")])
def test_a_timeout_names_its_seconds(seconds: float, shown: str) -> None:
    assert shown in sentence(ErrorKind.TIMEOUT, seconds)


def test_the_sentence_for_a_refused_key_points_at_the_owner_and_for_a_timeout_at_the_task() -> None:
    assert "owner" in sentence(ErrorKind.UNAUTHORIZED)
    assert "smaller task" in sentence(ErrorKind.TIMEOUT, 90)


def test_usage_adds_up_field_by_field() -> None:
    draft = Usage(cost_usd=0.25, input_tokens=100, output_tokens=20, turns=1)
    run = Usage(cost_usd=0.5, input_tokens=1_000, output_tokens=300, turns=4)
    assert draft + run == Usage(0.75, 1_100, 320, 5)
    assert draft + Usage() == draft


def test_missing_credentials_are_named_with_the_command_that_adds_them() -> None:
    one = sentence(ErrorKind.NEEDS_CREDENTIALS, missing=["STRIPE_API_KEY"])
    assert one.startswith("I can't do this without STRIPE_API_KEY: ")
    assert "`python -m pokestrator credentials set STRIPE_API_KEY`" in one
    two = sentence(ErrorKind.NEEDS_CREDENTIALS, missing=["STRIPE_API_KEY", "SHOP_TOKEN"])
    assert "without STRIPE_API_KEY and SHOP_TOKEN: " in two
    assert "`python -m pokestrator credentials set NAME`" in two


def test_a_request_that_is_logged_shows_no_credential() -> None:
    request = RunRequest("Prompt", "System", "haiku", 5.0, variables={"STRIPE_API_KEY": "rk_canary"})
    assert "rk_canary" not in repr(request)
