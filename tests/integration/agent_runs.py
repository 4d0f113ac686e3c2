"""What the tests of agent runs share: requests for the scripted Messages API, and a view of the machine's processes."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pokestrator.claude import processes
from pokestrator.claude.pool import Claude
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import RunEvent, RunRequest, RunResult

KEY = "sk-ant-scripted-0123456789"


def agent_environment(url: str, **more: str) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "ANTHROPIC_API_KEY": KEY, "ANTHROPIC_BASE_URL": url, **more}


def scripted(*steps: Mapping[str, Any], **changes: Any) -> RunRequest:
    """A request that the scripted API answers with `steps`."""
    defaults: dict[str, Any] = {
        "prompt": f"Task {uuid.uuid4()}. SCRIPT: {json.dumps(steps)}",
        "system_prompt": "You are being tested.",
        "model": "haiku",
        "timeout_seconds": 40.0,  # ample: a busy machine takes seconds to warm a slot
        "tools": ("Bash",),
    }
    return RunRequest(**{**defaults, **changes})


def bash(command: str) -> dict[str, Any]:
    return {"tool": "Bash", "input": {"command": command, "description": "a test"}}


def tool_outputs(api: MessagesApi, request: RunRequest) -> list[str]:
    """What each tool call of a run has printed, as the model was told."""
    asked = next(each.body for each in reversed(api.requests) if _is_said(request.prompt, each.body))
    contents = [message["content"] for message in asked["messages"]]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    results = [block["content"] for block in blocks if block["type"] == "tool_result"]
    return [each if isinstance(each, str) else "".join(part.get("text", "") for part in each) for each in results]


def _is_said(prompt: str, body: Mapping[str, Any]) -> bool:
    said = [message["content"] for message in body["messages"]]
    blocks = [block for content in said if isinstance(content, list) for block in content]
    return prompt in said or prompt in [block.get("text") for block in blocks]


def ignore(_: RunEvent) -> None:
    pass


def wait_until(condition: Callable[[], Any], seconds: float) -> Any:
    """Poll `condition`, for which there is no signal to wait on; its first true value, or its last false one."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def running(words: str) -> list[int]:
    """Processes on this machine whose command line is exactly `words`, such as a sleep of a number of their own."""
    return [p.pid for p in processes.all_processes().values() if p.alive and command_line(p.pid).strip() == words]


def agents(pid: int | None = None) -> list[int]:
    """The Claude CLIs that are alive below `pid` (default: the tests' own process)."""
    return [p.pid for p in processes.descendants(pid) if "/_bundled/claude " in command_line(p.pid)]


def slot_of(agent: int) -> int:
    """The pid of the slot that has started this CLI."""
    process = processes.look_up(agent)
    assert process is not None
    return process.parent


def unique_sleep() -> str:
    return f"sleep {900_000_000 + uuid.uuid4().int % 99_000_000}"


def escaping(sleep: str, gate: Path | None = None) -> dict[str, Any]:
    """A command that leaves its session, its environment and its parent behind; ends once `gate` exists."""
    hold = f"until [ -e {gate} ]; do command sleep 0.05; done; " if gate else ""
    return bash(f"env -i setsid nohup {sleep} >/dev/null 2>&1 & {hold}echo gone")


def start(
    threads: ThreadPoolExecutor, claude: Claude, request: RunRequest, sleep: str
) -> tuple[Future[RunResult], int]:
    """Begin a run whose agent starts `sleep`; its future, and its CLI, once the sleep is there."""
    before = set(agents())
    future = threads.submit(claude.run, request, ignore)
    assert wait_until(lambda: future.done() or running(sleep), 40), f"the agent has not started {sleep}"
    assert not future.done(), future.result()
    (agent,) = set(agents()) - before
    return future, agent
