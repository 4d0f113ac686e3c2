"""What a structured question costs by three roads, in turns: the CLI, the `anthropic` package's client, our own way.

    .venv/bin/python -m tests.bench.question

The scripted Messages API is a process of its own and answers at once, so what is seen is what the roads themselves
cost. The CLI's questions go through a warm slot, as those of an owner with an OAuth token do. Processor time is this
process's and the slot's, with all that it has started.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import anthropic

from pokestrator.claude.answers import ANSWER_TOOL, body_of
from pokestrator.claude.models import model_of
from pokestrator.claude.pool import Claude, Inline, Slots
from pokestrator.runs import RunRequest
from tests.acceptance.processes import children
from tests.bench.memory import command_of, memory_of
from tests.bench.stand import pause
from tests.integration.agent_runs import KEY, agent_environment, agents, ignore, scripted

ROUNDS = 40
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": ["string", "null"]}, "why": {"type": "string", "maxLength": 300}},
    "required": ["name", "why"],
}
ANSWER = {"name": "bill_splitter", "why": "The task asks to split a bill."}
PROMPT = "x " * 5_000  # a shortlist of 32 subagents, with their examples

# In a process that has imported what a worker has: what more a road takes, and how long that takes.
FIRST = """
import sys, time
import pokestrator.bootstrap, pokestrator.web.mcp
from pokestrator.claude.upstream import Upstream
from tests.bench.memory import memory_of
given = {"ANTHROPIC_API_KEY": "sk", "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
upstream = Upstream(given)
upstream.prepare()  # the relay has, whatever the road
before, began = memory_of("self")[1], time.perf_counter()
if sys.argv[1] == "anthropic":
    import anthropic
    anthropic.Anthropic(api_key="sk").messages
else:
    from jsonschema import Draft202012Validator
    upstream.connections(lambda _: None)
print(1000 * (time.perf_counter() - began), memory_of("self")[1] - before)
"""

Ask = Callable[[RunRequest], object]


def question() -> RunRequest:
    return scripted({"structured": ANSWER}, tools=(), output_schema=SCHEMA, system_prompt=PROMPT)


def by_pool(claude: Claude) -> Ask:
    return lambda request: claude.run(request, ignore).structured


def by_package(client: anthropic.Anthropic) -> Ask:
    def ask(request: RunRequest) -> object:
        body = body_of(request, model_of(request.model) or "", 16_000, [{"role": "user", "content": request.prompt}])
        message = client.messages.create(**body)
        return next(block.input for block in message.content if block.type == "tool_use" and block.name == ANSWER_TOOL)

    return ask


@contextmanager
def api_of_its_own() -> Iterator[str]:
    """The address of a scripted Messages API in another process."""
    command = [sys.executable, "-m", "pokestrator.demo.messages_api"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as api:
        assert api.stdout is not None
        try:
            yield api.stdout.readline().strip()
        finally:
            api.terminate()


def processor_seconds(pid: int) -> float:
    """Of a process and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def measure(ask: Ask, pids: list[int]) -> tuple[float, float]:
    """Milliseconds of one question, and of processor time."""
    request = question()
    used, began = sum(map(processor_seconds, pids)), time.perf_counter()
    assert ask(request) == ANSWER
    return 1000 * (time.perf_counter() - began), 1000 * (sum(map(processor_seconds, pids)) - used)


def first(road: str) -> tuple[float, float]:
    """Milliseconds and MB that a road's first question takes for good; the medians of three processes."""
    said = [
        subprocess.run([sys.executable, "-c", FIRST, road], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    return statistics.median(float(ms) for ms, _ in said), statistics.median(float(mb) for _, mb in said)


def megabytes_of_an_agent(slots: Slots) -> float:
    """What the CLI holds while its question waits for an answer."""
    slow = scripted({"structured": ANSWER, "delay": 2}, tools=(), output_schema=SCHEMA)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(slots.run, slow, ignore)
        held = 0.0
        while not asked.done():
            with suppress(OSError, KeyError, ValueError):  # it is just starting, or has just left
                held = max([held, *(memory_of(pid)[1] for pid in agents())])
            pause(0.05)
    return held


def main() -> None:
    rows: dict[str, list[tuple[float, float]]] = {"CLI": [], "anthropic": [], "ours": []}
    with api_of_its_own() as url:
        keyless = {name: value for name, value in agent_environment(url).items() if name != "ANTHROPIC_API_KEY"}
        slots = Slots(1, {**keyless, "CLAUDE_CODE_OAUTH_TOKEN": KEY})
        slots.start()
        client = anthropic.Anthropic(api_key=KEY, base_url=url, max_retries=0)
        roads = {
            "CLI": by_pool(slots),
            "anthropic": by_package(client),
            "ours": by_pool(Inline(agent_environment(url))),
        }
        try:
            for ask in roads.values():
                ask(question())
            pids = [os.getpid(), *(pid for pid in children(os.getpid()) if "spawn_main" in command_of(pid))]
            each = {"CLI": megabytes_of_an_agent(slots), "anthropic": 0.0, "ours": 0.0}
            for _ in range(ROUNDS):
                for name, ask in roads.items():
                    rows[name].append(measure(ask, pids))
        finally:
            slots.close()
    once = {"CLI": (0.0, 0.0), "anthropic": first("anthropic"), "ours": first("ours")}
    print(f"{ROUNDS} questions each way, in turns")
    print(
        f"{'':<10} {'p50 ms':>8} {'p95 ms':>8} {'of CLI':>7} {'CPU ms':>8} {'once ms':>8} {'once MB':>8} {'each MB':>8}"
    )
    middle = statistics.median(ms for ms, _ in rows["CLI"])
    for name, measured in rows.items():
        times = [ms for ms, _ in measured]
        p50, p95 = statistics.median(times), statistics.quantiles(times, n=20, method="inclusive")[18]
        used = statistics.mean(cpu for _, cpu in measured)
        print(f"{name:<10} {p50:>8.1f} {p95:>8.1f} {p50 / middle:>7.4f} {used:>8.1f}", end=" ")
        print(f"{once[name][0]:>8.0f} {once[name][1]:>8.1f} {each[name]:>8.0f}")


if __name__ == "__main__":
    main()
