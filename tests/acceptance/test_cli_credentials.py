"""`python -m pokestrator credentials`, as a person uses it."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pokestrator.demo.local import ROOT
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.secrets import KEY_FILE, Vault, new_key
from tests.acceptance.processes import eventually, living
from tests.acceptance.test_cli import Environment, pokestrator
from tests.integration.flow import rows

VALUE = "rk_canary_5d1e8a"


@pytest.fixture
def environment(service_environment: Environment) -> Environment:
    return service_environment


def secrets_in(database_url: str, environment: Environment) -> dict[str, str]:
    """What is stored, decrypted."""
    vault = Vault(environment["POKESTRATOR_SECRET_KEY"])
    return {row["name"]: vault.decrypt(row["secret"]) for row in rows(database_url, "SELECT * FROM credentials")}


def test_a_credential_is_set_overwritten_listed_and_removed(environment: Environment, database_url: str) -> None:
    done = pokestrator("credentials", "set", "STRIPE_API_KEY", environment=environment, stdin=f"{VALUE}\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "STRIPE_API_KEY is stored.\n", "")
    assert secrets_in(database_url, environment) == {"STRIPE_API_KEY": VALUE}

    again = pokestrator("credentials", "set", "STRIPE_API_KEY", environment=environment, stdin=" two\r\nlines\r\n")
    assert again.stdout == "STRIPE_API_KEY is stored; the value it had is overwritten.\n"
    assert secrets_in(database_url, environment) == {"STRIPE_API_KEY": " two\r\nlines"}  # only the last end of line

    listed = pokestrator("credentials", "list", environment=environment)
    name, created, updated = listed.stdout.split()
    assert (name, len(created), len(updated)) == ("STRIPE_API_KEY", 20, 20)
    as_json = json.loads(pokestrator("credentials", "list", "--json", environment=environment).stdout)
    assert as_json == [{"name": name, "created_at": created, "updated_at": updated}]
    other_key = {**environment, "POKESTRATOR_SECRET_KEY": new_key()}
    assert "another POKESTRATOR_SECRET_KEY" in pokestrator("credentials", "list", environment=other_key).stdout

    removed = pokestrator("credentials", "remove", "STRIPE_API_KEY", environment=environment)
    assert (removed.returncode, removed.stdout) == (0, "STRIPE_API_KEY is removed.\n")
    gone = pokestrator("credentials", "remove", "STRIPE_API_KEY", environment=environment)
    assert (gone.returncode, gone.stderr) == (1, "there is no credential of this name\n")
    empty = pokestrator("credentials", "list", environment=environment)
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "There are no credentials.\n")


def test_at_a_terminal_it_asks_and_does_not_show_what_is_typed(environment: Environment, database_url: str) -> None:
    terminal, inner = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "credentials", "set", "STRIPE_API_KEY"],
        env=environment,
        cwd=ROOT,
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    )
    os.close(inner)
    shown = b""
    while b"not shown" not in shown:
        shown += os.read(terminal, 1_000)
    os.write(terminal, f"{VALUE}\n".encode())
    assert process.wait(30) == 0
    shown += os.read(terminal, 1_000)
    os.close(terminal)
    assert b"STRIPE_API_KEY is stored." in shown
    assert VALUE.encode() not in shown
    assert secrets_in(database_url, environment) == {"STRIPE_API_KEY": VALUE}


@pytest.mark.parametrize(
    ("arguments", "stdin", "changed", "code", "said"),
    [
        (["STRIPE_API_KEY"], "\n", {}, 2, "the value is empty"),
        (["STRIPE_API_KEY"], "a\0b", {}, 2, "holds a NUL character"),
        (["STRIPE_API_KEY"], "x" * 40_000, {}, 2, "more than 32 KB"),
        (["stripe"], VALUE, {}, 2, "2 to 64 capital letters"),
        ([], VALUE, {}, 2, "Missing argument 'NAME'"),
        (["STRIPE_API_KEY"], VALUE, {"POKESTRATOR_SECRET_KEY": ""}, 2, "`python -m pokestrator credentials new-key`"),
        (["STRIPE_API_KEY"], VALUE, {"POKESTRATOR_SECRET_KEY": "no key"}, 2, "POKESTRATOR_SECRET_KEY=(secret)"),
        (["STRIPE_API_KEY"], VALUE, {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}, 3, "no database: "),
    ],
    ids=["empty", "NUL", "long", "name", "no name", "no key", "bad key", "no database"],
)
def test_what_is_not_stored_says_why(
    service_environment: Environment,
    database_url: str,
    arguments: list[str],
    stdin: str,
    changed: Environment,
    code: int,
    said: str,
) -> None:
    done = pokestrator("credentials", "set", *arguments, environment={**service_environment, **changed}, stdin=stdin)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert rows(database_url, "SELECT name FROM credentials") == []


def test_new_key_prints_a_key_and_needs_nothing(service_environment: Environment) -> None:
    done = pokestrator("credentials", "new-key", environment={"PATH": service_environment["PATH"]})
    assert (done.returncode, done.stderr) == (0, "")
    assert Vault(done.stdout.strip()).can_store


def test_the_embedded_database_needs_no_key_and_no_service_before_it(service_environment: Environment) -> None:
    with tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        own = {"DATABASE_URL": "", "POKESTRATOR_SECRET_KEY": "", "POKESTRATOR_DATA_DIR": str(data)}
        environment = {**service_environment, **own}
        done = pokestrator("credentials", "set", "STRIPE_API_KEY", environment=environment, stdin=VALUE)
        assert (done.returncode, done.stdout) == (0, "STRIPE_API_KEY is stored.\n"), done.stderr
        assert (data / KEY_FILE).stat().st_mode & 0o777 == 0o600
        server = EmbeddedPostgres(data)
        try:
            stored = {"POKESTRATOR_SECRET_KEY": (data / KEY_FILE).read_text()}
            assert secrets_in(server.url, stored) == {"STRIPE_API_KEY": VALUE}
        finally:
            server.leave()
        (data / KEY_FILE).write_text("broken")
        broken = pokestrator("credentials", "set", "STRIPE_API_KEY", environment=environment, stdin=VALUE)
        assert (broken.returncode, broken.stdout) == (3, "")
        assert f"{data}/{KEY_FILE} is broken" in broken.stderr
        assert eventually(lambda: not living(folder)), living(folder)
