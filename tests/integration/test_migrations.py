"""Migrations on real PostgreSQL: processes that boot at once, edited files, files that fail, and the enums."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path

import pytest

from pokestrator.errors import StoreUnavailable
from pokestrator.jobs import CallbackState, Channel, JobState, Route, Verdict
from pokestrator.runs import ErrorKind
from pokestrator.store.migrate import Migration, MigrationChanged, load_migrations, migrate
from pokestrator.store.pool import Database
from pokestrator.subagents import Author, Origin, State
from tests.integration.flow import Forwarder, rows

ROOT = Path(__file__).parents[2]

# Each process says that it is ready, waits for the word to go, and prints what it has applied.
BOOT = """
import sys
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Database
database = Database(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for name in migrate(database):
    print(name)
"""


def applied(url: str) -> list[str]:
    return [str(row["name"]) for row in rows(url, "SELECT name FROM schema_migrations ORDER BY number")]


def tables(url: str) -> set[str]:
    return {str(row["tablename"]) for row in rows(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")}


def test_eight_processes_that_boot_at_once_apply_each_migration_once(empty_database_url: str) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", BOOT, empty_database_url],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for process in started:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=30) for process in started]
    assert [process.returncode for process in started] == [0] * 8, [errors for _, errors in ended]
    names = [migration.name for migration in load_migrations()]
    assert Counter(name for output, _ in ended for name in output.split()) == Counter(names)
    assert applied(empty_database_url) == names


def test_a_second_boot_applies_nothing(database_url: str) -> None:
    assert migrate(Database(database_url)) == []


def test_a_migration_that_was_edited_after_it_was_applied_is_refused_by_name(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    migrate(database, [Migration(1, "0001_first", "CREATE TABLE first ()")])
    edited = [Migration(1, "0001_first", "CREATE TABLE other ()"), Migration(2, "0002_next", "CREATE TABLE next ()")]
    with pytest.raises(MigrationChanged, match=r"^0001_first\.sql was changed"):
        migrate(database, edited)
    assert tables(empty_database_url) == {"first", "schema_migrations"}


def test_a_migration_that_fails_is_rolled_back_wholly_and_a_mended_one_applies(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    first = Migration(1, "0001_first", "CREATE TABLE first ()")
    broken = Migration(2, "0002_second", "CREATE TABLE second (); SELECT 1 / 0; CREATE TABLE third ()")
    with pytest.raises(StoreUnavailable, match="division by zero"):
        migrate(database, [first, broken])
    assert tables(empty_database_url) == {"first", "schema_migrations"}
    assert applied(empty_database_url) == ["0001_first"]
    mended = Migration(2, "0002_second", "CREATE TABLE second ()")
    assert migrate(database, [first, mended]) == ["0002_second"]
    assert tables(empty_database_url) == {"first", "second", "schema_migrations"}


def test_numbers_of_migrations_are_unique_and_rise_with_their_names() -> None:
    numbers = [migration.number for migration in load_migrations()]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("enum", "words"),
    [
        ("job_state", JobState),
        ("job_route", Route),
        ("channel", Channel),
        ("callback_state", CallbackState),
        ("subagent_origin", Origin),
        ("version_author", Author),
        ("subagent_state", State),
        ("verdict", Verdict),
        ("error_kind", ErrorKind),
    ],
)
def test_an_enum_of_postgresql_has_the_words_of_its_python_twin(
    database_url: str, enum: str, words: type[StrEnum]
) -> None:
    found = rows(database_url, "SELECT enumlabel FROM pg_enum WHERE enumtypid = %s::regtype ORDER BY 1", enum)
    assert [row["enumlabel"] for row in found] == sorted(words)


def test_every_enum_of_postgresql_has_a_python_twin(database_url: str) -> None:
    found = rows(database_url, "SELECT count(DISTINCT enumtypid) AS enums FROM pg_enum")
    assert found[0]["enums"] == 9


def test_a_server_that_cannot_be_reached_is_store_unavailable(empty_database_url: str) -> None:
    with Forwarder(empty_database_url) as closed, pytest.raises(StoreUnavailable, match="refused"):
        migrate(Database(closed.url))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://usr:hunter@secret2@127.0.0.1:9/db",
        "postgresql://usr:hunter%zz2secret@127.0.0.1:9/db",
        "postgresql://usr:secret2@nowhere.invalid/db",
    ],
)
def test_no_reason_tells_a_password(url: str) -> None:
    with pytest.raises(StoreUnavailable) as raised:
        Database(url).connect()
    assert "secret2" not in str(raised.value)
    assert "hunter" not in str(raised.value)
    assert "2secret" not in str(raised.value)
