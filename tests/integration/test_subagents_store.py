"""Subagents on real PostgreSQL: adopting, building, following files."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from pokestrator.errors import LeaseLost
from pokestrator.intake import new_job
from pokestrator.store.jobs import Jobs
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Author, Origin
from tests.integration.flow import UNFITTING_TASK, draft, poet, row, rows

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)  # the task came before every subagent


def examples_of(url: str, name: str) -> set[str]:
    query = "SELECT task FROM subagent_examples e JOIN subagents s ON s.id = e.subagent_id WHERE s.name = %s"
    return {found["task"] for found in rows(url, query, name)}


def authors_of(url: str, name: str) -> list[str]:
    query = "SELECT author FROM subagent_versions v JOIN subagents s ON s.id = v.subagent_id WHERE s.name = %s"
    return [found["author"] for found in rows(url, f"{query} ORDER BY v.version", name)]


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """The results of `count` threads that do `work` at the same time."""
    together = threading.Barrier(count)

    def run(_: int) -> Any:
        together.wait()
        return work()

    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(run, range(count)))


def write_owner_version(url: str, name: str) -> None:
    """What the owner's edit will look like: a version of their own, made current."""
    with_owner = """
    INSERT INTO subagent_versions (subagent_id, version, author, description, system_prompt, tools, model, max_turns,
        timeout_seconds, max_budget_usd, credentials, hosts, digest)
    SELECT subagent_id, v.version + 1, 'owner', 'The owner wrote this description.', system_prompt, tools, model,
        max_turns, timeout_seconds, max_budget_usd, credentials, hosts, 'owner'
    FROM subagent_versions v JOIN subagents s ON s.id = v.subagent_id AND s.version = v.version WHERE s.name = %s"""
    rows(url, with_owner, name)
    rows(url, "UPDATE subagents SET version = version + 1 WHERE name = %s", name)


# storing -----------------------------------------------------------------------------------------------------------


def test_an_adopted_template_is_a_subagent_that_says_what_its_file_says(
    subagents: Subagents, database_url: str
) -> None:
    template = poet(timeout_seconds=40, max_turns=5, model="haiku", hosts=("sea.example",), credentials=("SEA_KEY",))
    adopted = subagents.adopt(template)
    assert adopted == subagents.get("sea_poet")
    assert (adopted.origin, adopted.version, adopted.definition) == (Origin.TEMPLATE, 1, template.definition())
    assert examples_of(database_url, "sea_poet") == set(template.examples)
    assert authors_of(database_url, "sea_poet") == [Author.TEMPLATE]


def test_a_template_that_is_adopted_twice_is_one_subagent(subagents: Subagents) -> None:
    assert subagents.adopt(poet()) == subagents.adopt(poet())
    assert len(subagents.all()) == 1


def test_a_template_that_eight_threads_adopt_at_once_is_one_subagent(subagents: Subagents, database_url: str) -> None:
    adopted = at_once(8, lambda: subagents.adopt(poet()))
    assert {subagent.id for subagent in adopted} == {subagents.all()[0].id}
    assert authors_of(database_url, "sea_poet") == ["template"]


def test_the_task_that_caused_a_subagent_is_its_first_example(subagents: Subagents, database_url: str) -> None:
    built = subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO)
    assert (built.origin, built.version) == (Origin.BUILT, 1)
    assert examples_of(database_url, "scarf_coder") == {UNFITTING_TASK, *draft("scarf_coder").examples}
    assert authors_of(database_url, "scarf_coder") == ["drafter"]


def test_a_long_cause_is_kept_to_its_first_2000_characters(subagents: Subagents, database_url: str) -> None:
    subagents.build(draft("long_reader"), "é" * 20_000, since=LONG_AGO)
    assert "é" * 2_000 in examples_of(database_url, "long_reader")


def test_two_threads_that_build_one_name_at_once_end_with_one_subagent_that_knows_both_tasks(
    subagents: Subagents, database_url: str
) -> None:
    tasks = [f"Knit scarf number {word} in Morse code" for word in ("one", "two")]
    waiting = list(tasks)
    built = at_once(2, lambda: subagents.build(draft("scarf_coder"), waiting.pop(), since=LONG_AGO))
    assert built[0].id == built[1].id
    assert [subagent.name for subagent in subagents.all()] == ["scarf_coder"]
    assert set(tasks) <= examples_of(database_url, "scarf_coder")
    assert authors_of(database_url, "scarf_coder") == ["drafter"]


def test_an_owner_that_has_lost_its_job_stores_no_draft_any_more(jobs: Jobs, subagents: Subagents) -> None:
    job = jobs.insert_claimed(new_job(UNFITTING_TASK), "ann:1", 20)
    jobs.release([job])
    [again] = jobs.claim("ben:2", 20, 1)
    with pytest.raises(LeaseLost):
        subagents.build(draft("late_coder"), UNFITTING_TASK, since=LONG_AGO, claim=job)
    assert subagents.all() == []
    assert subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO, claim=again).name == "scarf_coder"


