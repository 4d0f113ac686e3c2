"""`python -m pokestrator callbacks`, as a person uses it."""

from __future__ import annotations

import tempfile
import uuid
from pathlib import Path

import psycopg
import pytest

from pokestrator.intake import new_job
from pokestrator.jobs import Channel, JobState, Outcome
from pokestrator.store.callbacks import Callbacks
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.jobs import Jobs
from pokestrator.store.migrate import migrate
from pokestrator.store.pool import Database
from tests.acceptance.processes import eventually, living
from tests.acceptance.test_cli import Environment, pokestrator


def dead_letter(database_url: str, text: str = "Your parrots are fed.", reason: str = "HTTP 400 no") -> uuid.UUID:
    """The request_id of a new dead letter."""
    database = Database(database_url)
    database.open()
    try:
        jobs, outbox = Jobs(database), Callbacks(database)
        job = jobs.insert_claimed(new_job("Feed the parrots"), "me", 60)
        jobs.finish(job, Outcome(JobState.SUCCEEDED, text))
        [callback] = outbox.claim_due([Channel.API_MESSAGE], 1, job.id)
        outbox.dead(callback, 400, reason)
        return job.id
    finally:
        database.close()


def callback_states(database_url: str) -> list[str]:
    with psycopg.connect(database_url) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM callbacks ORDER BY created_at")]


def test_dead_letters_are_listed_newest_first_on_a_line_each_without_what_a_terminal_obeys(
    service_environment: Environment, database_url: str
) -> None:
    older = dead_letter(database_url, "One\nline \x1b[2J" + "x" * 100, "HTTP 400 \x1b]0;title\x07")
    newer = dead_letter(database_url)
    done = pokestrator("callbacks", "list", environment=service_environment)
    first, second = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert first.startswith(str(newer))
    assert first.endswith("   1 tries  400  HTTP 400 no  Your parrots are fed.")
    assert second.startswith(str(older))
    assert "\x1b" not in second
    assert "One line ·[2Jxxx" in second
    assert second.endswith("xx…")
    limited = pokestrator("callbacks", "list", "--limit", "1", environment=service_environment)
    assert (limited.stdout.splitlines(), limited.stderr) == (
        [first],
        "There are more than these 1; --limit shows them.\n",
    )


def test_a_dead_letter_is_replayed_by_its_request_id_and_all_of_them_with_dead(
    service_environment: Environment, database_url: str
) -> None:
    ids = [dead_letter(database_url) for _ in range(3)]
    one = pokestrator("callbacks", "replay", str(ids[1]), environment=service_environment)
    assert (one.returncode, one.stdout) == (0, "1 callback will be sent by the running service.\n")
    assert callback_states(database_url) == ["dead", "pending", "dead"]
    rest = pokestrator("callbacks", "replay", "--dead", environment=service_environment)
    assert (rest.returncode, rest.stdout) == (0, "2 callbacks will be sent by the running service.\n")
    assert callback_states(database_url) == ["pending"] * 3


def test_a_dead_letter_is_discarded_for_good(service_environment: Environment, database_url: str) -> None:
    ids = [dead_letter(database_url) for _ in range(3)]
    one = pokestrator("callbacks", "discard", str(ids[0]), environment=service_environment)
    assert (one.returncode, one.stdout) == (0, "1 callback deleted for good.\n")
    rest = pokestrator("callbacks", "discard", "--dead", environment=service_environment)
    assert (rest.returncode, rest.stdout) == (0, "2 callbacks deleted for good.\n")
    assert callback_states(database_url) == []
    empty = pokestrator("callbacks", "list", environment=service_environment)
    assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "There are no dead letters.\n")


def test_only_dead_letters_can_be_replayed_and_the_answer_says_why_not(
    service_environment: Environment, database_url: str
) -> None:
    job_id = dead_letter(database_url)
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE callbacks SET state = 'delivered'")
    done = pokestrator("callbacks", "replay", str(job_id), environment=service_environment)
    assert (done.returncode, done.stderr) == (1, f"the callback of {job_id} is delivered already\n")


@pytest.mark.parametrize(
    ("arguments", "changed", "code", "said"),
    [
        ([str(uuid.UUID(int=1))], {}, 1, f"there is no callback of a request {uuid.UUID(int=1)}"),
        ([], {}, 2, "give either the ID of a request or --dead"),
        ([str(uuid.UUID(int=1)), "--dead"], {}, 2, "give either the ID of a request or --dead"),
        (["not-an-id"], {}, 2, "'not-an-id' is not a valid UUID"),
        (["--dead"], {"PORT": "many"}, 2, "PORT=many"),
        (["--dead"], {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}, 3, "no database: "),
    ],
)
def test_what_cannot_be_replayed_says_why(
    service_environment: Environment, arguments: list[str], changed: Environment, code: int, said: str
) -> None:
    done = pokestrator("callbacks", "replay", *arguments, environment={**service_environment, **changed})
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_embedded_database_in_use_is_joined_and_left_running(service_environment: Environment) -> None:
    with tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder:
        server = EmbeddedPostgres(Path(folder) / "data")
        try:
            migrate(Database(server.url))
            dead_letter(server.url)
            environment = {**service_environment, "DATABASE_URL": "", "POKESTRATOR_DATA_DIR": f"{folder}/data"}
            done = pokestrator("callbacks", "replay", "--dead", environment=environment)
            assert done.stdout == "1 callback will be sent by the running service.\n", done.stderr
            assert callback_states(server.url) == ["pending"]
        finally:
            server.leave()
        assert eventually(lambda: not living(folder)), living(folder)


def test_a_database_that_was_never_prepared_is_none(service_environment: Environment) -> None:
    with tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder:
        environment = {**service_environment, "DATABASE_URL": "", "POKESTRATOR_DATA_DIR": f"{folder}/data"}
        done = pokestrator("callbacks", "list", environment=environment)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr.startswith("no database: ")
        assert eventually(lambda: not living(folder)), living(folder)
