"""Cancelled runs: wherever a run is on its way, it ends at once, with all that it has started, and alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pokestrator.claude.calls import CANCELLED, Call
from pokestrator.claude.pool import Inline, Slots
from pokestrator.claude.slot_process import SlotProcess
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind, RunResult
from tests.integration.agent_runs import (
    agent_environment,
    agents,
    bash,
    escaping,
    ignore,
    running,
    scripted,
    start,
    unique_sleep,
    wait_until,
)

ENDED = RunResult(error=ErrorKind.AGENT_CRASHED, detail="cancelled")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


@pytest.fixture
def one_slot(api: MessagesApi) -> Iterator[Slots]:
    slots = Slots(1, agent_environment(api.url))
    slots.start()
    try:
        yield slots
    finally:
        slots.close()


def test_a_cancelled_run_and_all_it_has_started_are_gone_and_the_other_run_goes_on(
    slots: Slots, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    child, grandchild, escaped, other_sleep = (unique_sleep() for _ in range(4))
    gate = tmp_path / "gate"
    other, _ = start(
        threads, slots, scripted(escaping(other_sleep, gate), {"text": "Fine."}, run_id="other"), other_sleep
    )
    command = f"env -i setsid nohup {escaped} >/dev/null 2>&1 & bash -c '{grandchild}; true' & {child}"
    cancelled, _ = start(threads, slots, scripted(bash(command), {"text": "Done."}, run_id="this"), child)
    assert wait_until(lambda: running(grandchild) and running(escaped), 20)
    began = time.monotonic()
    slots.cancel("this")
    # What it has cost until then is known.
    assert replace(cancelled.result(20), usage=ENDED.usage) == ENDED
    assert time.monotonic() - began < 6
    assert [running(sleep) for sleep in (child, grandchild, escaped)] == [[], [], []]
    assert running(other_sleep), "the other run's process was killed too"
    gate.touch()
    assert other.result(20).text == "Fine."
    both = [threads.submit(slots.run, scripted({"text": "Next."}, run_id="this"), ignore) for _ in range(2)]
    assert [future.result(20).text for future in both] == ["Next.", "Next."]
    assert agents() == []


def test_a_run_that_waits_for_a_slot_is_cancelled_promptly(
    one_slot: Slots, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    sleep, gate = unique_sleep(), tmp_path / "gate"
    first, _ = start(threads, one_slot, scripted(escaping(sleep, gate), {"text": "First."}, run_id="first"), sleep)
    second = threads.submit(one_slot.run, scripted({"text": "Second."}, run_id="second"), ignore)
    third = threads.submit(one_slot.run, scripted({"text": "Third."}, run_id="third"), ignore)
    assert wait_until(lambda: one_slot.cancel("second") or second.done(), 5)
    assert second.result() == ENDED
    assert not first.done()
    gate.touch()
    assert first.result(20).text == "First."
    assert third.result(20).text == "Third."


def test_a_run_that_was_cancelled_on_the_way_to_its_slot_is_not_begun(api: MessagesApi) -> None:
    request, seen = scripted({"text": "Done."}), len(api.requests)
    slot = SlotProcess(agent_environment(api.url))
    try:
        assert slot.run(Call(request, time.monotonic() + 20, ignore, end_reason=CANCELLED)) == ENDED
        assert slot.run(Call(request, time.monotonic() + 20, ignore)).text == "Done."
    finally:
        slot.close()
    assert len(api.requests) == seen + 1


def test_a_run_that_is_cancelled_again_and_again_from_its_start_ends_at_once(
    one_slot: Slots, threads: ThreadPoolExecutor
) -> None:
    future = threads.submit(one_slot.run, scripted({"hang": 60}, run_id="this"), ignore)
    assert wait_until(lambda: one_slot.cancel("this") or future.done(), 10)
    assert future.result() == ENDED
    assert one_slot.run(scripted({"text": "Next."}, run_id="this"), ignore).text == "Next."


@pytest.mark.parametrize("run_id", ["", "earlier", "this"])
def test_cancelling_what_does_not_run_changes_nothing(
    slots: Slots, threads: ThreadPoolExecutor, tmp_path: Path, run_id: str
) -> None:
    """An empty id names no run, not even one without an id; an id that was cancelled too early may run later."""
    assert slots.run(scripted({"text": "Done."}, run_id="earlier"), ignore).text == "Done."
    slots.cancel(run_id)
    sleep, gate = unique_sleep(), tmp_path / "gate"
    request = scripted(escaping(sleep, gate), {"text": "Done."}, run_id="this" if run_id else "")
    future, _ = start(threads, slots, request, sleep)
    if run_id != "this":
        slots.cancel(run_id)
    gate.touch()
    assert future.result(20).text == "Done."


# Inline: the same worker in the caller's own process.


def test_inline_a_cancelled_run_ends_with_all_it_has_started(api: MessagesApi, threads: ThreadPoolExecutor) -> None:
    claude = Inline(agent_environment(api.url))
    child, escaped = unique_sleep(), unique_sleep()
    command = f"env -i setsid nohup {escaped} >/dev/null 2>&1 & {child}"
    future, _ = start(threads, claude, scripted(bash(command), {"text": "Done."}, run_id="this"), child)
    assert wait_until(lambda: running(escaped), 20)
    claude.cancel("other")
    claude.cancel("")
    assert running(child), "cancelled by another id"
    claude.cancel("this")
    result = future.result(20)
    assert (result.error, result.detail) == (ErrorKind.AGENT_CRASHED, "cancelled")
    assert [running(child), running(escaped), agents()] == [[], [], []]
    assert claude.run(scripted({"text": "Next."}, run_id="this"), ignore).text == "Next."


def test_inline_a_run_that_is_cancelled_before_its_agent_is_there_does_not_ask_the_api(
    api: MessagesApi, threads: ThreadPoolExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    claude = Inline(agent_environment(api.url))
    seen = len(api.requests)
    make_folder = tempfile.mkdtemp

    def cancelled_meanwhile(**named: Any) -> str:
        claude.cancel("this")
        return make_folder(**named)

    monkeypatch.setattr(tempfile, "mkdtemp", cancelled_meanwhile)  # the run's folder comes right before its agent
    result = threads.submit(claude.run, scripted({"hang": 60}, run_id="this"), ignore).result(20)
    assert (result.error, result.detail) == (ErrorKind.AGENT_CRASHED, "cancelled")
    assert len(api.requests) == seen
    assert agents() == []


def test_inline_a_run_that_waits_for_its_turn_is_cancelled_promptly_and_alone(
    api: MessagesApi, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    claude = Inline(agent_environment(api.url))
    sleep, gate = unique_sleep(), tmp_path / "gate"
    first, _ = start(threads, claude, scripted(escaping(sleep, gate), {"text": "First."}, run_id="first"), sleep)
    second = threads.submit(claude.run, scripted({"text": "Second."}, run_id="second"), ignore)
    assert wait_until(lambda: claude.cancel("second") or second.done(), 5)
    assert second.result() == ENDED
    gate.touch()
    assert first.result(20).text == "First."
