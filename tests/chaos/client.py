"""The client's side: sends tasks at an even rate, to any instance, and writes down what became of every call. It thinks
better of some tasks, and cancels them.

It does what a load balancer and a careful client do: a refused connection means the other instance, and a call without
an answer is sent again with the same idempotency key until one comes.
"""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import requests

from tests.chaos.ledgers import Ack, Cancel, Ledgers, Refusal

CALL_SECONDS = 10.0
AGAIN_SECONDS = 0.5  # between two tries of a call
THREADS = 12
CANCELLED = 0.06  # of all tasks
CANCEL_TRIES = 40

Step = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """One call to make. `metadata` carries its idempotency key; without a callback the message API is used."""

    key: str
    caller: str
    text: str
    callback: tuple[str, str] | None  # URL and token
    cancel_after: float | None  # seconds, for one that is cancelled

    @property
    def headers(self) -> dict[str, str]:
        headers = {"X-Poke-User-Id": self.caller}
        if self.callback is not None:
            headers |= {"X-Poke-Callback-Url": self.callback[0], "X-Poke-Callback-Token": self.callback[1]}
        return headers


def tasks(count: int, seed: int, callback: Callable[[str], str]) -> Iterator[Task]:
    """`count` tasks, the same for the same seed but for their callback addresses, which `callback(token)` makes."""
    chance = random.Random(seed)
    for number in range(count):
        token = f"token-{seed}-{number}"
        yield Task(
            key=f"chaos-{seed}-{number}",
            caller=str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            text=text_of(number, _steps(number, chance)),
            callback=(callback(token), token) if number % 2 else None,
            cancel_after=chance.uniform(0, 4) if chance.random() < CANCELLED else None,
        )


def text_of(number: int, steps: Sequence[Step]) -> str:
    """A task for a shipped template. Its script is part of a link, whose words the routing does not weigh."""
    text = f"Split {number}.50 between 5 people with a tip"
    if not steps:
        return text
    script = json.dumps(steps, separators=(",", ":")).replace(" ", "\\u0020")
    return f"{text} https://example.com/{number}/SCRIPT:{script}"


def _steps(number: int, chance: random.Random) -> list[Step]:
    """What its runs do: most answer at once, some work for a while, some meet trouble of the API first."""
    answer = {"text": f"Report {number} is done."}
    roll = chance.random()
    if roll < 0.30:
        command = f"sleep {chance.randint(1, 4)}"
        return [{"tool": "Bash", "input": {"command": command, "description": "work"}}, answer]
    if roll < 0.40:
        return [{"status": 529, "type": "overloaded_error", "times": 3}, answer]
    if roll < 0.45:
        return [{"status": 500, "type": "api_error", "times": 2}, answer]
    if roll < 0.50:
        return [{"hang": chance.randint(2, 4), "times": 1}, answer]
    return []


