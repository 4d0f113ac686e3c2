"""Providers' credentials and callback tokens: who gets to see them, and where they must never be.

The real service with its embedded database, the real Claude CLI with Bash; Claude's API is scripted. A script's
canaries are spelled in JSON's \\u escapes: it travels as a task's metadata, and must not itself be the leak.
"""

from __future__ import annotations

import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pokestrator.demo.inbox import Inbox, Received
from pokestrator.demo.local import LocalService, call_orchestrate
from pokestrator.demo.messages_api import MessagesApi, RecordedRequest
from pokestrator.environ import minimal_environment
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.secrets import KEY_FILE
from tests.acceptance.test_cli import pokestrator
from tests.integration.flow import bash, rows
from tests.security.attacks import attack

NEEDED = "rk_canary_needed_4be1"
NOT_NAMED = "tok_canary_not_named_77aa"
TOKEN = "callback-canary-token-9c0d"
CANARIES = (NEEDED, NOT_NAMED, TOKEN)
SECONDS = 60.0  # ample

NEEDS_STRIPE = "current balance in stripe, available and pending"  # as in stripe_analyst's examples
NEEDS_NOTHING = "Split 184.50 between 5 people with a tip"

# Its own environment, and what its ancestors, the slot among them, were started with.
LOOK_AROUND = (
    "env; p=$$; while [ ${p:-0} -gt 1 ]; do tr '\\0' '\\n' </proc/$p/environ; "
    "p=$(awk '/^PPid/ {print $2}' /proc/$p/status); done 2>/dev/null; echo looked around"
)


@dataclass(frozen=True)
class Run:
    """What one task has come to: the text that was sent, and the questions that Claude's API got."""

    request_id: str
    text: str
    questions: list[RecordedRequest]

    @property
    def printed(self) -> str:
        """What its tools printed, as the model was told."""
        blocks = [block for m in self.questions[-1].body["messages"] for block in m["content"] if m["role"] == "user"]
        return json.dumps([block for block in blocks if isinstance(block, dict) and block["type"] == "tool_result"])


@dataclass(frozen=True)
class Story:
    """A task without its credential, the same with it, and another in the same slot; and all that was left behind."""

    missing: Run
    named: Run
    next: Run
    database: str  # every row of every table
    log: str
    events: Mapping[str, str]  # by request
    errors: Mapping[str, str]
    received: list[Received]
    key: str


@pytest.fixture(scope="module")
def story() -> Iterator[Story]:
    with (
        tempfile.TemporaryDirectory(prefix="pokestrator-run-", ignore_cleanup_errors=True) as folder,
        MessagesApi() as api,
        Inbox() as inbox,
    ):
        environment = {
            **minimal_environment(),
            "POKESTRATOR_DATA_DIR": folder,
            "POKESTRATOR_API_KEY": "the-key-of-this-test",
            "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
            "POKESTRATOR_CONCURRENCY": "1",
            "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
            "ANTHROPIC_BASE_URL": api.url,
            "POKE_API_KEY": "pk-for-the-inbox",
            "POKE_WEBHOOK_URL": inbox.message_url,
            "LOG_LEVEL": "DEBUG",
        }
        with LocalService(environment) as service:
            postgres = EmbeddedPostgres(Path(folder))
            try:
                yield tell(service, environment, api, inbox, postgres.url, Path(folder))
            finally:
                postgres.leave()


def tell(
    service: LocalService, environment: dict[str, str], api: MessagesApi, inbox: Inbox, url: str, folder: Path
) -> Story:
    def run(task: str, *steps: Mapping[str, Any]) -> Run:
        asked, received = len(api.requests), len(inbox.received)
        headers = {
            "Authorization": "Bearer the-key-of-this-test",
            "X-Poke-Callback-Url": inbox.callback_url(TOKEN),
            "X-Poke-Callback-Token": TOKEN,
        }
        arguments = {"task_description": task, "metadata": f"{uuid.uuid4()} SCRIPT: {script(*steps)}"}
        ack, _ = call_orchestrate(service.url, arguments, headers)
        text = inbox.wait_for(received + 1, SECONDS)[received].body["content"]
        return Run(ack["request_id"], text, api.requests[asked:])

    says = {"text": f"The key is {NEEDED}."}
    missing = run(NEEDS_STRIPE, says)
    for name, value in (("STRIPE_API_KEY", NEEDED), ("SHOP_TOKEN", NOT_NAMED)):
        done = pokestrator("credentials", "set", name, environment=environment, stdin=f"{value}\n")
        assert done.returncode == 0, done.stderr
    named = run(NEEDS_STRIPE, bash("env"), bash(f"echo {NEEDED} >/dev/null; echo still here"), says)
    following = run(NEEDS_NOTHING, bash(LOOK_AROUND), {"text": "Looked around."})
    assert service.wait_for_log(f'"request_id": "{following.request_id}", "channel": "callback"', SECONDS), service.log
    errors = rows(url, "SELECT id, concat_ws(' ', state, error_kind, error_detail) AS error FROM jobs")
    events = rows(url, "SELECT job_id, string_agg(kind || ' ' || text, E'\\n') AS told FROM job_events GROUP BY job_id")
    return Story(
        missing,
        named,
        following,
        everything_in(url),
        service.log,
        {str(row["job_id"]): row["told"] for row in events},
        {str(row["id"]): row["error"] for row in errors},
        inbox.received,
        (folder / KEY_FILE).read_text().strip(),
    )


