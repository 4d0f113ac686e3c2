"""The counts that the search weighs words by, on real PostgreSQL."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import pytest

from pokestrator.store import pool
from pokestrator.store.pool import Database
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.statistics import COUNT, SUM, Statistics
from pokestrator.store.subagents import Subagents
from tests.integration.flow import draft, poet, rows
from tests.integration.test_subagents_store import LONG_AGO


def known(url: str, lexeme: str) -> int | None:
    found = rows(url, "SELECT subagents FROM lexeme_statistics WHERE lexeme = %s", lexeme)
    return found[0]["subagents"] if found else None


def test_the_counts_follow_the_subagents(database: Database, subagents: Subagents, database_url: str) -> None:
    statistics = Statistics(database)
    subagents.adopt(poet())
    statistics.count()
    assert known(database_url, "lighthous") == 1
    subagents.adopt(poet(name="lake_poet", description="Poems about a lighthouse on a lake in the hills."))
    statistics.count()
    assert known(database_url, "lighthous") == 2
    row = rows(database_url, "SELECT subagents, mean_length FROM search_statistics")[0]
    assert row["subagents"] == 2
    assert row["mean_length"] > 10


def test_what_nobody_says_any_more_is_forgotten_and_archived_ones_do_not_count(
    database: Database, subagents: Subagents, database_url: str
) -> None:
    subagents.adopt(poet())
    Statistics(database).count()
    rows(database_url, "UPDATE subagents SET state = 'archived'")
    Statistics(database).count()
    assert known(database_url, "lighthous") is None
    assert rows(database_url, "SELECT subagents FROM search_statistics") == [{"subagents": 0}]


def test_keeping_counts_only_when_something_has_changed(
    database: Database, subagents: Subagents, database_url: str
) -> None:
    subagents.adopt(poet())
    Statistics(database).keep()
    assert known(database_url, "lighthous") == 1
    rows(database_url, "DELETE FROM lexeme_statistics")
    Statistics(database).keep()
    assert known(database_url, "lighthous") is None
    subagents.adopt(poet(name="lake_poet"))
    Statistics(database).keep()
    assert known(database_url, "lighthous") == 2


def test_a_new_subagent_is_found_before_it_is_counted(database: Database, subagents: Subagents) -> None:
    Statistics(database).count()
    subagents.build(draft("semaphore_waver"), "Wave the semaphore for an S", since=LONG_AGO)
    found = Shortlists(database).find("semaphore", ())
    assert [candidate.name for candidate in found.candidates] == ["semaphore_waver"]


def test_while_one_instance_counts_another_does_not_wait_for_it(
    database: Database, subagents: Subagents, database_url: str
) -> None:
    subagents.adopt(poet())
    with database.connection() as busy:
        busy.execute("SELECT pg_advisory_xact_lock(%s)", [0x706F6B65 + 1])
        done = threading.Event()
        thread = threading.Thread(target=lambda: (Statistics(database).count(), done.set()))
        thread.start()
        assert done.wait(5)
        thread.join()
    assert known(database_url, "lighthous") is None


def test_a_count_may_take_longer_than_other_operations(
    database: Database, subagents: Subagents, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    subagents.adopt(poet())
    Statistics(database).count()
    subagents.adopt(poet(name="lake_poet"))
    with database.connect() as slow:
        slow.execute("BEGIN")
        slow.execute("SELECT FROM search_statistics FOR UPDATE")
        monkeypatch.setattr(pool, "OPERATION_SECONDS", 0.3)
        with ThreadPoolExecutor() as threads:
            counting = threads.submit(Statistics(database).count)
            assert wait([counting], 4 * pool.OPERATION_SECONDS).not_done
            slow.execute("COMMIT")
            counting.result(10)
    assert known(database_url, "lighthous") == 2


def test_while_it_counts_the_search_and_what_is_learned_do_not_wait(
    database: Database, subagents: Subagents, database_url: str
) -> None:
    subagents.adopt(poet())
    with database.connection() as counting:
        counting.execute(COUNT)
        counting.execute(SUM)
        subagents.build(draft("semaphore_waver"), "Wave the semaphore for an S", since=LONG_AGO)
        found = Shortlists(database).find("semaphore", ())
    assert [candidate.name for candidate in found.candidates] == ["semaphore_waver"]
    assert known(database_url, "lighthous") == 1
