"""What a killed or frozen process leaves undone is done by another one: once, in time, and the person is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial

import pytest

from pokestrator.claude import processes
from pokestrator.jobs import RAN_AGAIN
from pokestrator.store.embedded import EmbeddedPostgres
from tests.acceptance.pair import HANGS_ONCE, Pair, pair_on
from tests.acceptance.processes import eventually
from tests.chaos.instance import Instance
from tests.integration.flow import row

NOTICED_HERE_SECONDS = 6.0  # an owner's death, on its own machine
TAKEN_SECONDS = 30.0  # an orphan, wherever its owner was
FROZEN_SECONDS = 27.0  # longer than a lease


@pytest.fixture(scope="module")
def pair_of_module(postgres: EmbeddedPostgres, migrated: str) -> Iterator[Pair]:
    with pair_on(postgres, migrated) as opened:
        yield opened


@pytest.fixture
def pair(pair_of_module: Pair) -> Pair:
    pair_of_module.start_missing()
    return pair_of_module


def victims(instance: Instance, what: str) -> list[int]:
    """The processes of an instance with one running job that must die for `what` to be dead."""
    worker, [agent, *_] = instance.worker(), instance.agents()
    assert worker is not None
    slot = processes.look_up(agent)
    assert slot is not None
    return {
        "agent": [agent],
        "slot": [slot.parent],
        "worker": [worker],
        "instance": [instance.service.pid, worker],
    }[what]


def assert_ran_twice_and_said_so(pair: Pair, request_id: uuid.UUID, interruptions: int) -> None:
    assert pair.delivered(request_id) == f"The payouts are in.\n\n{RAN_AGAIN}"
    job = pair.row(request_id)
    found = job["state"], job["claim_seq"], job["runs"], job["interruptions"]
    assert found == ("succeeded", 2, 2, interruptions), pair.story(request_id)


@pytest.mark.parametrize("what", ["agent", "slot", "worker", "instance"])
def test_a_job_of_a_killed_process_runs_again_within_seconds_and_its_result_says_so(pair: Pair, what: str) -> None:
    [sent] = pair.send_to_run(pair.a, [HANGS_ONCE, {"text": "The payouts are in."}])
    dying = victims(pair.a, what)
    below = processes.below(dying, processes.all_processes())
    killed = time.time()
    for pid in dying:
        os.kill(pid, signal.SIGKILL)
    again = pair.ran_again(sent, 20)
    assert again - killed < NOTICED_HERE_SECONDS, pair.story(sent)
    assert_ran_twice_and_said_so(pair, sent, interruptions=1)
    assert eventually(lambda: not any(map(is_alive, below))), list(filter(is_alive, below))


def logged(instance: Instance, event: str, request_id: uuid.UUID) -> bool:
    lines = [json.loads(line) for line in instance.service.log.splitlines() if line.startswith("{")]
    return any(line["event"] == event and line.get("request_id") == str(request_id) for line in lines)


def is_alive(process: processes.Process) -> bool:
    now = processes.look_up(process.pid)
    return now is not None and now.identity == process.identity and now.alive


def test_an_instance_that_is_alone_takes_up_what_its_killed_worker_left(pair_of_module: Pair) -> None:
    pair = pair_of_module
    alone = pair.run_alone()
    sent = pair.send(alone, HANGS_ONCE, {"text": "The payouts are in."})
    pair.await_agent(sent)
    worker = alone.worker()
    assert worker is not None
    os.kill(worker, signal.SIGKILL)
    assert alone.await_answers(worker)
    answers = time.time()
    assert pair.ran_again(sent, 20) - answers < NOTICED_HERE_SECONDS, pair.story(sent)
    assert_ran_twice_and_said_so(pair, sent, interruptions=1)


def test_a_frozen_workers_jobs_are_taken_and_when_it_goes_on_it_writes_nothing_late(pair: Pair) -> None:
    ends_meanwhile, still_hangs = pair.send_to_run(
        pair.a,
        [{"delay": 8, "text": "The payouts are in."}],  # by then the worker is frozen, but not the agent
        [HANGS_ONCE, {"text": "The payouts are in."}],
    )
    worker = pair.a.worker()
    assert worker is not None
    os.kill(worker, signal.SIGSTOP)
    frozen = time.time()
    try:
        for sent in (ends_meanwhile, still_hangs):
            assert pair.ran_again(sent, 45) - frozen < TAKEN_SECONDS, pair.story(sent)
        threading.Event().wait(max(0.0, frozen + FROZEN_SECONDS - time.time()))
        assert pair.a.agents()  # an agent's slot is not frozen
    finally:
        os.kill(worker, signal.SIGCONT)
    for sent in (ends_meanwhile, still_hangs):
        assert eventually(partial(logged, pair.a, "lease_lost", sent), 10), pair.a.log
    assert eventually(lambda: not pair.a.agents(), 10), pair.a.log
    for sent in (ends_meanwhile, still_hangs):
        assert_ran_twice_and_said_so(pair, sent, interruptions=1)
    # Four at once fill both instances: it has claimed some of them.
    after = [pair.send(pair.a, {"delay": 3, "text": "The payouts are in."}) for _ in range(4)]
    assert [pair.delivered(sent) for sent in after] == ["The payouts are in."] * 4
    assert f":{worker}:" in "".join(each["text"] for sent in after for each in pair.events(sent, "claimed"))
    for sent in (ends_meanwhile, still_hangs):
        assert_ran_twice_and_said_so(pair, sent, interruptions=1)


def test_ending_all_database_sessions_loses_and_doubles_nothing(pair: Pair) -> None:
    running = [pair.send(each, {"delay": 4, "text": "The payouts are in."}) for each in (pair.a, pair.b) * 2]
    waiting = [pair.send(pair.b) for _ in range(2)]
    for sent in running:
        pair.await_agent(sent)
    ended = row(
        pair.database_url,
        "SELECT count(pg_terminate_backend(pid)) AS sessions FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    assert ended["sessions"] >= 6  # of each instance: its pool's, and one each to claim, to renew and to listen
    after = [pair.send(each) for each in (pair.a, pair.b)]
    for sent in [*running, *waiting, *after]:
        assert RAN_AGAIN not in pair.delivered(sent)
        assert (pair.row(sent)["runs"], pair.row(sent)["interruptions"]) == (1, 0), pair.story(sent)
