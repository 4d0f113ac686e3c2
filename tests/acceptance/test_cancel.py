"""Cancelling and asking through the one tool, by whichever instance the call comes in."""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from pokestrator.demo.local import call_orchestrate
from pokestrator.jobs import CANCELLED
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.pair import HANGS_ONCE, KEY, Pair, pair_on, posts
from tests.acceptance.processes import eventually, living
from tests.chaos.instance import Instance

GONE_SECONDS = 6.0
CALLER = {"X-Poke-User-Id": "7d9c6a2e-0d0f-4d26-9f3c-1c2b3a495867"}
STRANGER = {"X-Poke-User-Id": "11111111-2222-4333-8444-555555555555"}

_lengths = itertools.count(1_000_000 + 1_000 * os.getpid())  # of sleeps, so that each can be told from all others


@pytest.fixture(scope="module")
def pair(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Pair]:
    with pair_on(postgres, migrated) as opened:
        opened.start_missing()
        yield opened


def sleeps() -> tuple[str, dict[str, Any]]:
    """A step in which the agent's Bash sleeps, and a child of it in a session of its own; their name."""
    mark = f"sleep {next(_lengths)}"
    command = f"setsid {mark} & {mark}"
    return mark, {"tool": "Bash", "input": {"command": command, "description": "wait"}}


def ask(instance: Instance, action: str, request_id: uuid.UUID | None = None, **caller: str) -> dict[str, Any]:
    """What the tool answers a real MCP client. Raises ValueError with its text when it refuses."""
    metadata = {"action": action} | ({"request_id": str(request_id)} if request_id else {})
    arguments = {"task_description": "", "metadata": metadata}
    answer, _ = call_orchestrate(instance.url, arguments, {"Authorization": f"Bearer {KEY}", **(caller or CALLER)})
    return answer


def assert_told_once_that_it_was_cancelled(pair: Pair, request_id: uuid.UUID) -> None:
    assert pair.delivered(request_id) == CANCELLED
    job = pair.row(request_id)
    assert (job["state"], job["error_kind"], job["result"]) == ("cancelled", None, CANCELLED)


def test_a_task_is_cancelled_wherever_it_is(pair: Pair) -> None:
    mark, step = sleeps()
    with pair.held_back(pair.b):
        sleeping = pair.send(pair.a, step, {"text": "Slept well."}, **CALLER)
        hanging = pair.send(pair.a, HANGS_ONCE, {"text": "The payouts are in."}, **CALLER)
        queued = pair.send(pair.a, **CALLER)
        assert eventually(lambda: len(living(mark)) >= 3, 30), pair.story(sleeping)  # Bash and two sleeps
        pair.await_agent(hanging)

        assert ask(pair.a, "status", sleeping)["status"] == "running"
        assert mark in ask(pair.a, "status", sleeping)["message"]
        waiting = ask(pair.a, "status")  # the latest
        assert (waiting["status"], waiting["request_id"]) == ("queued", str(queued))
        with pytest.raises(ValueError, match="names no task of yours"):
            ask(pair.a, "cancel", queued, **STRANGER)
        assert ask(pair.a, "cancel", queued)["status"] == "cancelled"
        assert_told_once_that_it_was_cancelled(pair, queued)
        assert pair.row(queued)["runs"] == 0

    assert ask(pair.b, "cancel", sleeping)["status"] == "cancelling"  # by the instance that does not run it
    assert eventually(lambda: not living(mark), GONE_SECONDS), living(mark)
    assert_told_once_that_it_was_cancelled(pair, sleeping)
    ended = ask(pair.a, "status", sleeping)
    assert (ended["status"], ended["result"], ended["delivery"]) == ("cancelled", CANCELLED, "delivered")

    assert ask(pair.b, "status", hanging)["status"] == "running"  # nobody cancelled this one
    assert ask(pair.a, "cancel", hanging)["status"] == "cancelling"  # by the instance that runs it
    assert eventually(lambda: not pair.a.agents(), GONE_SECONDS)
    assert_told_once_that_it_was_cancelled(pair, hanging)
    assert ask(pair.b, "cancel", hanging)["status"] == "cancelled"  # once more changes nothing
    assert len(posts(pair.inbox, hanging)) == 1


def test_what_has_ended_is_not_cancelled(pair: Pair) -> None:
    done = pair.send(pair.a, {"text": "The payouts are in."}, **CALLER)
    assert pair.delivered(done) == "The payouts are in."
    answer = ask(pair.b, "cancel", done)
    assert (answer["status"], answer["result"]) == ("succeeded", "The payouts are in.")
    assert pair.delivered(done) == "The payouts are in."
