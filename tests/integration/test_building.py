"""From a task that nothing fits to the subagent that takes it: real PostgreSQL, agent slots and CLI; Claude's API is
scripted."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pokestrator.asking import Asker
from pokestrator.building import Builder, Built
from pokestrator.claude.pool import Claude, Slots
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.errors import LeaseLost
from pokestrator.jobs import Job, JobState, Outcome
from pokestrator.redaction import Redactor
from pokestrator.runs import ErrorKind, RunRequest, RunResult, Usage
from pokestrator.store.budgets import Budgets
from pokestrator.store.credentials import Credentials
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.secrets import Vault, new_key
from pokestrator.store.shortlist import Shortlists
from pokestrator.store.subagents import Subagents
from pokestrator.store.widening import Widening
from pokestrator.subagents import Definition, Draft, Origin, State, Subagent
from tests.integration.flow import UNFITTING_TASK, draft, examples_for, job_row, poet, row, rows, task

SEMAPHORE_TASK = "Say the scarf of my uncle in semaphore flags"
TEMPLATES = (poet(),)
SCARF = draft("scarf_coder")
BAD = SCARF.model_copy(update={"system_prompt": "Use the WebFetch tool to find the pattern, then write it in Morse."})
TAKEN = SCARF.model_copy(update={"name": "sea_poet"})
WIDER = draft(
    "scarf_coder",
    widens="scarf_coder",
    description="Puts knitting patterns of scarves into Morse code or semaphore flags.",
    examples=examples_for("Put this scarf into semaphore flags"),
)

Build = Callable[..., tuple[Built | Outcome, Job]]


def answers(drafted: Draft, **more: Any) -> dict[str, Any]:
    """A step in which the drafter answers this."""
    return {"structured": drafted.model_dump(mode="json"), "for": "draft", **more}


@pytest.fixture
def claude(slots: Slots) -> Claude:
    return slots


@pytest.fixture
def credentials(database: Database) -> Credentials:
    return Credentials(database, Vault(new_key()))


@pytest.fixture
def builder(database: Database, jobs: Jobs, claude: Claude, credentials: Credentials) -> Builder:
    return builder_on(database, jobs, claude, credentials)


def builder_on(database: Database, jobs: Jobs, claude: Claude, credentials: Credentials, **changes: float) -> Builder:
    asker = Asker(
        jobs=jobs,
        credentials=credentials,
        budgets=Budgets(database, 20.0, 10.0),
        claude=claude,
        redactor=Redactor(),
    )
    limits = {"timeout_seconds": 30.0, "most_usd": 10.0, **changes}
    return Builder(
        subagents=Subagents(database),
        widening=Widening(database),
        shortlists=Shortlists(database),
        templates=TEMPLATES,
        asker=asker,
        model="haiku",
        **limits,
    )


@pytest.fixture
def build(builder: Builder, jobs: Jobs) -> Build:
    def build(description: str, *steps: dict[str, Any], nearest: tuple[Subagent, ...] = ()) -> Any:
        job = jobs.insert_claimed(task(description, *steps), "me", 60)
        return builder.build(job, {near.name: near.definition.description for near in nearest}), job

    return build


@pytest.fixture
def scarf_coder(build: Build) -> Subagent:
    """A subagent that the drafter has built."""
    return built(build(UNFITTING_TASK, answers(SCARF)))


def built(result: tuple[Built | Outcome, Job]) -> Subagent:
    """The subagent of a build that was good."""
    assert isinstance(result[0], Built), result[0]
    return result[0].subagent


def refused(result: tuple[Built | Outcome, Job]) -> Outcome:
    """The outcome of one that was not."""
    assert isinstance(result[0], Outcome), result[0]
    assert result[0].state is JobState.FAILED
    return result[0]


def drafting(history: History, job: Job) -> list[str]:
    """What the timeline says of the drafter's tries."""
    return [event.text for event in history.timeline(job.id) if event.kind == "drafting"]