class Client:
    """Sends `tasks`, evenly over `seconds`. `urls` gives the MCP address of each instance by name, as it is now."""

    def __init__(
        self, tasks: Iterator[Task], count: int, seconds: float, urls: Callable[[], Mapping[str, str]], key: str
    ) -> None:
        self._tasks = tasks
        self._pause = seconds / max(count, 1)
        self._urls = urls
        self._key = key
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._next = 0
        self._threads: list[threading.Thread] = []
        self.unanswered: list[Task] = []

    def start(self, ledgers: Ledgers) -> None:
        began = time.monotonic()
        for _ in range(THREADS):
            thread = threading.Thread(target=self._send_all, args=(ledgers, began), name="client", daemon=True)
            thread.start()
            self._threads.append(thread)

    @property
    def done(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Give up what is not answered yet."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _send_all(self, ledgers: Ledgers, began: float) -> None:
        while (turn := self._take()) is not None:
            number, task = turn
            if self._stop.wait(max(began + number * self._pause - time.monotonic(), 0)):
                return
            self._send(number, task, ledgers)

    def _take(self) -> tuple[int, Task] | None:
        with self._lock:
            task = next(self._tasks, None)
            self._next += 1
            return (self._next - 1, task) if task is not None else None

    def _send(self, number: int, task: Task, ledgers: Ledgers) -> None:
        """Until it is accepted."""
        attempt = number
        while not self._stop.is_set():
            urls = self._urls()
            names = sorted(urls)
            refused = 0
            for turn in range(len(names)):  # a refused connection: the next one, at once
                name = names[(attempt + turn) % len(names)]
                outcome = call(urls[name], name, task, self._key)
                if isinstance(outcome, Ack):
                    ledgers.acks.add(outcome)
                    if task.cancel_after is not None and outcome.durable:
                        self._cancel(task, task.cancel_after, outcome.request_id, ledgers)
                    return
                if outcome.kind != "no connection":
                    ledgers.refusals.add(outcome)
                    break
                refused += 1
            if refused == len(names):  # only where nobody listened, the caller has noticed
                ledgers.refusals.add(Refusal(time.time(), 0, task.key, "all", "no connection", "nobody listens"))
            attempt += 1
            self._stop.wait(AGAIN_SECONDS)
        with self._lock:
            self.unanswered.append(task)

    def _cancel(self, task: Task, after: float, request_id: str, ledgers: Ledgers) -> None:
        """Until it is answered, by whichever instance."""
        self._stop.wait(after)
        status = ""
        for attempt in range(CANCEL_TRIES):
            urls = self._urls()
            status = cancel(urls[sorted(urls)[attempt % len(urls)]], task, request_id, self._key)
            if status or self._stop.wait(AGAIN_SECONDS):
                break
        ledgers.cancels.add(Cancel(time.time(), request_id, status))


def cancel(url: str, task: Task, request_id: str, key: str) -> str:
    """How the task stands after it; "" without an answer."""
    arguments = {"task_description": "", "metadata": {"action": "cancel", "request_id": request_id}}
    try:
        return str(_structured(_post(url, arguments, task, key)).get("status", ""))
    except requests.RequestException:
        return ""


def _post(url: str, arguments: Mapping[str, Any], task: Task, key: str) -> requests.Response:
    """One tools/call as Poke's client frames it, on a connection of its own. Raises requests' errors."""
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "orchestrate", "arguments": arguments},
    }
    headers = {
        "Authorization": f"Bearer {key}",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": "2025-06-18",
        **task.headers,
    }
    return requests.post(url, json=body, headers=headers, timeout=CALL_SECONDS)


def call(url: str, instance: str, task: Task, key: str) -> Ack | Refusal:
    """Hand over a task."""
    arguments = {"task_description": task.text, "metadata": {"idempotency_key": task.key}}
    at, started = time.time(), time.monotonic()

    def seconds() -> float:
        return time.monotonic() - started

    try:
        answer = _post(url, arguments, task, key)
    except requests.ConnectTimeout as error:
        return Refusal(at, seconds(), task.key, instance, "no answer", _short(error))
    except requests.ConnectionError as error:
        kind = _kind_of(error)
        return Refusal(at, seconds(), task.key, instance, kind, _short(error))
    except requests.RequestException as error:
        return Refusal(at, seconds(), task.key, instance, "no answer", _short(error))
    took = seconds()
    structured = _structured(answer)
    if structured.get("status") != "accepted":
        return Refusal(at, took, task.key, instance, "refused", f"HTTP {answer.status_code} {answer.text[:300]}")
    return Ack(
        at,
        took,
        task.key,
        str(structured["request_id"]),
        durable=structured.get("durable", True) is not False,
        duplicate=bool(structured.get("duplicate", False)),
        instance=instance,
    )


def _structured(answer: requests.Response) -> Mapping[str, Any]:
    try:
        value = answer.json()["result"].get("structuredContent") or {}
    except (ValueError, KeyError, AttributeError):
        return {}
    return value if isinstance(value, dict) else {}


def _kind_of(error: requests.ConnectionError) -> Any:
    # requests wraps the socket's error some layers deep; only one that was refused has certainly reached nobody.
    return "no connection" if "Connection refused" in str(error) else "no answer"


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[-200:]
