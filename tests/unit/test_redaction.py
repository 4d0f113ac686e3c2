"""Secrets in texts, in all the ways that they may be written there."""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import pytest

from pokestrator.redaction import Redactor, redacted
from pokestrator.settings import Settings
from pokestrator.telemetry import configure_logging, get_logger

SECRET = 'p/ss "word"+Zürich~'
DATA = SECRET.encode()


@pytest.fixture
def restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize(
    "written",
    [
        SECRET,
        json.dumps({"key": SECRET}),
        json.dumps({"key": SECRET}, ensure_ascii=False),
        repr([SECRET]),
        quote(SECRET),
        quote(SECRET, safe=""),
        quote_plus(SECRET),
        DATA.hex(),
        DATA.hex().upper(),
    ],
)
def test_a_secret_is_taken_out_however_it_is_written(written: str) -> None:
    said = Redactor([SECRET])(f"before {written} after")
    assert "[secret]" in said
    assert not any(part in said for part in ("word", "rich", DATA.hex()[8:16]))
    assert said.startswith("before ")
    assert said.endswith(" after")


@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("after", range(3))
def test_base64_gives_nothing_away_wherever_the_secret_stands_in_it(encode: object, before: int, after: int) -> None:
    assert callable(encode)
    written = encode(b"u" * before + DATA + b"v" * after).decode().rstrip("=")
    said = Redactor([SECRET])(written)
    assert "[secret]" in said
    assert len(said.replace("[secret]", "")) <= 4 * (before + after + 2) / 3 + 2


def test_the_longest_secret_goes_first_and_short_ones_are_none() -> None:
    redactor = Redactor(["key-1234", "key-1234-longer", "short"])
    assert redactor("key-1234-longer key-1234 short") == "[secret] [secret] short"
    assert Redactor()("anything") == "anything"


def test_secrets_of_a_run_are_known_for_as_long_as_it_lasts() -> None:
    redactor = Redactor(["the-first-secret"])
    with redactor.also(["the-second-secret", "the-first-secret"]):
        with redactor.also(["the-second-secret"]):
            assert redactor("the-second-secret") == "[secret]"
        assert redactor("the-second-secret") == "[secret]"
    assert redactor("the-second-secret the-first-secret") == "the-second-secret [secret]"


def test_a_value_of_json_is_redacted_all_through() -> None:
    value = {"a": ["the-secret-value", {"the-secret-value": 1}], "b": None, "c": 2.5}
    assert redacted(value, Redactor(["the-secret-value"])) == {"a": ["[secret]", {"[secret]": 1}], "b": None, "c": 2.5}


def test_the_password_of_a_database_is_a_secret_of_its_own() -> None:
    settings = Settings.from_environ(
        {
            "DATABASE_URL": "postgresql://me:p%40ssword-1@db.example/app",
            "POKE_API_KEY": "poke-key-1",
            "HTTPS_PROXY": "http://me:proxy-password@proxy:3128",
        }
    )
    redactor = Redactor(settings.secret_values())
    for secret in ("p%40ssword-1", "p@ssword-1", "poke-key-1", "proxy-password"):
        assert redactor(f"it is {secret}.") == "it is [secret]."


@pytest.mark.usefixtures("restored_logging")
def test_no_line_of_the_log_holds_a_secret() -> None:
    out = io.StringIO()
    configure_logging("INFO", out, redact=Redactor([SECRET, "another-secret"]))
    get_logger("test").info("event", field=SECRET, other={"nested": SECRET})
    logging.getLogger("some.library").warning("it said %s", SECRET)
    try:
        raise ValueError(f"refused another-secret {SECRET}")
    except ValueError:
        get_logger("test").exception("failed")
    lines = out.getvalue().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["event", "it said [secret]", "failed"]
    assert "another-secret" not in out.getvalue()
    assert "rich" not in out.getvalue()