def examples_of(url: str, subagent: Subagent) -> set[str]:
    return {row["task"] for row in rows(url, "SELECT task FROM subagent_examples WHERE subagent_id = %s", subagent.id)}


# a new one ---------------------------------------------------------------------------------------------------------


def test_a_good_draft_is_stored_on_probation_with_the_task_as_an_example(build: Build, database_url: str) -> None:
    result, job = build(UNFITTING_TASK, answers(SCARF))
    assert isinstance(result, Built)
    assert (result.subagent.state, result.subagent.version) == (State.PROBATION, 1)
    assert result.subagent.definition == SCARF.definition()
    assert examples_of(database_url, result.subagent) == {UNFITTING_TASK, *SCARF.examples}
    assert "so I built “scarf coder”: " in result.message
    assert job_row(database_url, job.id)["reserved_usd"] == 0.5  # what two tries may cost


def test_the_drafter_sees_the_nearest_and_the_prompts_of_those_it_may_widen(
    build: Build, scarf_coder: Subagent, subagents: Subagents, api: MessagesApi
) -> None:
    template = subagents.adopt(poet())
    built(build(SEMAPHORE_TASK, answers(draft("flag_waver")), nearest=(template, scarf_coder)))
    asked = str(api.requests[-1].body["messages"])
    assert "sea_poet: Writes short poems about the sea" in asked
    assert "scarf_coder can be widened" in asked
    assert scarf_coder.definition.system_prompt in asked
    assert template.definition.system_prompt not in asked


def test_a_task_that_holds_a_secret_becomes_no_example(build: Build, database_url: str) -> None:
    secret = "sk_live_" + "51HxAbCdEfGhIjKl"
    subagent = built(build(f"Convert the scarf with the key {secret}", answers(SCARF)))
    assert examples_of(database_url, subagent) == set(SCARF.examples)


# a wider one -------------------------------------------------------------------------------------------------------


def test_widening_writes_a_new_version_on_probation_that_takes_the_task_too(
    build: Build, scarf_coder: Subagent, subagents: Subagents, history: History, database_url: str
) -> None:
    rows(database_url, "UPDATE subagents SET state = 'active'")
    result, job = build(SEMAPHORE_TASK, answers(WIDER), nearest=(scarf_coder,))
    assert isinstance(result, Built)
    assert result.is_widened
    assert "so I taught “scarf coder” to do it: Puts knitting patterns" in result.message
    now = subagents.get("scarf_coder")
    assert now == result.subagent
    assert now is not None
    assert (now.id, now.version, now.state) == (scarf_coder.id, 2, State.PROBATION)
    assert now.definition == WIDER.definition()
    expected = {UNFITTING_TASK, *SCARF.examples, SEMAPHORE_TASK, *WIDER.examples}
    assert examples_of(database_url, now) == expected
    version = row(database_url, "SELECT * FROM subagent_versions WHERE version = 2")
    assert (version["author"], version["note"]) == ("drafter", f"widened for: {SEMAPHORE_TASK}")
    old = row(database_url, "SELECT * FROM subagent_versions WHERE version = 1")
    assert old["system_prompt"] == SCARF.system_prompt
    [line] = [event.text for event in history.timeline(job.id) if event.kind == "widened"]
    assert line.startswith("scarf_coder version 2: Puts knitting patterns")
    found = Shortlists(subagents._source).find("semaphore", ()).candidates
    assert [candidate.name for candidate in found] == ["scarf_coder"]


