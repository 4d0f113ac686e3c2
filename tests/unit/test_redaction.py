"""Secrets in texts, in all the ways that they may be written there."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from urllib.parse import quote, quote_plus

import pytest

from pokestrator.redaction import Redactor, passwords, redacted
from pokestrator.settings import Settings
from pokestrator.store.secrets import new_key
from pokestrator.telemetry import configure_logging, get_logger, log_uncaught_errors

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
        quote(SECRET, safe="!'()*"),
        quote(SECRET, safe="").replace("%2F", "%2f").replace("%2B", "%2b").replace("%C3%BC", "%c3%bc"),
        "".join(f"%{byte:02x}" for byte in DATA),
        DATA.hex(),
        DATA.hex().upper(),
        DATA.hex(" "),
        "\n".join(textwrap.wrap(DATA.hex(), 7)),
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


@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.parametrize("width", [1, 7, 64, 76])
@pytest.mark.parametrize("encode", [base64.b64encode, bytes])
def test_a_secret_that_is_broken_into_lines_is_taken_out_whole(
    encode: Callable[[bytes], bytes], width: int, in_json: bool
) -> None:
    secret = "sk-ant-api03-" + "aB3_x-Y9" * 12
    printed = encode(f"A=b\nKEY={secret}\nC=d\n".encode()).decode()
    lines = "\r\n".join(printed[start : start + width] for start in range(0, len(printed), width))
    said = Redactor([secret])(json.dumps(lines) if in_json else lines)
    assert "[secret]" in said
    left = "".join((json.loads(said) if in_json else said).split()).replace("[secret]", "")
    assert len(left) <= len(encode(b"A=b\nKEY=\nC=d\n")) + 4


PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqh/iG9w0B\nAQEFAASCBKcwggSj+gEAAoIB\n-----END PRIVATE KEY-----\n"
KEY_FILE = json.dumps({"type": "service_account", "private_key": PEM, "project": "an-ordinary-name"}, indent=2)


@pytest.mark.parametrize(
    "written",
    [
        PEM,
        PEM.strip(),
        " ".join(PEM.split()),  # echo $KEY
        PEM.replace("\n", "\r\n"),
        textwrap.indent(PEM, "    "),
        json.dumps(json.dumps({"key": PEM})),
        base64.b64encode(PEM.strip().encode()).decode(),
        base64.encodebytes(PEM.encode()).decode(),
        PEM.encode().hex(),
    ],
)
@pytest.mark.parametrize("secret", [PEM, KEY_FILE], ids=["a key", "a key's file"])
def test_a_key_of_several_lines_is_taken_out_whatever_becomes_of_its_line_ends(secret: str, written: str) -> None:
    said = Redactor([secret])(f"<{written}>")
    assert "[secret]" in said
    assert len("".join(said.split())) < 40


def test_what_is_no_key_in_a_key_file_may_be_said() -> None:
    assert Redactor([KEY_FILE])("service_account, an-ordinary-name") == "service_account, an-ordinary-name"


def test_the_password_in_an_address_is_a_secret_wherever_the_address_comes_from() -> None:
    redactor = Redactor(["postgresql://me:pass%2Fword-1@db.example/app"])
    assert redactor('password authentication failed for "pass/word-1"').endswith('"[secret]"')


def test_a_secret_in_the_name_of_a_host_is_found_although_names_are_written_small() -> None:
    assert Redactor(["sk-Mixed-CASE-0123"])("sk-mixed-case-0123.evil.example") == "[secret].evil.example"


def test_text_around_a_broken_secret_keeps_its_lines() -> None:
    said = Redactor(["the-secret-value"])("one\n two the-sec\nret-value three\n\nfour\\nfive")
    assert said == "one\n two [secret] three\n\nfour\\nfive"


def test_what_is_learned_stays_known() -> None:
    redactor = Redactor()
    with redactor.also(["the-secret-value"]):
        redactor.learn(["the-secret-value"])
    assert redactor("the-secret-value") == "[secret]"


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


def test_each_key_that_secrets_are_encrypted_with_is_a_secret() -> None:
    new, old = new_key(), new_key()
    redactor = Redactor(Settings.from_environ({"POKESTRATOR_SECRET_KEY": f"{new},{old}"}).secret_values())
    assert redactor(f"{old} and {new}") == "[secret] and [secret]"


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:pass-word-1@db.example/app?note=a@b",
        "postgresql://me@db.example/app?password=pass-word-1",
        "postgresql:///app?host=/run&user=me&password=pass%2Dword-1",
    ],
)
def test_a_password_is_found_wherever_it_stands_in_an_address(address: str) -> None:
    assert "pass-word-1" in passwords(address)
    assert address in passwords(address)
    assert passwords("postgresql://db.example/app") == passwords("http://[") == set()


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


@pytest.mark.usefixtures("restored_logging")
def test_an_error_that_nobody_catches_is_logged_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored after
    out = io.StringIO()
    configure_logging("INFO", out, redact=Redactor(["another-secret"]))
    log_uncaught_errors()

    class Broken:
        def __del__(self) -> None:
            raise ValueError("refused another-secret")

    def fails() -> None:
        raise ValueError("refused another-secret")

    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    Broken()
    sys.excepthook(ValueError, ValueError("refused another-secret"), None)
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["uncaught"] * 3
    assert all("refused [secret]" in line["exception"] for line in lines)
    assert "another-secret" not in out.getvalue() + "".join(capfd.readouterr())
