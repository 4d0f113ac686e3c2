"""Builds everything that a run needs, on loopback and in one temporary folder, and ends all of it."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pokestrator.claude import processes
from pokestrator.demo.inbox import Inbox
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.environ import minimal_environment
from tests.acceptance.processes import children, eventually
from tests.chaos.instance import Instance, Reaper, command
from tests.chaos.ledgers import Ledgers
from tests.chaos.postgres import Postgres
from tests.chaos.proxy import Proxy
from tests.no_limits import NO_LIMITS

KEY = "the-key-of-this-chaos"
INSTANCES = ("A", "B")
LEAVE_SECONDS = 3.0  # that the last agents get once their service has gone


@dataclass
class Stand:
    postgres: Postgres
    instances: dict[str, Instance]
    database_lines: dict[str, Proxy]  # one for each instance
    inbox: Inbox
    inbox_line: Proxy
    api: MessagesApi
    api_line: Proxy
    ledgers: Ledgers
    temporary: Path  # the services' folder for temporary files

    def stop_instances(self) -> tuple[list[str], int]:
        """SIGTERM to both; what is left then: (processes, folders of runs)."""
        for each in self.instances.values():
            each.stop()
        eventually(lambda: not self._strays(), LEAVE_SECONDS)
        return self._strays(), len(list(self.temporary.glob("pokestrator-run-*")))

    def _strays(self) -> list[str]:
        """Processes below us that are not PostgreSQL's."""
        own = {self.postgres.pid, *children(self.postgres.pid)}
        return [f"pid {p.pid}: {command(p.pid)}" for p in processes.descendants() if p.pid not in own]

    def urls(self) -> Mapping[str, str]:
        """The MCP address of each instance."""
        return {name: instance.url for name, instance in self.instances.items()}

    def callback_url(self, token: str) -> str:
        """A new conversation, reached through the inbox's line."""
        return _through(self.inbox_line, self.inbox.callback_url(token))

    def logs(self) -> str:
        return "\n".join(f"===== instance {name} =====\n{each.log}" for name, each in self.instances.items())


@contextmanager
def standing() -> Iterator[Stand]:
    """The whole thing, running. In the end no process and no folder is left."""
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="pokestrator-chaos-", ignore_cleanup_errors=True))
        )
        temporary = folder / "tmp"
        temporary.mkdir(mode=0o1777)
        instances: dict[str, Instance] = {}
        reaper = Reaper(lambda: {pid for each in instances.values() for pid in each.masters()})
        reaper.start()
        stack.callback(reaper.stop)
        stack.callback(processes.kill_descendants)  # last: whatever has survived
        postgres = Postgres(folder / "database")
        stack.callback(postgres.leave)
        stack.callback(postgres.signal_all, signal.SIGCONT)  # an interrupted run may have left it frozen
        inbox = stack.enter_context(Inbox())
        api = stack.enter_context(MessagesApi())
        inbox_line = stack.enter_context(Proxy(_address(inbox.url)))
        api_line = stack.enter_context(Proxy(_address(api.url)))
        lines = {name: stack.enter_context(Proxy(postgres.socket)) for name in INSTANCES}
        for name in INSTANCES:
            environment = {
                **minimal_environment(),
                **NO_LIMITS,
                "DATABASE_URL": postgres.url_through(lines[name].port, f"instance_{name.lower()}"),
                "TMPDIR": str(temporary),  # what the killed leave lying about goes with it
                "POKESTRATOR_API_KEY": KEY,
                "POKESTRATOR_DATA_DIR": str(folder / "data"),
                "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
                "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{api_line.port}",
                "POKE_API_KEY": "pk-for-the-inbox",
                "POKE_WEBHOOK_URL": _through(inbox_line, inbox.message_url),
                "POKESTRATOR_CALLBACK_HOSTS": "127.0.0.1",
                "POKESTRATOR_CONCURRENCY": "2",
                "POKESTRATOR_DAILY_BUDGET_USD": "100000",  # what dead runs had reserved counts as spent
                "POKESTRATOR_CALLER_DAILY_BUDGET_USD": "100000",
                "POKESTRATOR_AGENT_TIMEOUT": "30",
                "POKESTRATOR_DRAIN_SECONDS": "3",
            }
            instances[name] = Instance(name, environment)
            stack.callback(instances[name].stop)
            instances[name].start()
        yield Stand(postgres, instances, lines, inbox, inbox_line, api, api_line, Ledgers(), temporary)


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 0


def _through(line: Proxy, url: str) -> str:
    return urlsplit(url)._replace(netloc=f"127.0.0.1:{line.port}").geturl()