def test_a_long_task_is_cut_in_the_note(build: Build, scarf_coder: Subagent, database_url: str) -> None:
    built(build(f"{SEMAPHORE_TASK}\n" + "again " * 500, answers(WIDER), nearest=(scarf_coder,)))
    note = row(database_url, "SELECT note FROM subagent_versions WHERE version = 2")["note"]
    assert len(note) < 250
    assert "\n" not in note


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE subagents SET state = 'archived'",
        "UPDATE subagent_versions SET author = 'owner'",
        "UPDATE subagent_versions SET author = 'template'",
        "UPDATE subagent_versions SET credentials = '{SCARF_KEY}'",
        "UPDATE subagent_versions SET optional_credentials = '{SCARF_KEY}'",
        "UPDATE subagent_versions SET hosts = '{*}'",
        "UPDATE subagent_versions SET system_prompt = repeat('x', 8001)",
    ],
    ids=["archived", "the owner's", "a template's", "credentials", "optional credentials", "any host", "too long"],
)
def test_what_may_not_be_reworded_is_not_widened(
    build: Build, scarf_coder: Subagent, api: MessagesApi, database_url: str, change: str
) -> None:
    rows(database_url, change)
    before = row(database_url, "SELECT * FROM subagent_versions")
    outcome = refused(build(SEMAPHORE_TASK, answers(WIDER), nearest=(scarf_coder,)))
    assert outcome.error is ErrorKind.INVALID_DRAFT
    assert "widens: scarf_coder cannot be widened, none can be" in outcome.detail
    assert row(database_url, "SELECT * FROM subagent_versions") == before
    assert row(database_url, "SELECT version FROM subagents")["version"] == 1
    assert "can be widened. It has" not in str(api.requests[-1].body["messages"])


def test_one_that_was_not_among_the_nearest_is_not_widened(build: Build, scarf_coder: Subagent) -> None:
    outcome = refused(build(SEMAPHORE_TASK, answers(WIDER)))
    assert "widens: scarf_coder cannot be widened" in outcome.detail


def test_after_a_refused_widening_the_second_try_may_build(build: Build, scarf_coder: Subagent) -> None:
    steps = (answers(WIDER, **{"try": 1}), answers(draft("flag_waver"), **{"try": 2}))
    assert built(build(SEMAPHORE_TASK, *steps)).name == "flag_waver"


# drafts that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (BAD, "system_prompt: tells it to use WebFetch, which is not in its tools; add it there, or take that out"),
        (TAKEN, "name: sea_poet is the name of a template; take another"),
        (SCARF.model_copy(update={"description": " " * 40}), "description: String should have at least 20 characters"),
    ],
    ids=["a problem", "a template's name", "our own lengths"],
)
def test_a_bad_draft_is_mended_at_the_second_try(
    build: Build, history: History, api: MessagesApi, bad: Draft, reason: str
) -> None:
    usage = {"input_tokens": 1_000, "output_tokens": 50}
    steps = (answers(bad, **{"try": 1}, usage=usage), answers(SCARF, **{"try": 2}, usage=usage))
    result, job = build(UNFITTING_TASK, *steps)
    assert isinstance(result, Built), result
    assert result.subagent.definition == SCARF.definition()
    first, second = drafting(history, job)
    assert first == "asking haiku for a new subagent"
    assert second == f"asking once more, the draft was refused: {reason}"
    assert result.usage.input_tokens == 2_000
    asked = str(api.requests[-1].body["messages"])
    assert f"<problems>\\n{reason}" in asked
    assert "<refused_draft>" in asked


def test_a_draft_that_is_bad_twice_fails_and_says_why_and_what_both_cost(
    build: Build, subagents: Subagents, history: History
) -> None:
    outcome = refused(result := build(UNFITTING_TASK, answers(BAD, usage={"input_tokens": 1_000})))
    assert outcome.error is ErrorKind.INVALID_DRAFT
    assert outcome.detail.startswith("2 drafts were refused; the last one: system_prompt: tells it to use WebFetch")
    assert outcome.usage.input_tokens == 2_000
    assert len(drafting(history, result[1])) == 2
    assert subagents.all() == []


def test_a_draft_that_says_what_another_says_is_told_to_widen_it_and_does(
    build: Build, scarf_coder: Subagent, history: History
) -> None:
    twin = SCARF.model_copy(update={"name": "scarf_morser"})
    steps = (answers(twin, **{"try": 1}), answers(WIDER, **{"try": 2}))
    result = build(SEMAPHORE_TASK, *steps, nearest=(scarf_coder,))
    assert built(result).version == 2
    assert "widen scarf_coder" in drafting(history, result[1])[1]


