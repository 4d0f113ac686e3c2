"""What the CLI says where the API gave no status; the other outcomes are tested with the CLI itself."""

from __future__ import annotations

import pytest

from pokestrator.claude.outcomes import Ending, failure, result_of
from pokestrator.runs import ErrorKind


@pytest.mark.parametrize(
    ("prose", "kind"),
    [
        (
            "API Error: Connection refused — a firewall or proxy may be blocking it (ECONNREFUSED)",
            ErrorKind.UNREACHABLE,
        ),
        ("API Error: Can't reach the API server — check your internet or DNS (ENOTFOUND)", ErrorKind.UNREACHABLE),
        ("API Error: Connection to the API was lost (ECONNRESET). This is usually temporary", ErrorKind.STREAM_CUT),
        ("API Error: JSON Parse error: Unterminated string", ErrorKind.STREAM_CUT),
        ("API Error: Request timed out.", ErrorKind.TIMEOUT),
        ("API Error: Claude's response exceeded the 128000 output token maximum.", ErrorKind.API_ERROR),
    ],
)
def test_an_api_failure_without_a_status_is_known_by_its_prose(prose: str, kind: ErrorKind) -> None:
    result = result_of(Ending(is_error=True, subtype="success", text=prose), structured_wanted=False)
    assert result.error == kind
    assert result.is_transient == (kind in (ErrorKind.UNREACHABLE, ErrorKind.STREAM_CUT))


def test_a_status_says_more_than_the_prose_around_it() -> None:
    ending = Ending(is_error=True, subtype="success", status=529, text="API Error: 529 the socket timed out")
    assert result_of(ending, structured_wanted=False).error == ErrorKind.OVERLOADED


@pytest.mark.parametrize(
    ("status", "message_error", "is_transient"),
    [
        (408, "unknown", True),
        (503, "server_error", True),
        (529, "server_error", True),
        (404, "invalid_request", False),
        (413, "invalid_request", False),
        (None, "server_error", True),
        (None, "rate_limit", True),
        (None, "overloaded", True),
        (None, "billing_error", False),
        (None, "unknown", False),
    ],
)
def test_trouble_of_the_api_that_may_be_over_in_a_moment_is_transient(
    status: int | None, message_error: str, is_transient: bool
) -> None:
    ending = Ending(is_error=True, subtype="success", status=status, message_error=message_error, text="API Error")
    assert result_of(ending, structured_wanted=False).is_transient == is_transient


def test_a_limit_that_is_reached_in_the_middle_of_api_trouble_is_not_transient() -> None:
    ending = Ending(is_error=True, subtype="error_max_turns", status=529, message_error="overloaded")
    result = result_of(ending, structured_wanted=False)
    assert (result.error, result.is_transient) == (ErrorKind.TURN_LIMIT, False)


def test_a_fault_of_the_cli_is_a_crashed_agent() -> None:
    ending = Ending(is_error=True, subtype="error_during_execution", errors=("out of memory",))
    result = result_of(ending, structured_wanted=False)
    assert (result.error, result.detail) == (ErrorKind.AGENT_CRASHED, "out of memory")


def test_a_detail_is_one_short_line() -> None:
    detail = failure(ErrorKind.INTERNAL, "a\nb " + "c" * 1_000).detail
    assert detail.startswith("a b c")
    assert len(detail) == 500
