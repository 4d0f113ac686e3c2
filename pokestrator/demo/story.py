"""The story in one command: tasks go in over MCP, results come back as callbacks, and a subagent is built on the way.

Everything is real but Poke (a loopback inbox) and, without a key, Claude (a scripted Messages API). It lives in a
temporary folder and uses none of the owner's database or Poke settings.
"""

from __future__ import annotations

import secrets
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pokestrator.demo.inbox import Inbox
from pokestrator.demo.local import LocalService, StartFailed, call_orchestrate
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.environ import demo_environment
from pokestrator.errors import StoreUnavailable
from pokestrator.following import Timeline
from pokestrator.jobs import JobState, Outcome, Route
from pokestrator.store.embedded import EmbeddedPostgres
from pokestrator.store.history import History
from pokestrator.store.pool import Database
from pokestrator.store.subagents import Subagents

KNOWN_TASK = "Split 184.50 between 5 people with a 20% tip"
UNKNOWN_TASK = "Invent a toast for my grandmother's 80th birthday: she loves sailing and bad puns"
CALLBACK_SECONDS = 20.0
DELIVERED_SECONDS = 5.0  # from Poke's answer to its being written down
LONGEST_JOB_SECONDS = 600.0

Say = Callable[[str], None]


class DemoFailed(Exception):
    """The story did not go as it must; the text says where."""


@dataclass(frozen=True)
class Ended:
    """One task's way: its outcome, the route it took and the subagent that took it (or was built)."""

    outcome: Outcome
    route: Route | None
    subagent: str | None


class Stage:
    """The running parts of a demo, and one task's way through them."""

    def __init__(self, say: Say, service: LocalService, inbox: Inbox, database: Database, api_key: str) -> None:
        self._say = say
        self._service = service
        self._inbox = inbox
        self._api_key = api_key
        self._history = History(database)
        self.subagents = Subagents(database)
        self._caller = str(uuid.uuid4())

    def send(self, task: str) -> Ended:
        """Send one task over MCP as Poke would, and tell its story to the end."""
        self._say(f"\n→ {task}")
        token = secrets.token_urlsafe(16)
        headers = {
            "Authorization": f"Bearer {self._api_key}",
            "X-Poke-User-Id": self._caller,
            "X-Poke-Callback-Url": self._inbox.callback_url(token),
            "X-Poke-Callback-Token": token,
        }
        arrived = len(self._inbox.received)
        sent = time.time()
        ack, milliseconds = call_orchestrate(self._service.url, {"task_description": task}, headers)
        self._say(f"  ack in {milliseconds:.1f} ms: {ack['status']}, request {ack['request_id']}")
        job_id = uuid.UUID(ack["request_id"])
        timeline = Timeline(self._history, job_id, lambda kind, text: self._say(f"    {kind:<9} {text}"))
        deadline = time.monotonic() + LONGEST_JOB_SECONDS
        outcome = timeline.follow(lambda: time.monotonic() > deadline)
        if outcome is None:
            raise DemoFailed(f"job {job_id} has not ended within {LONGEST_JOB_SECONDS:.0f} s")
        received = self._inbox.wait_for(arrived + 1, CALLBACK_SECONDS)
        if len(received) <= arrived:
            raise DemoFailed(f"no callback arrived within {CALLBACK_SECONDS:.0f} s of the job's end")
        callback = received[arrived]
        self._say(f"← callback after {callback.at - sent:.1f} s: {callback.body['content']}")
        if not timeline.follow_to("delivered", DELIVERED_SECONDS):
            raise DemoFailed(f"the callback arrived, but was not recorded within {DELIVERED_SECONDS:.0f} s")
        return Ended(outcome, *self._history.road(job_id))


def run_demo(say: Say, task: str | None = None) -> None:
    """Run the story, or send one's own task. Raises DemoFailed; leaves no process and no file behind."""
    environment = demo_environment()
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pokestrator-demo-", ignore_cleanup_errors=True))
        )
        inbox = stack.enter_context(Inbox())
        if environment.keys() & {"ANTHROPIC_API_KEY", "CLAUDE_CODE_OAUTH_TOKEN"}:
            say("Claude: the real one, with your key.")
        else:
            api = stack.enter_context(MessagesApi())
            environment |= {"ANTHROPIC_BASE_URL": api.url, "ANTHROPIC_API_KEY": secrets.token_urlsafe(24)}
            say("Claude: SCRIPTED answers, because neither ANTHROPIC_API_KEY nor CLAUDE_CODE_OAUTH_TOKEN is set.")
        say("Poke:   a stand-in on this machine.")
        api_key = secrets.token_urlsafe(24)
        environment |= {
            "POKESTRATOR_DATA_DIR": str(folder),
            "POKESTRATOR_API_KEY": api_key,
            "POKE_WEBHOOK_URL": inbox.message_url,
            "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
            "POKE_API_KEY": secrets.token_urlsafe(24),
            "POKESTRATOR_DRAIN_SECONDS": "1",  # a job is under way at the end only when the demo was given up
        }
        stage = _set_up(stack, say, environment, folder, inbox, api_key)
        try:
            _own_task(stage, task) if task else _story(stage)
        finally:
            say("\nSubagents that exist now:")
            for subagent in stage.subagents.all():
                say(f"  {subagent.name} ({subagent.origin}): {subagent.definition.description}")


def _set_up(stack: ExitStack, say: Say, environment: dict[str, str], folder: Path, inbox: Inbox, api_key: str) -> Stage:
    try:
        postgres = EmbeddedPostgres(folder)
        stack.callback(postgres.leave)
        service = stack.enter_context(LocalService(environment))
    except (StoreUnavailable, StartFailed) as error:
        raise DemoFailed(f"the service did not start: {error}") from error
    say(f"Service: {service.url} under gunicorn, PostgreSQL in {folder}")
    database = Database(postgres.url, min_size=1, max_size=2)
    database.open()
    stack.callback(database.close)
    return Stage(say, service, inbox, database, api_key)


def _story(stage: Stage) -> None:
    known = stage.send(KNOWN_TASK)
    _expect(known, Route.TEMPLATE, "a task that a template fits")
    first = stage.send(UNKNOWN_TASK)
    _expect(first, Route.BUILD_NEW, "a task that nothing fits")
    again = stage.send(UNKNOWN_TASK)
    _expect(again, Route.MATCH, "the same task again")
    built = {s.name for s in stage.subagents.all() if s.origin == "built"}
    if again.subagent not in built:
        raise DemoFailed(f"the second time, the task went to {again.subagent} and not to what was built for it")


def _own_task(stage: Stage, task: str) -> None:
    ended = stage.send(task)
    _expect(ended, ended.route, "your task")
    if ended.route is Route.BUILD_NEW:
        _expect(stage.send(task), Route.MATCH, "your task again")


def _expect(ended: Ended, route: Route | None, what: str) -> None:
    if ended.outcome.state is not JobState.SUCCEEDED:
        raise DemoFailed(f"{what} ended as {ended.outcome.state}: {ended.outcome.error} {ended.outcome.detail}")
    if ended.route is not route:
        raise DemoFailed(f"{what} took the route {ended.route} in place of {route}")