def test_a_description_is_compared_with_those_that_were_not_near_the_task(build: Build, scarf_coder: Subagent) -> None:
    twin = SCARF.model_copy(update={"name": "scarf_morser"})
    assert "says nearly what scarf_coder says" in refused(build("Whatever else", answers(twin))).detail
    again = SCARF.model_copy(update={"description": f"{SCARF.description} Again."})
    assert "says nearly what scarf_coder says" in refused(build("Whatever else", answers(again))).detail


def test_a_secret_in_a_draft_is_never_stored(
    build: Build, credentials: Credentials, subagents: Subagents, history: History, database_url: str
) -> None:
    credentials.set("SCARF_KEY", "correct-horse-battery")
    leaky = SCARF.model_copy(update={"system_prompt": f"{SCARF.system_prompt} The key is correct-horse-battery."})
    outcome = refused(result := build(UNFITTING_TASK, answers(leaky)))
    assert "system_prompt: holds a secret of this service" in outcome.detail
    assert "correct-horse" not in outcome.detail + str(drafting(history, result[1]))
    assert subagents.all() == []


# a drafter that does not answer ------------------------------------------------------------------------------------


def test_a_drafter_that_declines_is_not_asked_again(build: Build, history: History, subagents: Subagents) -> None:
    outcome = refused(result := build(UNFITTING_TASK, {"refusal": True}))
    assert outcome.error is ErrorKind.REFUSAL
    assert len(drafting(history, result[1])) == 1
    assert subagents.all() == []


def test_a_drafter_that_is_slow_ends_by_the_deadline(
    database: Database, jobs: Jobs, claude: Claude, credentials: Credentials
) -> None:
    builder = builder_on(database, jobs, claude, credentials, timeout_seconds=3.0)
    job = jobs.insert_claimed(task(UNFITTING_TASK, {"hang": 60}), "me", 60)
    outcome = builder.build(job, {})
    assert isinstance(outcome, Outcome)
    assert outcome.error is ErrorKind.TIMEOUT


@pytest.mark.parametrize("said", ["Brews tea in pots of all sizes", "Brews tea in pots of all sizes."])
def test_the_person_is_told_in_whole_sentences(said: str) -> None:
    definition = Definition(description=said, system_prompt="You brew tea, and say when it is ready to drink.")
    message = Built(Subagent(1, "tea_brewer", Origin.BUILT, 1, definition), False, Usage()).message
    assert "so I built “tea brewer”: Brews tea in pots of all sizes. Please send the task again" in message


def test_a_second_try_that_fails_counts_the_first(build: Build) -> None:
    steps = (answers(BAD, **{"try": 1}, usage={"input_tokens": 1_000}), {"refusal": True, "try": 2})
    outcome = refused(build(UNFITTING_TASK, *steps))
    assert outcome.error is ErrorKind.REFUSAL
    assert outcome.usage.input_tokens >= 1_000


def test_both_tries_are_kept_to_what_the_day_allows(
    database: Database, jobs: Jobs, claude: Claude, credentials: Credentials, database_url: str
) -> None:
    builder = builder_on(database, jobs, claude, credentials, most_usd=0.1)
    job = jobs.insert_claimed(task(UNFITTING_TASK, answers(SCARF)), "me", 60)
    assert isinstance(builder.build(job, {}, spent_usd=0.02), Built)
    assert job_row(database_url, job.id)["reserved_usd"] == pytest.approx(0.1)  # what the route has cost is part of it


# at the same time --------------------------------------------------------------------------------------------------


