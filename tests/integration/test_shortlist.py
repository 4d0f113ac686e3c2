"""Finding the subagents that may fit a task, on real PostgreSQL, and what words alone decide with what is found."""

from __future__ import annotations

from hashlib import md5

import pytest

from pokestrator.certainty import certain
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.shortlist import COMPARED, SHORTLIST, Candidate, Shortlists
from pokestrator.store.statistics import Statistics
from pokestrator.store.subagents import Subagents
from pokestrator.store.templates import TEMPLATES_FOLDER, load_templates
from pokestrator.subagents import State, Template
from tests.integration.flow import POET_TASK, UNFITTING_TASK, draft, poet, rows
from tests.integration.lessons import done
from tests.integration.test_subagents_store import LONG_AGO

SHIPPED, _ = load_templates(TEMPLATES_FOLDER)


@pytest.fixture
def shortlists(database: Database) -> Shortlists:
    return Shortlists(database)


def found(shortlists: Shortlists, task: str, *templates: Template) -> list[Candidate]:
    return list(shortlists.find(task, templates).candidates)


def names(shortlists: Shortlists, task: str, *templates: Template) -> list[str]:
    return [candidate.name for candidate in found(shortlists, task, *templates)]


def decided(shortlists: Shortlists, task: str, *templates: Template) -> Candidate | None:
    sure = certain(task, shortlists.find(task, templates))
    return sure.candidate if sure else None


# who is found ------------------------------------------------------------------------------------------------------


