"""What the service adds to a run: from the ack to the CLI's first API request, and from the answer to the callback.

    .venv/bin/python -m tests.bench.run

The floor of the first is a bare `claude_agent_sdk.query()` with the same options, in a process that has the SDK
imported; the two take turns.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
import uuid
from contextlib import aclosing

import claude_agent_sdk
import requests

from pokestrator.demo.messages_api import MessagesApi
from pokestrator.store.history import History
from pokestrator.store.pool import Database
from tests.bench.stand import Stand, orchestrate, pause, running_service

ROUNDS = 20
TASK = "Split 184.50 between 5 people with a 20% tip"


def bare_query(api: MessagesApi) -> float:
    """Milliseconds from a bare query() to its first API request."""

    async def ask() -> None:
        options = claude_agent_sdk.ClaudeAgentOptions(
            model="sonnet",
            system_prompt="You answer.",
            tools=["Bash"],
            allowed_tools=["Bash"],
            permission_mode="dontAsk",
            setting_sources=[],
            strict_mcp_config=True,
            skills=[],
            verbatim_prompts=True,
            cwd=tempfile.gettempdir(),
            env={
                "ANTHROPIC_API_KEY": "sk-for-the-scripted-api",
                "ANTHROPIC_BASE_URL": api.url,
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
                "DISABLE_TELEMETRY": "1",
                "DISABLE_ERROR_REPORTING": "1",
                "DISABLE_AUTOUPDATER": "1",
                "CLAUDE_CONFIG_DIR": tempfile.mkdtemp(),
            },
            extra_args={"no-session-persistence": None},
        )
        async with aclosing(claude_agent_sdk.query(prompt=TASK, options=options)) as messages:
            async for _ in messages:
                pass

    before = len(api.requests)
    started = time.time()
    asyncio.run(ask())
    return 1000 * (api.requests[before].at - started)


def through_service(stand: Stand, session: requests.Session, history: History) -> tuple[float, float, float]:
    """Milliseconds: ack to first API request, API request to callback, the job's stored end to callback."""
    asked, received = len(stand.messages_api.requests), len(stand.inbox.received)
    request_id = orchestrate(session, stand.service.url, TASK)
    acknowledged = time.time()
    callback = stand.inbox.wait_for(received + 1, 60)[received]
    first_request = stand.messages_api.requests[asked].at
    ended = next(e.at for e in history.timeline(uuid.UUID(request_id)) if e.kind == "finished").timestamp()
    return 1000 * (first_request - acknowledged), 1000 * (callback.at - first_request), 1000 * (callback.at - ended)


def main() -> None:
    with running_service(POKESTRATOR_CONCURRENCY="1", LOG_LEVEL="WARNING") as stand, requests.Session() as session:
        database = Database(stand.database_url)
        database.open()
        history = History(database)
        through_service(stand, session, history)
        bare_query(stand.messages_api)
        bare, ours = [], []
        for _ in range(ROUNDS):
            bare.append(bare_query(stand.messages_api))
            pause(0.2)
            ours.append(through_service(stand, session, history))
            pause(0.2)
        database.close()
    floor = statistics.median(bare)
    to_request, to_callback, from_end = (statistics.median(column) for column in zip(*ours, strict=True))
    print(f"medians of {ROUNDS} rounds, ms")
    print(f"bare query() to its first API request       {floor:7.0f}")
    print(f"ack to the CLI's first API request          {to_request:7.0f}   {to_request - floor:+.0f} beyond it")
    print(f"first API request to the callback's arrival {to_callback:7.0f}")
    print(f"the job's stored end to the callback        {from_end:7.1f}")


if __name__ == "__main__":
    main()