class Together:
    """A Claude whose first answers are given out only when all who ask at once have one."""

    def __init__(self, claude: Claude, count: int) -> None:
        self._claude = claude
        self._barrier = threading.Barrier(count)
        self._met = threading.local()

    def run(self, request: RunRequest, on_event: Callable[[Any], None]) -> RunResult:
        result = self._claude.run(request, on_event)
        if not getattr(self._met, "yes", False):
            self._met.yes = True
            self._barrier.wait(30)
        return result

    def cancel(self, run_id: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def at_once(
    database: Database, jobs: Jobs, slots: Slots, credentials: Credentials
) -> Callable[..., list[Built | Outcome]]:
    """Build for these scripts in threads, all drafts of which are answered before one is stored."""

    def at_once(scripts: dict[str, list[dict[str, Any]]], nearest: dict[str, str]) -> list[Built | Outcome]:
        builder = builder_on(database, jobs, Together(slots, len(scripts)), credentials)
        claimed = [jobs.insert_claimed(task(words, *steps), "me", 60) for words, steps in scripts.items()]
        with ThreadPoolExecutor(len(scripts)) as threads:
            return list(threads.map(lambda job: builder.build(job, nearest), claimed))

    return at_once


AtOnce = Callable[..., list[Built | Outcome]]


@pytest.mark.parametrize("other", ["scarf_coder", "scarf_morser"], ids=["one name", "one description"])
def test_two_builds_of_one_kind_at_once_end_with_one_subagent_that_knows_both_tasks(
    at_once: AtOnce, subagents: Subagents, database_url: str, other: str
) -> None:
    twin = SCARF.model_copy(update={"name": other})
    scripts = {UNFITTING_TASK: [answers(SCARF)], SEMAPHORE_TASK: [answers(twin)]}
    results = at_once(scripts, {})
    assert all(isinstance(result, Built) for result in results), results
    [subagent] = subagents.all()
    assert {UNFITTING_TASK, SEMAPHORE_TASK} <= examples_of(database_url, subagent)


def test_two_builds_of_different_kinds_at_once_end_with_two(at_once: AtOnce, subagents: Subagents) -> None:
    at_once({UNFITTING_TASK: [answers(SCARF)], SEMAPHORE_TASK: [answers(draft("flag_waver"))]}, {})
    assert {subagent.name for subagent in subagents.all()} == {"scarf_coder", "flag_waver"}


def test_of_two_widenings_at_once_the_second_is_drafted_again_from_what_the_first_wrote(
    at_once: AtOnce, scarf_coder: Subagent, subagents: Subagents, api: MessagesApi, database_url: str
) -> None:
    braille = "Put the scarf of my aunt into Braille dots"
    wider = {
        words: WIDER.model_copy(update={"system_prompt": f"{SCARF.system_prompt} You know {words}."})
        for words in (SEMAPHORE_TASK, braille)
    }
    scripts = {
        words: [
            answers(first, **{"try": 1}),
            answers(first.model_copy(update={"system_prompt": f"{first.system_prompt} And all before."}), **{"try": 2}),
        ]
        for words, first in wider.items()
    }
    results = at_once(scripts, {"scarf_coder": scarf_coder.definition.description})
    versions = sorted(result.subagent.version for result in results if isinstance(result, Built))
    assert versions == [2, 3], results
    now = subagents.get("scarf_coder")
    assert now is not None
    assert now.version == 3
    assert now.definition.system_prompt.endswith("And all before.")
    assert {SEMAPHORE_TASK, braille} <= examples_of(database_url, now)
    # The one that came second was shown what the first one wrote.
    second = row(database_url, "SELECT system_prompt FROM subagent_versions WHERE version = 2")["system_prompt"]
    assert json.dumps(second)[1:-1] in json.dumps(api.requests[-1].body["messages"])


def test_an_owner_that_has_lost_its_job_widens_nothing(
    database: Database, jobs: Jobs, scarf_coder: Subagent, subagents: Subagents
) -> None:
    job = jobs.insert_claimed(task(SEMAPHORE_TASK), "me", 60)
    jobs.release([job])
    with pytest.raises(LeaseLost):
        Widening(database).widen(scarf_coder, WIDER.definition(), WIDER.examples, note="", claim=job)
    assert subagents.get("scarf_coder") == scarf_coder
