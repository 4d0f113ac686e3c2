"""`python -m pokestrator serve`: the real gunicorn, real MCP calls, real agents."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import psycopg
import pytest
import requests

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import ROOT, LocalService, call_orchestrate
from pokestrator.demo.messages_api import MessagesApi
from tests.acceptance.processes import children, eventually, living

Environment = dict[str, str]


def headers(environment: Environment) -> dict[str, str]:
    return {"Authorization": f"Bearer {environment['POKESTRATOR_API_KEY']}"}


def healthz(service: LocalService) -> dict[str, str]:
    answer = requests.get(service.url.replace("/mcp", "/healthz"), timeout=5)
    assert answer.status_code == 200
    health: dict[str, str] = answer.json()
    return health


def refused_start(environment: Environment) -> str:
    """What the service says when it does not start; it must end non-zero."""
    done = subprocess.run(
        [sys.executable, "-m", "pokestrator", "serve"],
        env=environment,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_task_comes_in_over_mcp_and_its_result_reaches_pokes_message_api(
    service_environment: Environment, inbox: Inbox
) -> None:
    with LocalService({**service_environment, "MCP_PATH": "/poke/door", "LOG_LEVEL": "DEBUG"}) as service:
        assert service.url.endswith("/poke/door")
        ack, _ = call_orchestrate(
            service.url, {"task_description": "Split 184.50 between 5 people with a tip"}, headers(service_environment)
        )
        [received] = inbox.wait_for(1, 30)
        assert service.wait_for_log('"delivered": true', 5)
        log = [json.loads(line) for line in service.log.splitlines()]
    assert received.channel == "api_message"
    assert received.headers["authorization"] == "Bearer pk-for-the-inbox"
    assert received.body["request_id"] == ack["request_id"]
    assert "answer" in received.body["message"]
    about_it = {line["event"]: line for line in log if line.get("request_id") == ack["request_id"]}
    assert about_it.keys() >= {"accepted", "routed", "finished", "callback"}
    assert about_it["callback"]["status"] == 200
    assert any(line["event"] == "PostgreSQL initialized and subagents table is ready" for line in log)
    for name in ("POKESTRATOR_API_KEY", "ANTHROPIC_API_KEY", "POKE_API_KEY"):
        assert service_environment[name] not in service.log


def test_stopping_leaves_no_process_and_no_connection(
    service_environment: Environment, inbox: Inbox, database_url: str
) -> None:
    marker = "stop-leaves-nothing"
    service = LocalService({**service_environment, "LANG": marker})
    service.start()
    call_orchestrate(service.url, {"task_description": "Split 184.50 between 5 people"}, headers(service_environment))
    inbox.wait_for(1, 30)
    assert len(living(marker)) >= 4  # master, worker, two slots
    assert service.stop() == 0
    assert eventually(lambda: not living(marker)), living(marker)
    assert connections_of(database_url) == 0


def test_ctrl_c_ends_everything_at_once_while_a_job_runs(
    service_environment: Environment, messages_api: MessagesApi
) -> None:
    marker = "ctrl-c-ends-all"
    service = LocalService({**service_environment, "LANG": marker})
    service.start()
    task = 'Split 184.50 between 5 people SCRIPT:[{"hang": 60}]'
    call_orchestrate(service.url, {"task_description": task}, headers(service_environment))
    assert messages_api.wait_for_requests(1, 20)
    os.kill(service.pid, signal.SIGINT)
    assert eventually(lambda: not living(marker), 10), living(marker)
    service.stop()


def test_a_killed_master_takes_worker_slots_and_agents_with_it(
    service_environment: Environment, messages_api: MessagesApi
) -> None:
    marker = "killed-master"
    service = LocalService({**service_environment, "LANG": marker, "POKESTRATOR_DRAIN_SECONDS": "1"})
    service.start()
    task = 'Split 184.50 between 5 people SCRIPT:[{"hang": 60}]'
    call_orchestrate(service.url, {"task_description": task}, headers(service_environment))
    assert messages_api.wait_for_requests(1, 20)
    os.kill(service.pid, signal.SIGKILL)
    assert eventually(lambda: not living(marker), 20), living(marker)
    service.stop()


def test_two_workers_share_the_work_and_one_that_dies_is_replaced(
    service_environment: Environment, inbox: Inbox
) -> None:
    with LocalService({**service_environment, "WEB_CONCURRENCY": "2", "POKESTRATOR_CONCURRENCY": "2"}) as service:
        assert eventually(lambda: len(children(service.pid)) == 2)
        first, second = children(service.pid)
        os.kill(first, signal.SIGKILL)
        assert eventually(lambda: len(children(service.pid)) == 2 and first not in children(service.pid), 15)
        assert second in children(service.pid)
        for number in range(3):
            task = {"task_description": f"Split {number}.50 between 5 people"}
            call_orchestrate(service.url, task, headers(service_environment))
        assert len(inbox.wait_for(3, 40)) == 3


def test_a_missing_poke_key_is_said_at_start_and_results_wait(
    service_environment: Environment, messages_api: MessagesApi
) -> None:
    del service_environment["POKE_API_KEY"]
    with LocalService(service_environment) as service:
        call_orchestrate(
            service.url, {"task_description": "Split 184.50 between 5 people"}, headers(service_environment)
        )
        assert service.wait_for_log('"finished"', 30)
        assert "POKE_API_KEY is not set" in service.log
        assert '"callback"' not in service.log


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"POKESTRATOR_AGENT_TIMEOUT": "abc"}, "POKESTRATOR_AGENT_TIMEOUT=abc: must be a whole number from 5 to 3600"),
        ({"WEB_CONCURRENCY": "abc"}, "cannot start: WEB_CONCURRENCY=abc: must be a whole number from 1 to 32"),
        ({"WEB_CONCURRENCY": "3"}, "WEB_CONCURRENCY=3: must not be above POKESTRATOR_CONCURRENCY (2)"),
        ({"HOST": "0.0.0.0", "POKESTRATOR_API_KEY": ""}, "Set POKESTRATOR_API_KEY"),
        ({"DATABASE_URL": "mysql://here"}, "DATABASE_URL=(secret): must be"),
        ({"DATABASE_URL": "", "POKESTRATOR_DATA_DIR": "/proc/nowhere"}, "POKESTRATOR_DATA_DIR=/proc/nowhere"),
    ],
)
def test_a_start_that_cannot_be_names_the_setting(
    service_environment: Environment, changed: Environment, said: str
) -> None:
    assert said in refused_start({**service_environment, **changed})


def test_a_blank_number_of_workers_counts_as_unset(service_environment: Environment) -> None:
    with LocalService({**service_environment, "WEB_CONCURRENCY": " "}) as service:
        assert eventually(lambda: healthz(service)["status"] == "ok")
        assert len(children(service.pid)) == 1


def test_serve_says_where_it_listens_and_how_to_connect_it(service_environment: Environment) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pokestrator", "serve"],
        env={**service_environment, "HOST": "[::1]", "PORT": "0", "MCP_PATH": "/poke/door"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        listens, tunnel, deployed = (process.stdout.readline().strip() for _ in range(3))
        url = listens.rpartition(" ")[2]
        assert re.fullmatch(r"http://\[::1\]:[1-9]\d*/poke/door", url)
        assert requests.post(url, timeout=5).status_code == 401
        assert tunnel.endswith(f" poke@latest tunnel {url} -n pokestrator")
        assert " mcp add https://YOUR-HOST/poke/door -n pokestrator -k " in deployed
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_an_unreachable_database_leaves_the_service_degraded(service_environment: Environment) -> None:
    nowhere = "postgresql://nobody@127.0.0.1:9/none"
    with LocalService({**service_environment, "DATABASE_URL": nowhere}) as service:
        assert service.wait_for_log("database init failed: ", 10)
        health = healthz(service)
        assert health["status"] == "degraded"
        assert "database" in health["why"]


def connections_of(database_url: str) -> int:
    with psycopg.connect(database_url) as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
