"""Among thousands of subagents the search reads only those that the index finds, and a bounded number of them."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from pokestrator.store import shortlist
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.pool import Database
from pokestrator.store.shortlist import MOST_FOUND, MOST_SCORED, Shortlists
from pokestrator.store.statistics import COUNT_SECONDS, IS_DUE, Statistics
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from tests.conftest import database_named
from tests.integration.test_hot_path_plans import Explained

SIZE = 3 * MOST_FOUND
SHIPPED, _ = load_templates(TEMPLATES_FOLDER)

# All know "write" and "letter", every tenth "garden", and each has a word of its own.
FILL = f"""
SET session_replication_role = replica;
INSERT INTO subagents (name, origin, version, search)
SELECT 'subagent_' || n, 'built', 1, findable('subagent_' || n, 'Writes letters about own' || md5(n::text),
    CASE WHEN n % 10 = 0 THEN 'about my garden' ELSE 'about the sea' END)
FROM generate_series(1, {SIZE}) n;
INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, credentials, hosts,
    digest)
SELECT id, 1, 'owner', 'Writes letters', '', '{{}}', '{{}}', '{{}}', '' FROM subagents;
INSERT INTO subagent_examples (subagent_id, task, source) SELECT id, 'A letter', 'person' FROM subagents;
SET session_replication_role = origin"""


@pytest.fixture(scope="module")
def filled(postgres: EmbeddedPostgres, migrated: str) -> Iterator[str]:
    """The URL of a database with SIZE subagents, counted."""
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres.url, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name} TEMPLATE {migrated} STRATEGY FILE_COPY".encode())
        url = database_named(postgres, name)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(FILL.encode())
            connection.execute("VACUUM ANALYZE")
        database = Database(url)
        database.open()
        Statistics(database).count()
        database.close()
        yield url
        server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def explained(filled: str) -> Iterator[Explained]:
    with psycopg.connect(filled, autocommit=True, row_factory=dict_row) as connection:
        yield Explained(connection)


def own_word(number: int) -> str:
    return "own" + hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for part in plan.get("Plans", ()):
        yield from nodes(part)


def read(explained: Explained, table: str) -> list[tuple[str, float]]:
    """Each reading of a table, in any of the plans: how, and the number of rows."""
    return [
        (node["Node Type"], node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0))
        for _, plan in explained.plans
        for node in nodes(plan)
        if node.get("Relation Name") == table and node["Actual Loops"]
    ]


@pytest.mark.parametrize(
    "task",
    ["xylophone", "write", "write a letter", "write a letter about my garden"],
    ids=["a word that nobody knows", "one common word", "two common words", "a rarer one too"],
)
def test_the_search_finds_by_its_index_and_reads_no_more_than_its_bound(explained: Explained, task: str) -> None:
    Shortlists(explained).find(task, SHIPPED)  # type: ignore[arg-type]
    of_subagents = read(explained, "subagents")
    assert "Bitmap Heap Scan" in {how for how, _ in of_subagents}
    assert {how for how, _ in of_subagents} <= {"Bitmap Heap Scan", "Index Scan", "Index Only Scan"}
    assert max(number for _, number in of_subagents) <= MOST_FOUND
    for table in ("subagent_versions", "subagent_examples", "lexeme_statistics"):
        assert all("Index" in how or "Bitmap" in how for how, _ in read(explained, table)), table
        assert all(number <= MOST_SCORED for _, number in read(explained, table)), table


def test_a_subagent_is_found_by_its_own_word_among_thousands(filled: str) -> None:
    database = Database(filled)
    database.open()
    found = Shortlists(database).find(f"Write a letter about {own_word(4321)}, please", SHIPPED)
    database.close()
    assert found.candidates[0].name == "subagent_4321"


def test_whoever_was_never_counted_is_found_among_thousands_all_the_same(
    filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shortlist, "MOST_FOUND", 1)  # it would leave out nearly all
    database = Database(filled)
    database.open()
    with psycopg.connect(filled) as connection:
        connection.execute("UPDATE search_statistics SET subagents = 0")
        connection.execute("DELETE FROM lexeme_statistics")
    try:
        found = Shortlists(database).find(own_word(8765), ())
    finally:
        Statistics(database).count()
        database.close()
    assert found.candidates[0].name == "subagent_8765"


@pytest.mark.parametrize("pause", [COUNT_SECONDS, -COUNT_SECONDS], ids=["too early", "late enough"])
def test_looking_whether_to_count_reads_one_subagent_at_most(explained: Explained, filled: str, pause: float) -> None:
    with psycopg.connect(filled) as connection:
        connection.execute("UPDATE search_statistics SET counted_at = now()")  # nothing has changed since
    explained.execute(IS_DUE, {"pause": pause, "small": shortlist.SMALL})
    assert {how for how, _ in read(explained, "subagents")} <= {"Index Only Scan", "Index Scan"}
    assert max((number for _, number in read(explained, "subagents")), default=0) <= 1
