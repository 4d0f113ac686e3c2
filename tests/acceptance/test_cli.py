"""`python -m pokestrator run` and `templates check`, and `python wsgi.py`, as a person uses them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
import requests
from psycopg.rows import dict_row

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import ROOT, call_orchestrate
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.processes import eventually, living

Environment = dict[str, str]


def pokestrator(*arguments: str, environment: Environment, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pokestrator", *arguments],
        env=environment,
        cwd=ROOT,
        input=stdin,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_run_prints_the_result_on_stdout_and_progress_on_stderr(service_environment: Environment, inbox: Inbox) -> None:
    task = 'Feed the parrots SCRIPT:[{"text": "Three parrots, 120 g of seeds.", "for": "run"}]'
    done = pokestrator("run", task, environment={**service_environment, "POKESTRATOR_AFTER_BUILD": "run"})
    assert (done.returncode, done.stdout) == (0, "Three parrots, 120 g of seeds.\n"), done.stderr
    assert "routed" in done.stderr
    assert "finished  succeeded" in done.stderr
    assert inbox.received == []  # asked for at a terminal: nobody is texted


def test_run_reads_a_task_from_standard_input(service_environment: Environment) -> None:
    done = pokestrator("run", "-", environment=service_environment, stdin="Split 184.50 between 5 people\n")
    assert done.returncode == 0, done.stderr
    assert "Split 184.50 between 5 people" in done.stdout


def test_a_failed_run_says_why_and_exits_1(service_environment: Environment) -> None:
    task = 'Split 184.50 between 5 people SCRIPT:[{"status": 401, "type": "authentication_error", "message": "no"}]'
    done = pokestrator("run", task, environment=service_environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert "refused this service's key" in done.stderr


@pytest.mark.parametrize(
    ("task", "changed", "code", "said"),
    [
        ("   ", {}, 2, "task_description: is empty"),
        ("hello", {"POKESTRATOR_AFTER_BUILD": "maybe"}, 2, "POKESTRATOR_AFTER_BUILD=maybe"),
        ("hello", {"DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}, 3, "database init failed: "),
    ],
)
def test_what_is_not_accepted_names_the_fix(
    service_environment: Environment, task: str, changed: Environment, code: int, said: str
) -> None:
    done = pokestrator("run", task, environment={**service_environment, **changed})
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def hanging_run(environment: Environment, messages_api: MessagesApi) -> Iterator[subprocess.Popen[str]]:
    """`run` with a task whose agent hangs, once it does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "run", 'Split 184.50 between 5 people SCRIPT:[{"hang": 60}]'],
        env=environment,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert messages_api.wait_for_requests(1, 30)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_cancels_a_run_and_leaves_no_process(
    service_environment: Environment, messages_api: MessagesApi, database_url: str, number: int, code: int
) -> None:
    marker = f"run-signal-{number:d}"
    with hanging_run({**service_environment, "LANG": marker}, messages_api) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=45)
    assert process.returncode == code
    assert errors.endswith("Interrupted.\n")
    assert eventually(lambda: not living(marker)), living(marker)
    assert only_job(database_url)["state"] == "cancelled"


def test_a_terminated_run_stops_its_embedded_database(
    service_environment: Environment, messages_api: MessagesApi
) -> None:
    with tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder:
        environment = {**service_environment, "DATABASE_URL": "", "POKESTRATOR_DATA_DIR": f"{folder}/data"}
        with hanging_run(environment, messages_api) as process:
            assert living(folder)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)
        assert process.returncode == 143
        assert eventually(lambda: not living(folder)), living(folder)


def test_a_run_holds_a_short_lease_and_renews_it(
    service_environment: Environment, messages_api: MessagesApi, database_url: str
) -> None:
    with hanging_run(service_environment, messages_api):
        first = only_job(database_url)
        assert first["lease_until"] - first["now"] < timedelta(seconds=21)
        assert eventually(lambda: only_job(database_url)["lease_until"] > first["lease_until"], 10)


