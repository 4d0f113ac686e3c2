"""Agent slots as processes: what dies with what, and what must live on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pokestrator.claude import processes
from pokestrator.claude.pool import Slots
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import ErrorKind
from tests.integration.agent_runs import (
    agent_environment,
    agents,
    bash,
    command_line,
    escaping,
    ignore,
    running,
    scripted,
    slot_of,
    start,
    tool_outputs,
    unique_sleep,
    wait_until,
)

SLEEP = shutil.which("sleep") or "/bin/sleep"


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as threads:
        yield threads


def test_nothing_that_an_agent_started_outlives_its_run(slots: Slots, tmp_path: Path) -> None:
    sleep, gate = unique_sleep(), tmp_path / "gate"
    seen: list[int] = []

    def look(_: object) -> None:  # while the command waits at the gate
        if not gate.exists():
            seen.extend(wait_until(lambda: running(sleep), 20))
            gate.touch()

    result = slots.run(scripted(escaping(sleep, gate), {"text": "Done."}), look)
    assert result.text == "Done."
    assert seen, "the process was never there"
    assert running(sleep) == []


def test_nothing_outlives_a_run_that_times_out(slots: Slots, threads: ThreadPoolExecutor) -> None:
    sleep = unique_sleep()
    began = time.monotonic()
    future, _ = start(threads, slots, scripted(escaping(sleep), {"hang": 60}, timeout_seconds=12), sleep)
    assert future.result(30).error == ErrorKind.TIMEOUT
    assert time.monotonic() - began < 18
    assert running(sleep) == []


def test_a_slot_that_is_killed_takes_no_other_run_with_it(
    slots: Slots, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    sleep, other_sleep, gate = unique_sleep(), unique_sleep(), tmp_path / "gate"
    held = scripted(escaping(other_sleep, gate), {"text": "Fine."})
    other, _ = start(threads, slots, held, other_sleep)
    killed, agent = start(threads, slots, scripted(escaping(sleep), {"hang": 60}), sleep)
    os.kill(slot_of(agent), signal.SIGKILL)
    assert killed.result(20).error == ErrorKind.AGENT_CRASHED
    assert running(sleep) == []
    assert running(other_sleep), "the other run's process was killed too"
    gate.touch()
    assert other.result(20).text == "Fine."
    both = [threads.submit(slots.run, scripted({"text": "Next."}), ignore) for _ in range(2)]
    assert [future.result(20).text for future in both] == ["Next.", "Next."]
    assert agents() == []


def test_an_idle_slot_that_was_killed_is_replaced(
    api: MessagesApi, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    slots = Slots(1, agent_environment(api.url))
    slots.start()
    try:
        sleep, gate = unique_sleep(), tmp_path / "gate"
        future, agent = start(threads, slots, scripted(escaping(sleep, gate), {"text": "Done."}), sleep)
        slot = slot_of(agent)
        gate.touch()
        assert future.result(20).text == "Done."
        os.kill(slot, signal.SIGKILL)
        assert wait_until(lambda: (p := processes.look_up(slot)) is None or not p.alive, 10)
        assert slots.run(scripted({"text": "Next."}), ignore).text == "Next."
    finally:
        slots.close()


def test_a_frozen_slot_is_a_timeout_in_time(slots: Slots, threads: ThreadPoolExecutor) -> None:
    sleep = unique_sleep()
    began = time.monotonic()
    future, agent = start(threads, slots, scripted(escaping(sleep), {"hang": 60}, timeout_seconds=12), sleep)
    os.kill(slot_of(agent), signal.SIGSTOP)
    assert future.result(30).error == ErrorKind.TIMEOUT
    assert time.monotonic() - began < 18
    assert running(sleep) == []
    assert agents() == []
    assert slots.run(scripted({"text": "Next."}), ignore).text == "Next."


def test_signals_for_the_service_do_not_end_a_run(slots: Slots, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    sleep, gate = unique_sleep(), tmp_path / "gate"
    future, agent = start(threads, slots, scripted(escaping(sleep, gate), {"text": "Done."}), sleep)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(slot_of(agent), number)
    gate.touch()
    assert os.getsid(agent) != os.getsid(0), "Ctrl-C in the service's terminal would reach the CLI"
    assert future.result(20).text == "Done."


def test_agents_inherit_no_ignored_signals(slots: Slots, api: MessagesApi) -> None:
    look = (
        "import signal as s; meant = (s.SIGINT, s.SIGTERM, s.SIGHUP, s.SIGCHLD); "
        "print([n for n in meant if s.getsignal(n) is s.SIG_IGN or n in s.pthread_sigmask(s.SIG_BLOCK, [])], 'end')"
    )
    request = scripted(bash(f'/usr/bin/python3 -c "{look}"'), {"text": "Done."})
    slots.run(request, ignore)
    assert tool_outputs(api, request) == ["[] end"]


def test_a_sweep_spares_what_is_not_of_the_run(slots: Slots, threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    sleep, before, meanwhile, database = (unique_sleep() for _ in range(4))
    shutil.copy(SLEEP, tmp_path / "postgres")
    started_before = subprocess.Popen(before.split(), start_new_session=True)
    # The kernel counts starts in ticks: what began in the run's own tick cannot be told from what the run began.
    born = processes.look_up(started_before.pid)
    assert born is not None
    assert wait_until(lambda: processes.now() > born.started + 0.05, 2)
    future, agent = start(threads, slots, scripted(escaping(sleep), {"hang": 60}), sleep)
    started_meanwhile = subprocess.Popen(meanwhile.split())
    # A server that makes itself a daemon during the run, as the embedded PostgreSQL does when it is started again.
    subprocess.run(f"setsid {tmp_path}/postgres {database.split()[1]} >/dev/null 2>&1 &", shell=True, check=True)
    daemon = wait_until(lambda: running(f"{tmp_path}/postgres {database.split()[1]}"), 10)
    assert wait_until(lambda: Path(f"/proc/{daemon[0]}/exe").readlink().name == "postgres", 10)
    try:
        os.kill(slot_of(agent), signal.SIGKILL)
        assert future.result(20).error == ErrorKind.AGENT_CRASHED
        assert running(sleep) == []
        assert started_before.poll() is None
        assert started_meanwhile.poll() is None
        assert running(f"{tmp_path}/postgres {database.split()[1]}") == daemon
    finally:
        for pid in (started_before.pid, started_meanwhile.pid, *daemon):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_caller_waits_for_a_free_slot_no_longer_than_its_timeout(
    api: MessagesApi, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    slots = Slots(1, agent_environment(api.url))
    slots.start()
    try:
        sleep, gate = unique_sleep(), tmp_path / "gate"
        held = scripted(escaping(sleep, gate), {"text": "First."})
        first, _ = start(threads, slots, held, sleep)
        second = threads.submit(slots.run, scripted({"text": "Second."}, timeout_seconds=0.5), ignore)
        third = threads.submit(slots.run, scripted({"text": "Third."}), ignore)
        assert second.result(10).error == ErrorKind.TIMEOUT
        assert not first.done()
        gate.touch()
        assert first.result(20).text == "First."
        assert third.result(20).text == "Third."
    finally:
        slots.close()


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
def test_close_ends_a_run_in_progress(api: MessagesApi, threads: ThreadPoolExecutor, frozen: bool) -> None:
    slots = Slots(2, agent_environment(api.url))
    slots.start()
    sleep = unique_sleep()
    future, agent = start(threads, slots, scripted(escaping(sleep), {"hang": 60}), sleep)
    slot = slot_of(agent)
    if frozen:
        os.kill(slot, signal.SIGSTOP)
    began = time.monotonic()
    slots.close()
    assert time.monotonic() - began < 6
    result = future.result(10)
    assert (result.error, result.detail) == (ErrorKind.AGENT_CRASHED, "the service is stopping")
    assert running(sleep) == []
    assert agents() == []
    assert processes.below([slot], processes.all_processes()) == []
    assert slots.run(scripted({"text": "Late."}), ignore).detail == "the service is stopping"


# A service of its own, to be killed or, at a line on its standard input, to end.
SERVICE = """
import json, sys, threading
from pokestrator.claude.pool import Slots
from pokestrator.runs import RunRequest

