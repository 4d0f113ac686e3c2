"""What subagents remember of the tasks that they did well, and how two good runs end a probation."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import psycopg
import pytest

from pokestrator.jobs import Channel, JobState, Outcome, Route
from pokestrator.store import learning
from pokestrator.store.examples import MAX_EXAMPLES, remember
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Subagent
from tests.integration.flow import captured_logs, draft, job_row, poet, row, rows
from tests.integration.lessons import (
    DONE,
    FAILED,
    begun,
    done,
    examples,
    found_by,
    put_on_probation,
    remembered,
    state_of,
    trusted,
)

BUOY = "Describe how a buoy rocks in fog"
GIVEN = dict.fromkeys(poet().examples, ("template", 0))
WORDS = ("anchor", "beacon", "canal", "dinghy", "ebb", "ferry", "gull", "hull", "island", "jetty", "kelp", "lagoon")


@pytest.fixture
def subagent(subagents: Subagents) -> Subagent:
    return subagents.adopt(poet())


def tasks(count: int) -> list[str]:
    """Tasks no two of which are alike."""
    pairs = [f"{one} {two}" for one in WORDS for two in WORDS if one < two]
    return [f"Sing {pair} now" for pair in pairs[:count]]


def use(url: str, task: str, uses: int, days_ago: int = 0) -> None:
    query = "UPDATE subagent_examples SET uses = %s, used_at = now() - make_interval(days => %s) WHERE task = %s"
    rows(url, query, uses, days_ago, task)


# what becomes an example ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channel", [Channel.API_MESSAGE, Channel.NONE])
@pytest.mark.parametrize("route", [Route.MATCH, Route.TEMPLATE])
def test_a_task_that_was_done_well_finds_its_subagent_from_then_on(
    jobs: Jobs, database_url: str, subagent: Subagent, route: Route, channel: Channel
) -> None:
    assert found_by(database_url, "buoy") == []
    job = done(jobs, subagent, BUOY, route=route, channel=channel)
    assert examples(database_url, subagent) == {**GIVEN, BUOY: ("person", 0)}
    assert row(database_url, "SELECT job_id FROM subagent_examples WHERE task = %s", BUOY)["job_id"] == job.id
    assert found_by(database_url, "buoy") == [subagent.name]


@pytest.mark.parametrize("outcome", [FAILED, Outcome(JobState.CANCELLED, "Interrupted.")])
def test_a_task_that_was_not_done_is_no_example(
    jobs: Jobs, database_url: str, subagent: Subagent, outcome: Outcome
) -> None:
    done(jobs, subagent, BUOY, outcome=outcome)
    assert examples(database_url, subagent) == GIVEN


@pytest.mark.parametrize("route", [None, Route.BUILD_NEW])
def test_what_a_subagent_was_built_for_is_not_remembered_twice(
    jobs: Jobs, database_url: str, subagent: Subagent, route: Route | None
) -> None:
    done(jobs, subagent, BUOY, route=route)
    assert examples(database_url, subagent) == GIVEN


def test_a_job_that_was_routed_elsewhere_in_the_end_teaches_its_first_subagent_nothing(
    jobs: Jobs, database_url: str, subagent: Subagent
) -> None:
    job = begun(jobs, subagent, BUOY)
    jobs.record_route(job, Route.BUILD_NEW, "nothing fits any more")
    jobs.finish(job, DONE)
    assert examples(database_url, subagent) == GIVEN
    assert job_row(database_url, job.id)["subagent_id"] is None


def test_a_task_that_holds_a_secret_is_not_remembered(jobs: Jobs, database_url: str, subagent: Subagent) -> None:
    job = done(jobs, subagent, BUOY, outcome=replace(DONE, holds_secret=True))
    assert examples(database_url, subagent) == GIVEN
    assert job_row(database_url, job.id)["holds_secret"]


def test_a_task_is_remembered_for_a_subagent_whose_version_has_changed_since(
    jobs: Jobs, subagents: Subagents, database_url: str, subagent: Subagent
) -> None:
    job = begun(jobs, subagent, BUOY)
    subagents.follow((poet(description="Writes short poems about volcanoes."),))
    jobs.finish(job, DONE)
    assert remembered(database_url, subagent) == {BUOY: 0}


# near-duplicates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BUOY, BUOY),
        (BUOY, f"\n {BUOY.upper()}  "),
        (BUOY, "describing how the buoys rock, in the fog!"),
        ("Convert 5 euros into dollars", "convert 900 euros into dollars"),
        ("Sum up https://a.example/1 please", "Sum up https://b.example/2 please"),
        (" ".join(WORDS[:8]), " ".join(WORDS[:10])),
        (" ".join(WORDS[:10]), " ".join(WORDS[:8])),
        ("🦓🦓🦓", " 🦓🦓🦓\n"),
        ("To be, or not to be?!", "to be,  or not to be?!"),
    ],
)
def test_a_task_that_is_nearly_known_counts_for_the_example_that_there_is(
    jobs: Jobs, database_url: str, subagent: Subagent, first: str, second: str
) -> None:
    done(jobs, subagent, first)
    rows(database_url, "UPDATE subagent_examples SET used_at = now() - interval '9 days'")
    done(jobs, subagent, second)
    assert remembered(database_url, subagent) == {first: 1}
    unused = row(database_url, "SELECT now() - used_at AS ago FROM subagent_examples WHERE task = %s", first)
    assert unused["ago"].days == 0


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (BUOY, "Describe how a ship rocks in fog"),
        ("🦓🦓🦓", "🦓🦓🦓🦓"),
        ("To be, or not to be?!", "To be, or not to be."),
        ("the and of it", BUOY),
        (BUOY, "the and of it"),
        (" ".join(WORDS[:7]), " ".join(WORDS[:9])),
        (" ".join(WORDS[:9]), " ".join(WORDS[:7])),
    ],
)
def test_tasks_that_differ_are_two_examples(
    jobs: Jobs, database_url: str, subagent: Subagent, first: str, second: str
) -> None:
    done(jobs, subagent, first)
    done(jobs, subagent, second)
    assert remembered(database_url, subagent) == {first: 0, second: 0}


def test_a_given_example_is_used_and_not_remembered_again(jobs: Jobs, database_url: str, subagent: Subagent) -> None:
    [first, second] = poet().examples
    done(jobs, subagent, first.upper())
    assert examples(database_url, subagent) == {first: ("template", 1), second: ("template", 0)}


def test_another_subagents_examples_are_its_own(
    jobs: Jobs, subagents: Subagents, database_url: str, subagent: Subagent
) -> None:
    other = subagents.adopt(poet(name="fog_poet"))
    done(jobs, other, BUOY)
    done(jobs, subagent, BUOY)
    assert remembered(database_url, subagent) == remembered(database_url, other) == {BUOY: 0}


# odd tasks -----------------------------------------------------------------------------------------------------------


def chinese(length: int) -> str:
    letters = random.Random(1)
    return "".join(chr(letters.randint(0x4E00, 0x9FA0)) for _ in range(length))


@pytest.mark.parametrize(
    "task",
    [
        "🦓",
        "'",
        "\\",
        "the and of it",
        "請把這段文字翻譯成英文",
        chinese(20_000),
        "x" * 20_000,
        "wörd " * 4_000,
        " ".join(f"word{number}x" for number in range(2_000)),
        "\n" * 5_000 + "Ring the bell",
        "%s %(task)s {} $1 :* & | ! <->",
        "\t\u00a0\u200b ",
    ],
    ids=lambda task: ascii(task)[:20],
)
def test_an_odd_task_ends_like_any_other_twice(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with captured_logs(monkeypatch, learning) as logs:
        for _ in range(2):
            job = done(jobs, subagent, task)
            assert history.outcome(job.id) == DONE
    assert logs == []
    is_blank = not task[:2_000].strip()
    assert remembered(database_url, subagent) == ({} if is_blank else {task[:2_000]: 1})


def test_a_subagent_is_built_for_a_long_task_in_chinese(subagents: Subagents, database_url: str) -> None:
    built = subagents.build(draft("text_translator"), chinese(20_000), since=datetime(2020, 1, 1, tzinfo=UTC))
    assert chinese(20_000)[:2_000] in examples(database_url, built)


# at most fifty -------------------------------------------------------------------------------------------------------


def test_beyond_fifty_the_remembered_one_leaves_that_was_used_least_and_longest_ago(
    jobs: Jobs, database_url: str, subagent: Subagent
) -> None:
    learned = tasks(MAX_EXAMPLES - len(GIVEN))
    for task in learned:
        done(jobs, subagent, task)
        use(database_url, task, 3)
    use(database_url, learned[7], 2, days_ago=1)
    use(database_url, learned[20], 2, days_ago=9)
    use(database_url, learned[30], 4, days_ago=30)
    assert len(examples(database_url, subagent)) == MAX_EXAMPLES
    done(jobs, subagent, BUOY)
    known = examples(database_url, subagent)
    assert known.keys() == {*GIVEN, *learned, BUOY} - {learned[20]}
    done(jobs, subagent, "Tell of mermaids")
    assert examples(database_url, subagent).keys() == known.keys() - {BUOY} | {"Tell of mermaids"}


def test_a_newcomer_that_is_of_use_before_the_next_one_comes_stays(
    jobs: Jobs, database_url: str, subagent: Subagent
) -> None:
    learned = tasks(MAX_EXAMPLES - len(GIVEN))
    for task in learned:
        done(jobs, subagent, task)
        use(database_url, task, 1, days_ago=1)
    for task in (BUOY, BUOY, "Tell of mermaids"):
        done(jobs, subagent, task)
    known = remembered(database_url, subagent)
    assert len(known) == len(learned)
    assert (known[BUOY], known["Tell of mermaids"]) == (1, 0)


def test_fifty_given_examples_leave_one_place_to_what_is_learned(
    jobs: Jobs, subagents: Subagents, database_url: str
) -> None:
    given = tasks(MAX_EXAMPLES)
    subagent = subagents.adopt(poet(examples=given))
    use(database_url, given[3], 0, days_ago=5)
    for task in (BUOY, "Tell of mermaids"):
        done(jobs, subagent, task)
        known = examples(database_url, subagent)
        assert len(known) == MAX_EXAMPLES
        assert remembered(database_url, subagent) == {task: 0}
        assert given[3] not in known


# nothing here makes a job's end fail ---------------------------------------------------------------------------------


def test_jobs_of_one_subagent_that_end_at_once_are_all_remembered(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    running = [begun(jobs, subagent, task) for task in (*tasks(5), *[BUOY] * 5)]
    together = threading.Barrier(5)

    def end(number: int) -> None:
        together.wait()
        for job in running[number::5]:
            jobs.finish(job, DONE)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(end, range(5)))
    assert remembered(database_url, subagent) == {**dict.fromkeys(tasks(5), 0), BUOY: 4}
    assert all(history.outcome(job.id) == DONE for job in running)


def test_jobs_end_while_their_subagent_is_written_judged_and_run(
    jobs: Jobs, history: History, subagents: Subagents, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [subagents.adopt(poet()), subagents.adopt(poet(name="fog_poet"))]
    said = tasks(60)
    since = datetime.now(UTC)

    def end(number: int) -> None:
        for turn in range(10):
            job = done(jobs, both[turn % 2], said[number * 10 + turn], caller=f"u-{number % 2}")
            history.judge(job.id, learning.Verdict.BAD, "no")
            history.judge(job.id, learning.Verdict.GOOD, "yes")

    def write(_: int) -> None:
        for turn in range(10):
            subagents.follow([poet(name=each.name, max_turns=turn + 1) for each in reversed(both)])
            subagents.build(draft("sea_poet"), f"Build {turn}", since=since.replace(year=2020))

    with captured_logs(monkeypatch, learning) as logs, ThreadPoolExecutor(4) as threads:
        works = [threads.submit(end, number) for number in range(3)] + [threads.submit(write, 0)]
        for work in works:
            work.result(60)
    assert [each for each in logs if each["event"] == "not_learned"] == []
    for number, subagent in enumerate(both):
        expected = {said[thread * 10 + turn] for thread in range(3) for turn in range(10) if turn % 2 == number}
        assert expected == remembered(database_url, subagent).keys()


def test_a_job_ends_while_somebody_else_keeps_its_subagents_row(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = begun(jobs, subagent, BUOY)
    with captured_logs(monkeypatch, learning) as logs, psycopg.connect(database_url) as other:
        other.execute("SELECT * FROM subagents FOR UPDATE")
        assert jobs.finish(job, DONE) == DONE
    assert [each["event"] for each in logs] == ["not_learned"]
    assert history.outcome(job.id) == DONE
    assert examples(database_url, subagent) == GIVEN


def test_a_job_ends_even_where_examples_cannot_be_written(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    job = begun(jobs, subagent, BUOY)
    rows(database_url, "ALTER TABLE subagent_examples RENAME TO lost")
    jobs.finish(job, DONE)
    assert history.outcome(job.id) == DONE
    events = [event.kind for event in history.timeline(job.id)]
    assert events.count("finished") == 1


def test_nothing_is_remembered_where_the_end_itself_is_not_written(
    database: Database, database_url: str, subagent: Subagent, jobs: Jobs
) -> None:
    job = begun(jobs, subagent, BUOY)
    with pytest.raises(RuntimeError), database.connection() as connection:
        remember(connection, subagent.id, job.id, BUOY)
        raise RuntimeError("something after it")
    assert examples(database_url, subagent) == GIVEN


# probation -----------------------------------------------------------------------------------------------------------


def test_two_good_runs_end_a_probation(jobs: Jobs, history: History, database_url: str, subagent: Subagent) -> None:
    put_on_probation(database_url, subagent)
    first = done(jobs, subagent, BUOY)
    assert state_of(database_url, subagent) == "probation"
    done(jobs, subagent, "Tell of mermaids", outcome=FAILED)
    assert state_of(database_url, subagent) == "probation"
    second = done(jobs, subagent, BUOY, route=Route.BUILD_NEW)  # it was built for this one, and ran at once
    third = done(jobs, subagent, BUOY)
    assert state_of(database_url, subagent) == "active"
    assert [trusted(history, job) for job in (first, second, third)] == [False, True, False]


def test_a_run_of_an_earlier_version_proves_nothing_for_the_current_one(
    jobs: Jobs, subagents: Subagents, database_url: str, subagent: Subagent
) -> None:
    put_on_probation(database_url, subagent)
    done(jobs, subagent, BUOY)
    late = begun(jobs, subagent, "Tell of mermaids")
    subagents.follow((poet(max_turns=7),))
    now = subagents.get("sea_poet")
    assert now is not None
    done(jobs, now, BUOY)
    jobs.finish(late, DONE)
    assert state_of(database_url, subagent) == "probation"
    done(jobs, now, BUOY)
    assert state_of(database_url, subagent) == "active"


def test_an_archived_subagent_stays_so(jobs: Jobs, database_url: str, subagent: Subagent) -> None:
    rows(database_url, "UPDATE subagents SET state = 'archived'")
    for _ in range(3):
        done(jobs, subagent, BUOY)
    assert state_of(database_url, subagent) == "archived"


def test_two_good_runs_that_end_at_once_end_a_probation_once(
    jobs: Jobs, history: History, database_url: str, subagent: Subagent
) -> None:
    put_on_probation(database_url, subagent)
    running = [begun(jobs, subagent, task) for task in tasks(2)]
    together = threading.Barrier(2)

    def end(number: int) -> None:
        together.wait()
        jobs.finish(running[number], DONE)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(end, range(2)))
    assert state_of(database_url, subagent) == "active"
    assert sorted(trusted(history, job) for job in running) == [False, True]