def test_a_run_that_lost_its_job_says_so_and_exits_1(
    service_environment: Environment, messages_api: MessagesApi, database_url: str
) -> None:
    marker = "run-lost"
    with hanging_run({**service_environment, "LANG": marker}, messages_api) as process:
        with psycopg.connect(database_url) as connection:
            connection.execute("UPDATE jobs SET claim_seq = claim_seq + 1")
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (1, "")
    assert errors.endswith("was given up before it had a result\n")
    assert eventually(lambda: not living(marker)), living(marker)


def test_a_run_whose_database_goes_away_ends(
    service_environment: Environment, messages_api: MessagesApi, postgres: EmbeddedPostgres, database_url: str
) -> None:
    name = database_url.split("?")[0].rpartition("/")[2]
    with hanging_run(service_environment, messages_api) as process:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false".encode())
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 3
    assert "the database went away: " in errors
    assert "Traceback" not in errors


def test_run_says_that_claude_has_no_key_and_does_not_ask_for_pokes(service_environment: Environment) -> None:
    environment = {**service_environment, "ANTHROPIC_API_KEY": "", "POKE_API_KEY": ""}
    done = pokestrator("run", "Split 184.50 between 5 people", environment=environment)
    assert "neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set" in done.stderr
    assert "POKE_API_KEY" not in done.stderr


def test_run_works_on_an_embedded_database_that_keeps_what_was_built(
    service_environment: Environment,
) -> None:
    with tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder:
        environment = {**service_environment, "DATABASE_URL": "", "POKESTRATOR_DATA_DIR": f"{folder}/data"}
        task = "Compose a haiku about the harbour at dawn"
        first = pokestrator("run", task, environment=environment)
        second = pokestrator("run", task, environment=environment)
        assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
        assert "build_new" in first.stderr
        assert "match" in second.stderr
        assert eventually(lambda: not living(folder)), living(folder)


def test_templates_check_passes_for_the_shipped_ones_and_fails_for_a_broken_one(
    service_environment: Environment, tmp_path: Path
) -> None:
    assert pokestrator("templates", "check", environment=service_environment).returncode == 0
    broken = {"name": "broken", "description": "short", "system_prompt": "x" * 50}
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    done = pokestrator("templates", "check", str(tmp_path), environment=service_environment)
    assert done.returncode == 1
    assert "broken.json: description:" in done.stderr


def test_templates_check_of_a_folder_without_any_fails(service_environment: Environment, tmp_path: Path) -> None:
    done = pokestrator("templates", "check", str(tmp_path), environment=service_environment)
    assert (done.returncode, done.stderr) == (1, f"no template in {tmp_path}\n")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_wsgi_runs_each_job_in_its_requests_own_thread(
    service_environment: Environment, inbox: Inbox, host: str
) -> None:
    process = subprocess.Popen(
        [sys.executable, "wsgi.py"],
        env={**service_environment, "HOST": host, "PORT": "0"},
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        url = next(line for line in process.stderr if "/mcp" in line).split(",")[0]
        drain = threading.Thread(target=process.stderr.read)
        drain.start()
        assert url.startswith(f"http://{host}:")
        assert eventually(lambda: answers(url), 10)
        key = {"Authorization": f"Bearer {service_environment['POKESTRATOR_API_KEY']}"}
        call_orchestrate(url, {"task_description": "Split 184.50 between 5 people"}, key)
        assert len(inbox.wait_for(1, 30)) == 1
    finally:
        os.kill(process.pid, signal.SIGINT)
        process.wait(20)


def only_job(database_url: str) -> dict[str, Any]:
    """The one job, and the database's time."""
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        [job] = connection.execute("SELECT *, now() FROM jobs").fetchall()
    return job


def answers(url: str) -> bool:
    try:
        return requests.get(url.replace("/mcp", "/healthz"), timeout=2).status_code == 200
    except requests.ConnectionError:
        return False