if __name__ == "__main__":
    environment, request = json.loads(sys.argv[1])
    slots = Slots(2, environment)
    slots.start()
    tell = lambda event: print(event.kind, flush=True)
    threading.Thread(target=lambda: slots.run(RunRequest(**request), tell)).start()
    sys.stdin.readline()
    slots.close()
    print("claude_agent_sdk" in sys.modules, flush=True)
"""


@pytest.fixture
def service(api: MessagesApi, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    sleep = unique_sleep()
    request = scripted(escaping(sleep), {"hang": 60}, timeout_seconds=30)
    fields = {name: getattr(request, name) for name in ("prompt", "system_prompt", "model", "timeout_seconds", "tools")}
    script = tmp_path / "service.py"
    script.write_text(SERVICE)
    command = [sys.executable, str(script), json.dumps([agent_environment(api.url), fields])]
    root = Path(processes.__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    ) as service:
        try:
            assert wait_until(lambda: running(sleep), 20)
            yield service, sleep
        finally:
            service.kill()


def test_nothing_outlives_a_service_that_is_killed(service: tuple[subprocess.Popen[str], str]) -> None:
    process, sleep = service
    (agent,) = agents(process.pid)
    everything = processes.descendants(process.pid)
    folder = Path(f"/proc/{agent}/cwd").readlink().parent
    assert folder.name.startswith("pokestrator-run-")
    assert {agent, slot_of(agent)} < {each.pid for each in everything}
    process.kill()
    gone = wait_until(lambda: not any(_is_there(each) for each in everything), 10)
    assert gone, [each for each in everything if _is_there(each)]
    assert running(sleep) == []
    assert not folder.exists()


def test_a_service_can_end_while_a_slot_is_busy(service: tuple[subprocess.Popen[str], str]) -> None:
    process, sleep = service
    everything = {each: command_line(each.pid) for each in processes.descendants(process.pid)}
    began = time.monotonic()
    output, _ = process.communicate("stop\n", timeout=20)
    assert time.monotonic() - began < 10
    assert process.returncode == 0
    assert output.split() == ["tool", "False"], "the service has loaded the SDK"
    # multiprocessing's own helper leaves only after the process that it serves has left.
    left = {each: command for each, command in everything.items() if _is_there(each)}
    assert [command for command in left.values() if "resource_tracker" not in command] == []
    assert wait_until(lambda: not any(_is_there(each) for each in left), 10)
    assert running(sleep) == []


def _is_there(process: processes.Process) -> bool:
    current = processes.look_up(process.pid)
    return current is not None and current.alive and current.identity == process.identity
