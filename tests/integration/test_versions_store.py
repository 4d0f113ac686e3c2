"""What the owner does to subagents, on real PostgreSQL: versions and their figures, roll-backs, archiving, moving."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from pokestrator.errors import CannotChange, InvalidDefinition, PokestratorError, UnknownSubagent
from pokestrator.jobs import JobState, Outcome, Verdict
from pokestrator.keeping import Keeper
from pokestrator.runs import ErrorKind, Usage
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.lives import Lives
from pokestrator.store.pool import Database
from pokestrator.store.subagents import Subagents
from pokestrator.store.versions import Figures, Versions
from pokestrator.store.widening import Widening
from pokestrator.subagents import Author, Definition, State, Subagent
from tests.integration.flow import UNFITTING_TASK, draft, eventually, poet, quiet_task, row, rows
from tests.integration.lessons import done, examples, found_by

LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
NO_RUNS = Figures(0, None, None, None)


@pytest.fixture
def lives(database: Database) -> Lives:
    return Lives(database)


@pytest.fixture
def versions(database: Database) -> Versions:
    return Versions(database)


@pytest.fixture
def keeper(database: Database) -> Keeper:
    """With one shipped template that is not stored yet."""
    return Keeper(database, (poet(),), redact=lambda text: text.replace("canary-of-the-service", "[secret]"))


@pytest.fixture
def coder(subagents: Subagents) -> Subagent:
    return subagents.build(draft("scarf_coder"), UNFITTING_TASK, since=LONG_AGO)


def edited(subagent: Subagent, **changes: Any) -> Definition:
    return subagent.definition.model_copy(update=changes)


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """What each of them returns, or the error on purpose that it raises, when all begin at the same time."""
    together = threading.Barrier(len(works))

    def do(work: Callable[[], Any]) -> Any:
        together.wait()
        try:
            return work()
        except PokestratorError as error:
            return error

    with ThreadPoolExecutor(len(works)) as threads:
        return list(threads.map(do, works))


# versions ----------------------------------------------------------------------------------------------------------


def test_an_edit_is_a_new_version_of_the_owners_that_is_current_and_found_by_its_words(
    lives: Lives, versions: Versions, coder: Subagent, database_url: str
) -> None:
    changed = edited(coder, description="Turns patterns for mittens into semaphore.", hosts=("api.wool.example.com",))
    now = lives.edit("scarf_coder", changed, based_on=1, note="mittens")
    assert (now.id, now.version, now.definition, now.state) == (coder.id, 2, changed, coder.state)
    first, second = versions.of("scarf_coder")
    assert (first.number, first.author, first.note, first.definition) == (1, Author.DRAFTER, "", coder.definition)
    assert (second.number, second.author, second.note, second.definition) == (2, Author.OWNER, "mittens", changed)
    assert first.at < second.at
    assert found_by(database_url, "semaphore") == ["scarf_coder"]


def test_an_edit_that_changes_nothing_makes_no_version(lives: Lives, versions: Versions, coder: Subagent) -> None:
    assert lives.edit("scarf_coder", coder.definition, based_on=1) == coder
    assert len(versions.of("scarf_coder")) == 1


def test_of_two_edits_at_once_one_is_stored_and_the_other_is_told(
    lives: Lives, versions: Versions, coder: Subagent
) -> None:
    one, other = (edited(coder, max_turns=turns) for turns in (3, 4))
    done = at_once(
        lambda: lives.edit("scarf_coder", one, based_on=1), lambda: lives.edit("scarf_coder", other, based_on=1)
    )
    [refused] = [each for each in done if isinstance(each, CannotChange)]
    [stored] = [each for each in done if isinstance(each, Subagent)]
    assert "its current version is 2, and this was made from version 1" in str(refused)
    assert [version.definition for version in versions.of("scarf_coder")] == [coder.definition, stored.definition]


def test_a_file_that_is_followed_while_the_owner_edits_loses_neither(
    subagents: Subagents, lives: Lives, versions: Versions
) -> None:
    adopted = subagents.adopt(poet())
    newer = poet(max_turns=9)
    done = at_once(
        lambda: lives.edit("sea_poet", edited(adopted, max_turns=3), based_on=1), lambda: subagents.follow((newer,))
    )
    turns = [version.definition.max_turns for version in versions.of("sea_poet")]
    assert turns == ([None, 9] if isinstance(done[0], CannotChange) else [None, 3])


def test_who_adopts_a_template_while_it_is_edited_gets_the_edited_one(
    subagents: Subagents, lives: Lives, database_url: str
) -> None:
    adopted = subagents.adopt(poet())
    with psycopg.connect(database_url) as holder, ThreadPoolExecutor(2) as threads:
        holder.execute("SELECT FROM subagents WHERE name = 'sea_poet' FOR UPDATE")
        edit = threads.submit(lives.edit, "sea_poet", edited(adopted, max_turns=3), based_on=1)
        assert eventually(lambda: waiting(database_url) == 1)
        adopt = threads.submit(subagents.adopt, poet())
        assert eventually(lambda: waiting(database_url) == 2)
        holder.commit()
        assert edit.result().version == adopt.result().version == 2


def waiting(url: str) -> int:
    """How many statements wait for a lock."""
    return int(row(url, "SELECT count(*) FROM pg_locks WHERE NOT granted")["count"])


# figures -----------------------------------------------------------------------------------------------------------


def run(jobs: Jobs, url: str, subagent: Subagent, outcome: Outcome | None, seconds: float, verdict: str = "") -> None:
    """A run of a subagent that took so long, and ended like this, or goes on."""
    job = jobs.insert_claimed(quiet_task(), "ann:1", 20)
    jobs.begin_run(job, subagent.id, subagent.version, "")
    began = "UPDATE jobs SET run_began_at = run_began_at - make_interval(secs => %s) WHERE id = %s"
    rows(url, began, seconds, job.id)
    if outcome is not None:
        jobs.finish(job, outcome)
    if verdict:
        rows(url, "UPDATE jobs SET verdict = %s::verdict WHERE id = %s", verdict, job.id)


def test_figures_are_of_ended_runs_of_that_version_alone(
    jobs: Jobs, lives: Lives, versions: Versions, coder: Subagent, database_url: str
) -> None:
    good = Outcome(JobState.SUCCEEDED, "Done.", usage=Usage(cost_usd=0.02))
    bad = Outcome(JobState.FAILED, "Not done.", ErrorKind.TIMEOUT, usage=Usage(cost_usd=0.05))
    run(jobs, database_url, coder, good, 10)
    run(jobs, database_url, coder, good, 20, verdict="good")
    run(jobs, database_url, coder, good, 40, verdict="bad")
    run(jobs, database_url, coder, bad, 60)
    run(jobs, database_url, coder, Outcome(JobState.CANCELLED, "Cancelled."), 900)
    run(jobs, database_url, coder, None, 900)
    now = lives.edit("scarf_coder", edited(coder, max_turns=3), based_on=1)
    run(jobs, database_url, now, good, 5)

    first, second = (version.figures for version in versions.of("scarf_coder"))
    assert (first.runs, first.success_share) == (4, 0.5)
    assert first.p50_seconds == pytest.approx(30, abs=2)
    assert first.mean_cost_usd == pytest.approx((3 * 0.02 + 0.05) / 4)
    assert (second.runs, second.success_share) == (1, 1)
    [(subagent, current)] = versions.current(10)
    assert (subagent, current.figures) == (now, second)


def test_the_time_of_a_run_is_counted_from_its_own_begin(
    jobs: Jobs, versions: Versions, coder: Subagent, database_url: str
) -> None:
    job = jobs.insert_claimed(quiet_task(), "ann:1", 20)
    rows(database_url, "UPDATE jobs SET created_at = now() - interval '1 hour', started_at = now() - interval '1 hour'")
    jobs.begin_run(job, coder.id, coder.version, "")
    jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done."))
    [version] = versions.of("scarf_coder")
    assert version.figures.p50_seconds is not None and version.figures.p50_seconds < 60


# what is looked at -------------------------------------------------------------------------------------------------


def test_what_people_said_of_results_is_seen_with_their_reasons_the_latest_first(
    keeper: Keeper, jobs: Jobs, history: History, coder: Subagent
) -> None:
    for verdict, note in ((Verdict.GOOD, ""), (Verdict.BAD, "wrong letters")):
        job = jobs.insert_claimed(quiet_task(), "me", 60)
        jobs.begin_run(job, coder.id, coder.version, "")
        jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done."))
        history.judge(job.id, verdict, note)
    latest, first = keeper.verdicts("scarf_coder", 10)
    assert (latest.request_id, latest.version, latest.verdict, latest.note) == (
        job.id,
        1,
        Verdict.BAD,
        "wrong letters",
    )
    assert (first.verdict, first.note) == (Verdict.GOOD, "")
    assert keeper.verdicts("scarf_coder", 1) == [latest]
    assert keeper.verdicts("sea_poet", 10) == []


def test_a_template_that_no_task_has_used_is_stored_by_an_edit_that_is_accepted_and_by_no_other(
    keeper: Keeper, subagents: Subagents
) -> None:
    unused = keeper.as_it_is("sea_poet")
    assert (unused.version, unused.definition) == (1, poet().definition())
    with pytest.raises(InvalidDefinition):
        keeper.edit("sea_poet", edited(unused, system_prompt="x" * 60 + "canary-of-the-service"), based_on=1)
    assert subagents.get("sea_poet") is None
    assert keeper.edit("sea_poet", edited(unused, max_turns=3), based_on=1).version == 2


def test_one_that_says_nearly_the_same_is_a_twin(keeper: Keeper, lives: Lives, coder: Subagent) -> None:
    assert keeper.twins("scarf_coder") == []
    lives.archive("scarf_coder")
    lives.add("wool_coder", coder.definition, ())
    lives.restore("scarf_coder")
    assert keeper.twins("scarf_coder") == ["wool_coder"]


# going back --------------------------------------------------------------------------------------------------------


def test_a_roll_back_is_a_new_version_equal_to_the_old_one(
    keeper: Keeper, lives: Lives, versions: Versions, coder: Subagent, database_url: str
) -> None:
    lives.edit("scarf_coder", edited(coder, description="Turns patterns for mittens into semaphore."), based_on=1)
    now, back_to = keeper.roll_back("scarf_coder")
    assert (now.version, now.definition, back_to) == (3, coder.definition, 1)
    last = versions.of("scarf_coder")[-1]
    assert (last.number, last.author, last.note) == (3, Author.OWNER, "back to version 1")
    assert found_by(database_url, "semaphore") == []
    again, back_to = keeper.roll_back("scarf_coder")
    assert (again.version, again.definition.description, back_to) == (
        4,
        "Turns patterns for mittens into semaphore.",
        2,
    )
    assert keeper.roll_back("scarf_coder", 1)[0].definition == coder.definition


def test_what_did_well_before_it_was_widened_is_trusted_again_when_it_is_back(
    keeper: Keeper, lives: Lives, jobs: Jobs, coder: Subagent, database_url: str
) -> None:
    for _ in range(2):
        job = jobs.insert_claimed(quiet_task(), "me", 60)
        jobs.begin_run(job, coder.id, coder.version, "")
        jobs.finish(job, Outcome(JobState.SUCCEEDED, "Done."))
    lives.edit("scarf_coder", edited(coder, max_turns=3), based_on=1)
    rows(database_url, "UPDATE subagents SET state = 'probation'")
    assert keeper.roll_back("scarf_coder")[0].state is State.ACTIVE
    rows(database_url, "UPDATE subagents SET state = 'probation'")
    assert keeper.roll_back("scarf_coder", 2)[0].state is State.PROBATION


def test_a_widening_that_is_undone_takes_the_tasks_with_it_that_it_was_for(
    keeper: Keeper, jobs: Jobs, subagents: Subagents, database: Database, coder: Subagent, database_url: str
) -> None:
    done(jobs, coder, "The scarf of my uncle")
    wider = edited(coder, description="Turns scarves into Morse code, and texts into semaphore.")
    claim = jobs.insert_claimed(quiet_task(), "me", 60)
    now = Widening(database).widen(coder, wider, ["My name in semaphore"], note="", claim=claim)
    assert now is not None
    done(jobs, now, "A greeting by semaphore flags")
    done(jobs, now, "The scarf of my uncle")
    Lives(database).replace("scarf_coder", wider, ["The flags of the harbour"], based_on=2)
    before = set(examples(database_url, coder))
    keeper.roll_back("scarf_coder", 1)
    gone = before - set(examples(database_url, coder))
    assert gone == {"My name in semaphore", "A greeting by semaphore flags"}
    assert found_by(database_url, "semaphore") == []


def test_a_roll_back_that_leaves_the_description_as_it_is_forgets_no_task(
    keeper: Keeper, lives: Lives, jobs: Jobs, coder: Subagent, database_url: str
) -> None:
    now = lives.edit("scarf_coder", edited(coder, max_turns=3), based_on=1)
    done(jobs, now, "The scarf of my uncle")
    before = examples(database_url, coder)
    keeper.roll_back("scarf_coder")
    assert examples(database_url, coder) == before
    assert "The scarf of my uncle" in before


def test_a_roll_back_forgets_no_task_that_came_before_the_version_it_goes_back_to(
    keeper: Keeper, lives: Lives, jobs: Jobs, coder: Subagent, database_url: str
) -> None:
    done(jobs, coder, "The scarf of my uncle")
    lives.edit("scarf_coder", edited(coder, description="Reads scarves aloud in Morse code."), based_on=1)
    lives.edit("scarf_coder", edited(coder, description="Turns texts into semaphore."), based_on=2)
    before = examples(database_url, coder)
    keeper.roll_back("scarf_coder", 2)
    assert examples(database_url, coder) == before


def test_of_two_roll_backs_at_once_one_is_made(
    keeper: Keeper, lives: Lives, versions: Versions, coder: Subagent
) -> None:
    lives.edit("scarf_coder", edited(coder, max_turns=3), based_on=1)

    def back() -> Any:
        return keeper.roll_back("scarf_coder", based_on=2)

    done = at_once(back, back)
    assert [type(each) for each in done].count(CannotChange) == 1
    assert [version.definition.max_turns for version in versions.of("scarf_coder")] == [None, 3, None]


def test_a_roll_back_to_what_cannot_be_gone_back_to_says_why(keeper: Keeper, lives: Lives, coder: Subagent) -> None:
    with pytest.raises(CannotChange, match="no version before version 1"):
        keeper.roll_back("scarf_coder")
    lives.edit("scarf_coder", edited(coder, max_turns=3), based_on=1)
    with pytest.raises(CannotChange, match="version 2 of scarf_coder is the current one"):
        keeper.roll_back("scarf_coder", 2)
    with pytest.raises(CannotChange, match="has no version 7; its versions are 1 to 2"):
        keeper.roll_back("scarf_coder", 7)
    keeper.roll_back("scarf_coder")
    with pytest.raises(CannotChange, match="says the same as the current one, version 3"):
        keeper.roll_back("scarf_coder", 1)


def test_an_archived_subagent_comes_back_as_it_was(
    keeper: Keeper, versions: Versions, coder: Subagent, database_url: str
) -> None:
    rows(database_url, "UPDATE subagents SET state = 'probation'")
    assert keeper.archive("scarf_coder").state is State.ARCHIVED
    assert versions.current(10) == []
    assert [subagent.name for subagent, _ in versions.current(10, archived=True)] == ["scarf_coder"]
    with pytest.raises(CannotChange, match="archived already"):
        keeper.archive("scarf_coder")
    assert keeper.restore("scarf_coder").state is State.PROBATION
    with pytest.raises(CannotChange, match="is not archived"):
        keeper.restore("scarf_coder")


# names -------------------------------------------------------------------------------------------------------------


def test_a_renamed_subagent_keeps_its_versions_and_is_found_by_its_new_name(
    keeper: Keeper, versions: Versions, coder: Subagent, database_url: str
) -> None:
    now = keeper.rename("scarf_coder", "mitten_smith")
    assert (now.id, now.name, len(versions.of("mitten_smith"))) == (coder.id, "mitten_smith", 1)
    assert found_by(database_url, "mitten smith") == ["mitten_smith"]
    with pytest.raises(UnknownSubagent, match="did you mean"):
        keeper.get("mittens_smith")


def test_a_name_that_is_taken_or_is_none_is_refused(keeper: Keeper, subagents: Subagents, coder: Subagent) -> None:
    subagents.build(draft("hat_coder"), "Knit a hat", since=LONG_AGO)
    with pytest.raises(CannotChange, match="hat_coder is the name of another subagent"):
        keeper.rename("scarf_coder", "hat_coder")
    with pytest.raises(CannotChange, match="sea_poet is the name of a template"):
        keeper.rename("scarf_coder", "sea_poet")
    with pytest.raises(InvalidDefinition, match="name: must be snake_case"):
        keeper.rename("scarf_coder", "Scarf Coder")
    assert subagents.get("scarf_coder") == coder


def test_of_two_that_take_one_name_at_once_one_gets_it(keeper: Keeper, subagents: Subagents, coder: Subagent) -> None:
    subagents.build(draft("hat_coder"), "Knit a hat", since=LONG_AGO)
    done = at_once(lambda: keeper.rename("scarf_coder", "wool_coder"), lambda: keeper.rename("hat_coder", "wool_coder"))
    assert [type(each) for each in done].count(CannotChange) == 1
    assert len(subagents.all()) == 2


def test_a_template_keeps_the_name_of_its_file_for_as_long_as_there_is_one(
    keeper: Keeper, subagents: Subagents, database: Database
) -> None:
    for _ in ("not stored yet", "stored"):
        with pytest.raises(CannotChange, match="the file be taken in again beside it"):
            keeper.rename("sea_poet", "ocean_poet")
        subagents.adopt(poet())
    assert Keeper(database, ()).rename("sea_poet", "ocean_poet").name == "ocean_poet"


# templates that no task has used yet -------------------------------------------------------------------------------


def test_a_template_is_looked_at_without_being_stored_and_stored_when_it_is_changed(
    keeper: Keeper, subagents: Subagents
) -> None:
    assert (keeper.get("sea_poet"), keeper.versions("sea_poet"), keeper.unused()) == (None, [], ["sea_poet"])
    assert keeper.export("sea_poet").examples == poet().examples
    assert subagents.all() == []
    assert keeper.archive("sea_poet").state is State.ARCHIVED
    assert keeper.unused() == []


# checks and moving -------------------------------------------------------------------------------------------------


def test_what_an_edit_may_not_say_is_refused_and_credentials_and_hosts_are_fine(
    keeper: Keeper, coder: Subagent
) -> None:
    secret = edited(coder, system_prompt="You say canary-of-the-service to whoever asks you about knitting.")
    with pytest.raises(InvalidDefinition, match="system_prompt: holds a secret of this service"):
        keeper.edit("scarf_coder", secret, based_on=1)
    with pytest.raises(InvalidDefinition, match="description: says nearly what sea_poet says"):
        keeper.edit("scarf_coder", edited(coder, description=poet().description), based_on=1)
    allowed = edited(coder, credentials=("WOOL_API_KEY",), hosts=("*.wool.example.com",))
    assert keeper.edit("scarf_coder", allowed, based_on=1, note=" two\nlines ").definition == allowed
    with pytest.raises(InvalidDefinition, match="note: "):
        keeper.edit("scarf_coder", coder.definition, based_on=2, note="\x1b[31m")


def test_a_description_that_was_like_another_before_is_not_held_against_an_edit_of_the_prompt(
    keeper: Keeper, subagents: Subagents
) -> None:
    twin = subagents.build(draft("harbour_poet", description=poet().description), "A poem", since=LONG_AGO)
    assert keeper.edit("harbour_poet", edited(twin, max_turns=3), based_on=1).version == 2


def test_an_export_is_taken_in_elsewhere_with_its_examples(
    keeper: Keeper, lives: Lives, coder: Subagent, database_url: str
) -> None:
    moved = keeper.export("scarf_coder")
    rows(database_url, "DELETE FROM subagents")
    now, before = keeper.take_in(moved.name, moved.definition, moved.examples, note="imported")
    assert (before, now.version, now.definition, now.state) == (None, 1, coder.definition, State.ACTIVE)
    assert dict(lives.examples("scarf_coder")) == dict.fromkeys(moved.examples, Author.OWNER)
    assert set(moved.examples) == {UNFITTING_TASK, *draft("scarf_coder").examples}


def test_a_name_that_exists_gets_a_new_version_only_if_that_is_wanted(
    keeper: Keeper, lives: Lives, coder: Subagent
) -> None:
    changed = edited(coder, max_turns=3)
    with pytest.raises(CannotChange, match="there is a subagent scarf_coder already"):
        keeper.take_in("scarf_coder", changed, ())
    now, before = keeper.take_in("scarf_coder", changed, ("Code a scarf for two",), replace=True)
    assert (before, now.id, now.version, now.definition) == (coder, coder.id, 2, changed)
    assert ("Code a scarf for two", Author.OWNER) in lives.examples("scarf_coder")
    same, _ = keeper.take_in("scarf_coder", changed, (), replace=True)
    assert same.version == 2


def test_an_import_under_a_templates_name_is_an_edit_of_the_template(keeper: Keeper, versions: Versions) -> None:
    changed = poet(max_turns=3).definition()
    with pytest.raises(CannotChange, match=r"already \(a template\)"):
        keeper.take_in("sea_poet", changed, ())
    keeper.take_in("sea_poet", changed, (), replace=True)
    assert [version.author for version in versions.of("sea_poet")] == [Author.TEMPLATE, Author.OWNER]


def test_an_import_is_checked_as_a_draft_is(keeper: Keeper, subagents: Subagents) -> None:
    said = draft("scarf_coder")
    with pytest.raises(InvalidDefinition) as caught:
        keeper.take_in("scarf_coder", said.definition(), ("Say \x1b[2J", "sk-ant-" + "a" * 30))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["examples.0", "examples.1"]
    assert subagents.all() == []


def test_examples_that_no_import_would_take_are_left_out_and_those_of_people_if_wanted(
    keeper: Keeper, coder: Subagent, database_url: str
) -> None:
    learn = "INSERT INTO subagent_examples (subagent_id, task, source) VALUES (%s, %s, %s::version_author)"
    for task, source in [("Ring \x07 twice", "owner"), ("Knit for Ann, 5 Elm St", "person")]:
        rows(database_url, learn, coder.id, task, source)
    moved = keeper.export("scarf_coder")
    assert set(moved.examples) == {UNFITTING_TASK, *draft("scarf_coder").examples, "Knit for Ann, 5 Elm St"}
    assert moved.left_out == 1
    assert "Knit for Ann, 5 Elm St" not in keeper.export("scarf_coder", learned=False).examples


def test_of_two_imports_of_one_name_at_once_one_is_stored(keeper: Keeper, versions: Versions) -> None:
    said = draft("scarf_coder").definition()
    done = at_once(*2 * [lambda: keeper.take_in("scarf_coder", said, (str(uuid.uuid4()),))])
    assert [type(each) for each in done].count(CannotChange) == 1
    assert len(versions.of("scarf_coder")) == 1


def test_what_is_not_there_is_not_changed(lives: Lives, keeper: Keeper) -> None:
    definition = draft("scarf_coder").definition()
    for change in (
        lambda: lives.edit("scarf_coder", definition, based_on=1),
        lambda: lives.roll_back("scarf_coder", to=1, based_on=2),
        lambda: lives.archive("scarf_coder"),
        lambda: keeper.restore("scarf_coder"),
        lambda: keeper.rename("scarf_coder", "hat_coder"),
        lambda: keeper.version("scarf_coder", 1),
    ):
        with pytest.raises(UnknownSubagent):
            change()