def test_a_name_that_an_older_subagent_has_is_numbered(subagents: Subagents, database_url: str) -> None:
    older = subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO)
    soon = datetime.now(UTC) + timedelta(minutes=1)
    newer = subagents.build(draft("scarf_coder"), "Another thing altogether", since=soon)
    assert (older.name, newer.name) == ("scarf_coder", "scarf_coder_2")
    assert "Another thing altogether" not in examples_of(database_url, "scarf_coder")


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE subagents SET state = 'archived'",
        "UPDATE subagent_versions SET author = 'owner'",
        "UPDATE subagent_versions SET credentials = '{MAIL_KEY}'",
        "UPDATE subagent_versions SET description = 'Sends mail to whoever the owner has named before.'",
    ],
    ids=["archived", "the owner's", "with a credential", "for something else"],
)
def test_no_task_comes_by_a_drafts_name_to_one_that_is_not_its_twin(
    subagents: Subagents, database_url: str, change: str
) -> None:
    other = subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO)
    rows(database_url, change)
    # Drafted at the same time: by its name alone it would be the same subagent.
    mine = subagents.build(draft("scarf_coder"), "Another scarf in Morse code", since=LONG_AGO)
    assert (other.name, mine.name) == ("scarf_coder", "scarf_coder_2")
    assert "Another scarf in Morse code" not in examples_of(database_url, "scarf_coder")


def test_a_name_that_is_not_stored_is_none(subagents: Subagents) -> None:
    assert subagents.get("sea_poet") is None


# following files ---------------------------------------------------------------------------------------------------


def test_a_template_whose_file_changed_gets_a_new_version(subagents: Subagents, database_url: str) -> None:
    first = subagents.adopt(poet())
    changed = poet(description="Writes short poems about volcanoes.", examples=("A haiku on lava",))
    assert subagents.follow((changed,)) == ["sea_poet"]
    now = subagents.get("sea_poet")
    assert now is not None
    assert (now.id, now.version, now.definition) == (first.id, 2, changed.definition())
    assert authors_of(database_url, "sea_poet") == ["template", "template"]
    assert examples_of(database_url, "sea_poet") == {"A haiku on lava"}
    [found] = Shortlists(subagents._source).find("Tell me of a volcano", ()).candidates
    assert found.name == "sea_poet"
    assert subagents.follow((changed,)) == []


def test_examples_that_change_alone_are_followed_and_learned_ones_stay(subagents: Subagents, database_url: str) -> None:
    adopted = subagents.adopt(poet())
    with psycopg.connect(database_url) as connection:
        learned = "INSERT INTO subagent_examples (subagent_id, task, source) VALUES (%s, 'A learned task', 'owner')"
        connection.execute(learned, [adopted.id])
    changed = poet(examples=("A haiku on lava",))
    assert subagents.follow((changed,)) == ["sea_poet"]
    assert examples_of(database_url, "sea_poet") == {"A haiku on lava", "A learned task"}
    assert subagents.follow((changed,)) == []


def test_a_template_whose_file_is_unchanged_gets_no_new_version(subagents: Subagents, database_url: str) -> None:
    subagents.adopt(poet())
    assert subagents.follow((poet(),)) == []
    assert authors_of(database_url, "sea_poet") == ["template"]


def test_a_template_that_was_never_adopted_is_not_stored_by_following(subagents: Subagents) -> None:
    assert subagents.follow((poet(),)) == []
    assert subagents.all() == []


def test_what_the_owner_wrote_is_never_replaced_by_the_file(subagents: Subagents, database_url: str) -> None:
    subagents.adopt(poet())
    write_owner_version(database_url, "sea_poet")
    assert subagents.follow((poet(description="Writes short poems about volcanoes."),)) == []
    now = subagents.get("sea_poet")
    assert now is not None
    assert (now.version, now.definition.description) == (2, "The owner wrote this description.")


def test_a_built_subagent_does_not_follow_a_template_of_its_name(subagents: Subagents) -> None:
    built = subagents.build(draft("sea_poet"), UNFITTING_TASK, since=LONG_AGO)
    assert subagents.follow((poet(),)) == []
    assert subagents.get("sea_poet") == built


def test_eight_threads_that_follow_at_once_make_one_new_version(subagents: Subagents, database_url: str) -> None:
    subagents.adopt(poet())
    changed = poet(description="Writes short poems about volcanoes.")
    followed = at_once(8, lambda: subagents.follow((changed,)))
    assert sorted(followed) == [[]] * 7 + [["sea_poet"]]
    assert authors_of(database_url, "sea_poet") == ["template", "template"]


# going ---------------------------------------------------------------------------------------------------------------


def test_a_subagent_is_gone_with_all_it_knew(subagents: Subagents, database_url: str) -> None:
    subagents.adopt(poet())
    rows(database_url, "DELETE FROM subagents")
    assert row(database_url, "SELECT count(*) AS left FROM subagent_versions")["left"] == 0
    assert row(database_url, "SELECT count(*) AS left FROM subagent_examples")["left"] == 0
