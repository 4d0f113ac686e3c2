"""Logs as they come out: one line an event, JSON for machines, readable for people."""

from __future__ import annotations

import io
import json
import logging
import re
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest
import structlog

from pokestrator.telemetry import configure_logging, get_logger, one_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Colour(StrEnum):
    RED = "red"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Logging is the process's own: what a test sets up must not reach the next one."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("psycopg.pool", "claude_agent_sdk", "urllib3", "mcp")}
    configuration = structlog.get_config()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.configure(**configuration)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.fixture
def stream() -> io.StringIO:
    out = io.StringIO()
    configure_logging("INFO", out)
    return out


def test_an_event_is_one_line_of_json_with_its_fields(stream: io.StringIO) -> None:
    get_logger("pokestrator.test").info("accepted", request_id="r1", ms=1.5, durable=True, callback=None)
    (line,) = lines_of(stream)
    at = datetime.fromisoformat(line.pop("timestamp"))
    assert abs(datetime.now(UTC) - at) < timedelta(minutes=1)
    assert line == {
        "event": "accepted",
        "level": "info",
        "request_id": "r1",
        "ms": 1.5,
        "durable": True,
        "callback": None,
    }


def test_line_breaks_and_quotes_in_fields_stay_on_the_line(stream: io.StringIO) -> None:
    text = 'first\nsecond\r\n"third" \u2028 🦓 \x00'
    get_logger("pokestrator.test").warning("odd\nevent", text=text)
    assert stream.getvalue().count("\n") == 1
    line = json.loads(stream.getvalue())
    assert (line["event"], line["text"], line["level"]) == ("odd\nevent", text, "warning")


def test_values_that_json_does_not_know_are_written_too(stream: io.StringIO) -> None:
    some_id = uuid.uuid4()
    get_logger("pokestrator.test").info("odd", id=some_id, path=Path("/tmp"), colour=Colour.RED, error=ValueError("x"))
    (line,) = lines_of(stream)
    assert str(some_id) in line["id"]
    assert "/tmp" in line["path"]
    assert line["colour"] == "red"
    assert "ValueError" in line["error"]


def test_an_exception_stays_on_one_line_with_its_traceback(stream: io.StringIO) -> None:
    log = get_logger("pokestrator.test")
    for report in (lambda: log.exception("run_failed", request_id="r1"), lambda: logging.exception("run_failed")):
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            report()
    ours, foreign = lines_of(stream)
    for line in (ours, foreign):
        assert (line["event"], line["level"]) == ("run_failed", "error")
        assert "Traceback" in line["exception"]
        assert "ValueError: first\nsecond" in line["exception"]
    assert ours["request_id"] == "r1"


def test_what_libraries_log_has_the_same_form(stream: io.StringIO) -> None:
    logging.getLogger("some.library").warning("%d of %s", 3, "sheep")
    (line,) = lines_of(stream)
    assert (line["event"], line["level"]) == ("3 of sheep", "warning")
    assert line["timestamp"]


def test_events_below_the_level_are_not_written() -> None:
    out = io.StringIO()
    configure_logging("WARNING", out)
    log = structlog.get_logger("pokestrator.test.quiet")
    log.info("not this")
    log.debug("nor this")
    log.warning("this")
    logging.getLogger("some.library").info("nor this")
    assert [line["event"] for line in lines_of(out)] == ["this"]


def test_libraries_keep_their_insides_to_themselves(stream: io.StringIO) -> None:
    for name in ("claude_agent_sdk", "urllib3", "werkzeug", "mcp"):
        logging.getLogger(name).info("a detail")
        logging.getLogger(f"{name}.inner").info("another detail")
        logging.getLogger(name).warning("trouble")
    assert [line["event"] for line in lines_of(stream)] == ["trouble"] * 4


def test_the_pool_does_not_tell_each_try_of_an_outage(stream: io.StringIO) -> None:
    logging.getLogger("psycopg.pool").warning("error connecting")
    logging.getLogger("psycopg.pool").error("given up")
    assert [line["event"] for line in lines_of(stream)] == ["given up"]


def test_configuring_again_writes_each_event_once() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("INFO", first)
    configure_logging("INFO", second)
    get_logger("pokestrator.test").info("once")
    assert first.getvalue() == ""
    assert [line["event"] for line in lines_of(second)] == ["once"]


def test_in_a_terminal_an_event_is_readable() -> None:
    out = Terminal()
    configure_logging("INFO", out)
    get_logger("pokestrator.test").info("accepted", request_id="r1")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert plain.count("\n") == 1
    assert "accepted" in plain
    assert "request_id=r1" in plain
    assert not plain.lstrip().startswith("{")


def test_in_a_terminal_a_traceback_stays_readable() -> None:
    out = Terminal()
    configure_logging("INFO", out)
    try:
        raise ValueError("broken")
    except ValueError:
        get_logger("pokestrator.test").exception("run_failed")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    assert "run_failed" in plain
    assert "\nTraceback (most recent call last):\n" in plain
    assert "ValueError: broken" in plain


@pytest.mark.parametrize(
    ("text", "limit", "line"),
    [
        ("", 10, ""),
        ("  a\n\tb \r\n c  ", 10, "a b c"),
        ("0123456789", 10, "0123456789"),
        ("0123456789a", 10, "012345678…"),
        ("🦓" * 11, 10, "🦓" * 9 + "…"),
    ],
)
def test_one_line_flattens_and_shortens(text: str, limit: int, line: str) -> None:
    assert one_line(text, limit) == line
    assert len(one_line(text, limit)) <= limit
