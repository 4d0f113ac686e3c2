"""Which credentials a run is given, and what becomes of a job whose subagent's are missing. Claude is played here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pokestrator.claude.pool import Claude
from pokestrator.jobs import JobState, Outcome
from pokestrator.parts import make_runner
from pokestrator.redaction import Redactor
from pokestrator.running import Runner
from pokestrator.runs import ErrorKind, RunEvent, RunRequest, RunResult
from pokestrator.settings import Settings
from pokestrator.store.credentials import Credentials
from pokestrator.store.history import History
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.secrets import Vault, new_key
from pokestrator.store.subagents import Subagents
from pokestrator.subagents import Template
from tests.integration.flow import POET_TASK, job_row, poet, quiet_task


class Player:
    """A Claude that succeeds at once and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[RunRequest] = []
        self.answer = "A poem."

    def run(self, request: RunRequest, on_event: Callable[[Any], None]) -> RunResult:
        self.asked.append(request)
        on_event(RunEvent("text", self.answer))
        return RunResult(text=self.answer)

    def cancel(self, run_id: str) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def claude() -> Player:
    return Player()


@pytest.fixture
def vault() -> Vault:
    return Vault(new_key())


@pytest.fixture
def credentials(database: Database, vault: Vault) -> Credentials:
    return Credentials(database, vault)


def runner_on(database: Database, vault: Vault, claude: Claude, templates: list[Template]) -> Runner:
    """A runner on real stores, whose Claude is this one."""
    settings = Settings.from_environ({"POKESTRATOR_AGENT_TIMEOUT": "30"})
    return make_runner(settings, database, vault, Jobs(database), templates, claude=claude, redactor=Redactor())


@pytest.fixture
def run(
    database: Database, jobs: Jobs, subagents: Subagents, vault: Vault, claude: Claude
) -> Callable[..., tuple[Outcome, dict[str, Any]]]:
    """Run POET_TASK with a template that has these fields; the outcome, and the job's row before it is ended."""

    def run(url: str, **fields: Any) -> tuple[Outcome, dict[str, Any]]:
        templates = [poet(**fields)]
        runner = runner_on(database, vault, claude, templates)
        subagents.follow(templates)
        job = jobs.insert_claimed(quiet_task(POET_TASK), "me", 60)
        outcome = runner.outcome(job)
        row = job_row(url, job.id)
        jobs.finish(job, outcome)
        return outcome, row

    return run


Run = Callable[..., tuple[Outcome, dict[str, Any]]]


def test_a_run_gets_what_its_version_lists_and_nothing_else(
    run: Run, claude: Player, credentials: Credentials, database_url: str
) -> None:
    for name in ("SEA_KEY", "SHIP_KEY", "LAND_KEY"):
        credentials.set(name, f"value-of-{name}")
    run(database_url, credentials=["SEA_KEY"], optional_credentials=["SHIP_KEY", "STAR_KEY"])
    assert claude.asked[0].variables == {"SEA_KEY": "value-of-SEA_KEY", "SHIP_KEY": "value-of-SHIP_KEY"}
    run(database_url)
    assert claude.asked[1].variables == {}


def test_a_run_that_says_another_subagents_credential_is_not_kept_with_it(
    run: Run, claude: Player, credentials: Credentials, history: History, database_url: str
) -> None:
    credentials.set("LAND_KEY", "value-of-LAND_KEY")
    claude.answer = "A page told me value-of-LAND_KEY."
    outcome, row = run(database_url)
    assert outcome.text == "A page told me [secret]."
    assert [event.text for event in history.timeline(row["id"]) if event.kind == "text"] == [outcome.text]
    assert claude.asked[0].variables == {}


def test_without_one_that_is_needed_nothing_is_run_and_with_it_the_next_attempt_works(
    run: Run, claude: Player, credentials: Credentials, history: History, database_url: str
) -> None:
    credentials.set("SEA_KEY", "a-value-of-it")
    listed = ["SEA_KEY", "SHIP_KEY", "STAR_KEY"]
    outcome, row = run(database_url, credentials=listed)
    assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.NEEDS_CREDENTIALS)
    assert outcome.detail == "SHIP_KEY is not stored; STAR_KEY is not stored"
    assert "without SHIP_KEY and STAR_KEY: " in outcome.text
    assert not outcome.is_transient
    assert claude.asked == []
    assert (row["runs"], row["route"]) == (0, "template")  # nothing was done that could be doubled
    stored = history.outcome(row["id"])
    assert stored is not None
    assert stored.error is ErrorKind.NEEDS_CREDENTIALS

    for name in ("SHIP_KEY", "STAR_KEY"):
        credentials.set(name, "a-value-of-it")
    outcome, _ = run(database_url, credentials=listed)
    assert outcome.state is JobState.SUCCEEDED
    assert claude.asked[0].variables.keys() == set(listed)


def test_one_whose_key_is_lost_is_missing_and_the_record_says_why(
    run: Run, database: Database, database_url: str
) -> None:
    Credentials(database, Vault(new_key())).set("SEA_KEY", "a-value-of-it")
    outcome, _ = run(database_url, credentials=["SEA_KEY"])
    assert outcome.error is ErrorKind.NEEDS_CREDENTIALS
    assert "SEA_KEY cannot be decrypted: it was encrypted with another POKESTRATOR_SECRET_KEY" in outcome.detail
    assert "credentials set SEA_KEY" in outcome.text


def test_a_version_keeps_its_optional_credentials(subagents: Subagents) -> None:
    template = poet(credentials=["SEA_KEY"], optional_credentials=["SHIP_KEY"])
    adopted = subagents.adopt(template)
    assert adopted.definition == template.definition()
    assert adopted.definition.optional_credentials == ("SHIP_KEY",)


@pytest.mark.parametrize("field", ["credentials", "optional_credentials"])
def test_from_memory_a_template_that_lists_credentials_does_not_run(field: str, claude: Player) -> None:
    away = Database("postgresql://nobody@127.0.0.1:9/none")  # never opened
    runner = runner_on(away, Vault(), claude, [poet(**{field: ["SEA_KEY"]})])
    outcome = runner.outcome_from_memory(quiet_task(POET_TASK))
    assert (outcome.state, outcome.error) == (JobState.FAILED, ErrorKind.NOT_STORED)
    assert outcome.detail == "the credentials of sea_poet are in the database"
    assert claude.asked == []