def script(*steps: Mapping[str, Any]) -> str:
    text = json.dumps(steps)
    for canary in CANARIES:
        text = text.replace(canary, "".join(f"\\u{ord(character):04x}" for character in canary))
    return text


def everything_in(url: str) -> str:
    """Every row of every table, as text."""
    with psycopg.connect(url) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        queries = [f'SELECT to_json(t)::text FROM "{table}" t' for (table,) in tables]
        return "\n".join(row for query in queries for (row,) in connection.execute(query.encode()).fetchall())


# what a run sees ---------------------------------------------------------------------------------------------------


@attack("a task whose subagent needs a credential that is not there", "`needs_credentials`: no run, and what to add")
def test_a_missing_credential_ends_the_job_and_the_person_is_told_what_to_add(story: Story) -> None:
    assert story.missing.questions == []
    assert "without STRIPE_API_KEY" in story.missing.text
    assert "`python -m pokestrator credentials set STRIPE_API_KEY`" in story.missing.text
    error = story.errors[story.missing.request_id]
    assert error == "failed needs_credentials STRIPE_API_KEY is not stored"


def test_once_it_is_added_the_next_attempt_has_it(story: Story) -> None:
    assert f"STRIPE_API_KEY={NEEDED}" in story.named.printed
    assert "still here" in story.named.printed
    assert story.errors[story.named.request_id] == "succeeded"


@attack("an agent prints its environment", "credentials that its version does not name are not in it")
def test_a_run_sees_only_what_its_version_names(story: Story) -> None:
    assert NOT_NAMED not in story.named.printed
    assert "SHOP_TOKEN" not in story.named.printed
    assert story.key not in story.named.printed
    assert TOKEN not in story.named.printed


@attack("the next run of the slot looks for what the last one had", "it is not in its environment nor in its slot's")
def test_the_next_run_of_the_same_slot_sees_nothing_of_it(story: Story) -> None:
    assert "looked around" in story.next.printed
    for secret in (*CANARIES, "STRIPE_API_KEY", "SHOP_TOKEN"):
        assert secret not in story.next.printed


# where they must never be ------------------------------------------------------------------------------------------


def test_no_credential_is_in_a_prompt(story: Story) -> None:
    first = story.named.questions[0]
    assert "STRIPE_API_KEY" in json.dumps(first.body["system"]), "the question is the one we mean"
    for canary in CANARIES:
        assert canary not in json.dumps(first.body)


@attack("an agent says its credential in its answer and in a command", "it is taken out of result, callback and events")
def test_what_an_agent_says_of_its_credential_is_taken_out(story: Story) -> None:
    assert "The key is " in story.named.text
    assert NEEDED not in story.named.text
    told = story.events[story.named.request_id]
    assert "tool Bash: echo " in told
    assert NEEDED not in told


@attack("reading the whole database", "no credential and no callback token is in it in the clear")
def test_the_database_holds_no_credential_and_no_token_in_the_clear(story: Story) -> None:
    assert "SHOP_TOKEN" in story.database
    assert story.database.count("fernet:") >= 5  # two credentials, three tokens
    assert story.key not in story.database
    for canary in CANARIES:
        assert canary not in story.database


def test_the_log_holds_none_of_them_and_the_token_reached_its_receiver_alone(story: Story) -> None:
    assert "needs_credentials" in story.log
    for secret in (*CANARIES, story.key):
        assert secret not in story.log
    assert {received.headers["authorization"] for received in story.received} == {f"Bearer {TOKEN}"}


# the command line and the names ------------------------------------------------------------------------------------


@attack("a credential's value as an argument", "refused, not stored and not repeated")
@pytest.mark.parametrize(
    "arguments",
    [
        ["STRIPE_API_KEY", NEEDED],
        ["STRIPE_API_KEY", "--value", NEEDED],
        [f"--value={NEEDED}", "STRIPE_API_KEY"],
        [f"STRIPE_API_KEY={NEEDED}"],
        [NEEDED],
    ],
    ids=["second", "option", "option first", "assignment", "alone"],
)
def test_a_value_as_an_argument_is_refused_and_not_repeated(arguments: list[str]) -> None:
    # No database is reached: there is none at this address.
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}
    done = pokestrator("credentials", "set", *arguments, environment=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert NEEDED not in done.stderr
    assert "never an argument" in done.stderr or "a credential's name is" in done.stderr


@attack("a credential that is named like a setting or a variable of processes", "refused, by command and in templates")
def test_a_name_that_processes_obey_is_refused_everywhere(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none"}
    for name in ("LD_PRELOAD", "ANTHROPIC_API_KEY"):
        done = pokestrator("credentials", "set", name, environment=environment, stdin="/tmp/evil.so\n")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{name} means something" in done.stderr
    template = {
        "name": "sheep_counter",
        "description": "Counts sheep in photos of pastures.",
        "system_prompt": "You count the sheep that you are shown. Answer with one number.",
        "credentials": ["STRIPE_API_KEY", "LD_PRELOAD"],
    }
    (tmp_path / "sheep_counter.json").write_text(json.dumps(template))
    checked = pokestrator("templates", "check", str(tmp_path), environment=environment)
    assert checked.returncode == 1
    assert "credentials.1: Value error, LD_PRELOAD means something" in checked.stderr
