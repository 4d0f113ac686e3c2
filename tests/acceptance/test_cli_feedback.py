"""`python -m pokestrator feedback`, as the owner uses it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest

from pokestrator.jobs import Channel
from pokestrator.store.jobs import Jobs
from pokestrator.store.pool import Database
from pokestrator.store.subagents import Subagents
from tests.acceptance.test_cli import Environment, pokestrator
from tests.integration.flow import POKE_KEY, job_row, poet
from tests.integration.lessons import FAILED, done, remembered

BUOY = "Describe how a buoy rocks in fog"


@pytest.fixture
def environment(service_environment: Environment) -> Environment:
    return {**service_environment, "POKE_API_KEY": POKE_KEY}


@pytest.fixture
def opened(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    database.open()
    yield database
    database.close()


def test_the_owner_says_of_any_result_whether_it_was_good(
    environment: Environment, opened: Database, database_url: str
) -> None:
    subagent = Subagents(opened).adopt(poet())
    job = done(Jobs(opened), subagent, BUOY, caller="somebody", channel=Channel.NONE)
    note = f"It knew {POKE_KEY}."
    said = pokestrator("feedback", str(job.id), "bad", "--note", note, environment=environment)
    assert (said.returncode, said.stdout, said.stderr) == (0, f"{job.id} is noted as bad.\n", "")
    assert remembered(database_url, subagent) == {}
    kept = job_row(database_url, job.id)
    assert (kept["verdict"], kept["verdict_note"]) == ("bad", "It knew [secret].")
    said = pokestrator("feedback", str(job.id), "good", "--json", environment=environment)
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout) == {"request_id": str(job.id), "state": "succeeded", "verdict": "good"}
    assert remembered(database_url, subagent) == {BUOY: 0}


def test_what_cannot_be_judged_is_an_error_that_says_why(environment: Environment, opened: Database) -> None:
    subagent = Subagents(opened).adopt(poet())
    failed = done(Jobs(opened), subagent, BUOY, outcome=FAILED)
    nobodys = uuid.uuid4()
    for arguments, code, words in [
        ((str(failed.id), "good"), 1, f"request {failed.id} is failed: there is no result to judge\n"),
        ((str(nobodys), "good"), 1, f"there is no request {nobodys}\n"),
        ((str(failed.id), "good", "--note", "x" * 1_001), 2, "--note: has 1,001 characters; at most 1,000 are taken\n"),
    ]:
        said = pokestrator("feedback", *arguments, environment=environment)
        assert (said.returncode, said.stdout, said.stderr) == (code, "", words)
    assert "'meh' is not one of" in pokestrator("feedback", str(nobodys), "meh", environment=environment).stderr