def test_a_stored_subagent_is_found_at_once_by_its_name_its_description_and_its_examples(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    artist = draft("fibre_artist", description="Turns patterns into dots and dashes.")
    subagents.build(artist, UNFITTING_TASK, since=LONG_AGO)
    for task in ("a fibre thing", "dashes, please", "knitting"):
        [candidate] = found(shortlists, task)
        assert (candidate.name, candidate.state) == ("fibre_artist", State.PROBATION)
        assert candidate.score > 0


def test_the_beginning_of_a_long_word_is_shared_with_its_relatives(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    subagents.build(draft("photo_sorter"), "Sort my photographs", since=LONG_AGO)
    assert names(shortlists, "I need a photographer") == ["photo_sorter"]


def test_who_shares_no_word_is_not_found(subagents: Subagents, shortlists: Shortlists) -> None:
    subagents.adopt(poet())
    assert names(shortlists, UNFITTING_TASK) == []
    assert names(shortlists, "", poet()) == []


def test_a_template_is_measured_like_the_subagent_that_it_becomes_and_listed_once(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    [before] = found(shortlists, POET_TASK, poet())
    subagents.adopt(poet())
    [after] = found(shortlists, POET_TASK, poet())
    assert (before.state, after.state) == (None, State.ACTIVE)
    assert before.about == after.about
    assert {each.task for each in before.examples} == {each.task for each in after.examples}
    assert after.score > 0


def test_of_equals_the_stored_one_comes_first(subagents: Subagents, shortlists: Shortlists, database: Database) -> None:
    subagents.adopt(poet(name="lake_poet"))
    Statistics(database).count()
    assert names(shortlists, "lighthouse", poet(name="hill_poet"))[0] == "lake_poet"


def test_archived_ones_are_not_found_and_their_templates_neither(
    subagents: Subagents, shortlists: Shortlists, database_url: str
) -> None:
    subagents.adopt(poet())
    rows(database_url, "UPDATE subagents SET state = 'archived'")
    assert names(shortlists, POET_TASK, poet()) == []
    assert shortlists.others(shortlists.find("x", ()), (poet(),), 32) == ()


def test_no_more_than_the_shortlist_are_found_and_the_best_are_compared_one_by_one(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    for number in range(SHORTLIST + 3):
        subagents.build(draft(f"knitter_{'abcdefghijklmnopqrstuvwxyz'[number % 26]}_{number}"), "Knit", since=LONG_AGO)
    candidates = found(shortlists, "Knit")
    assert len(candidates) == SHORTLIST
    assert [each.about is not None for each in candidates].count(True) == COMPARED
    assert all(len(each.examples) <= 2 for each in candidates[COMPARED:])
    assert shortlists.others(shortlists.find("Knit", ()), (), SHORTLIST) is None


def test_where_all_can_be_shown_the_others_are_those_that_were_not_found(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    subagents.adopt(poet())
    subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO)
    others = shortlists.others(shortlists.find(UNFITTING_TASK, SHIPPED), SHIPPED, SHORTLIST)
    assert others is not None
    assert [each.name for each in others if each.is_stored] == ["sea_poet"]
    assert others[0].examples


def test_a_new_example_is_found_by_at_once(
    subagents: Subagents, shortlists: Shortlists, jobs: Jobs, database: Database
) -> None:
    poet_here = subagents.adopt(poet())
    Statistics(database).count()
    assert names(shortlists, "haiku") == []
    done(jobs, poet_here, "A haiku on the pier")
    assert names(shortlists, "haiku") == ["sea_poet"]


def test_a_long_task_of_rare_words_is_looked_for_in_time_among_many(
    subagents: Subagents, shortlists: Shortlists, database: Database, database_url: str
) -> None:
    subagents.adopt(poet())
    Statistics(database).count()
    rows(database_url, "UPDATE search_statistics SET subagents = 100000")
    rare = [md5(str(number).encode()).hexdigest()[:6] for number in range(280)]
    count = "INSERT INTO lexeme_statistics SELECT lexeme, 5 FROM unnest(%s::text[]) lexeme ON CONFLICT DO NOTHING"
    rows(database_url, count, [each for word in rare for each in (word, f"~{word[:3]}")])
    assert names(shortlists, f"{POET_TASK} {' '.join(rare)}") == ["sea_poet"]


# what words decide -------------------------------------------------------------------------------------------------


def test_every_example_of_a_shipped_template_is_decided_for_it_and_then_for_its_subagent(
    subagents: Subagents, shortlists: Shortlists
) -> None:
    wrong = [
        (example, candidate.name if (candidate := decided(shortlists, example, *SHIPPED)) else None)
        for template in SHIPPED
        for example in template.examples
        if (candidate := decided(shortlists, example, *SHIPPED)) is None or candidate.name != template.name
    ]
    assert wrong == []
    subagents.adopt(SHIPPED[0])
    candidate = decided(shortlists, SHIPPED[0].examples[0], *SHIPPED)
    assert candidate is not None
    assert (candidate.name, candidate.is_stored) == (SHIPPED[0].name, True)


@pytest.mark.parametrize(
    "task",
    [
        "Write a limerick about zebra stripes",
        "Invent a toast for my grandmother's 80th birthday: she loves sailing and bad puns",
        "weather",
        "stripe",
        "Please show me, tell me, give me, find me",
    ],
)
def test_what_is_merely_near_a_shipped_template_is_not_decided_by_words(shortlists: Shortlists, task: str) -> None:
    assert decided(shortlists, task, *SHIPPED) is None


@pytest.mark.parametrize(
    "task",
    [
        "the and of it to be or not",
        "🦓🦓🦓",
        "'",
        "it's a 'quoted' \\ \"task\" with ''' and \\' and \\\\",
        "a & b | !c <-> d:*",
        "~writ ~'x",
        "%s %(task)s {} $1 $$",
        "请把这段文字翻译成英文",
        "x" * 20_000,
        "wörd " * 4_000,
        " ".join(f"word{number}" for number in range(2_200)),
        "\n\t \u00a0\u200b",
        "https://example.com/?q='%27&x=\\",
    ],
    ids=lambda task: ascii(task)[:20],
)
def test_an_odd_task_is_looked_for_like_any_other(
    subagents: Subagents, shortlists: Shortlists, database: Database, task: str
) -> None:
    subagents.adopt(poet())
    assert decided(shortlists, task, *SHIPPED) is None
    # Stored as an example it does no harm either.
    subagents.build(draft("odd_task_taker"), task, since=LONG_AGO)
    Statistics(database).count()
    shortlists.find(task, SHIPPED)
    candidate = decided(shortlists, POET_TASK, *SHIPPED)
    assert candidate is not None
    assert candidate.name == "sea_poet"
