"""The real service as a child process on a free loopback port, and a real MCP client for it; for the demo and tests."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx2
import mcp
from mcp.client.streamable_http import streamable_http_client

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
STOP_SECONDS = 60


class StartFailed(Exception):
    """The service ended before it listened; the text is what it said."""


class LocalService:
    """`python -m pokestrator serve` under gunicorn with exactly this environment (PORT=0 takes a free port)."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = {"HOST": "127.0.0.1", "PORT": "0", **environment}
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=5_000)
        self._reader: threading.Thread | None = None
        self.url = ""

    def start(self) -> None:
        """Start it and wait until it listens. Raises StartFailed; whatever is raised, it does not run."""
        try:
            self._start()
        except BaseException:  # Ctrl-C too
            self.stop()
            raise

    def _start(self) -> None:
        command = [sys.executable, "-m", "pokestrator", "serve"]
        # In a session of its own: Ctrl-C in a terminal must reach us first, so that we can stop it in order.
        self._process = subprocess.Popen(
            command,
            env=dict(self._environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process,), name="service log", daemon=True)
        self._reader.start()
        assert self._process.stdout is not None
        late = threading.Timer(START_SECONDS, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline()
        finally:
            late.cancel()
        if "http://" not in line:
            self._process.wait()
            self._reader.join(timeout=5)
            raise StartFailed(self.log.strip() or f"it did not listen within {START_SECONDS} s")
        self.url = line[line.index("http://") :].strip()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return "".join(list(self._log))

    def wait_for_log(self, text: str, timeout: float) -> bool:
        """Whether `text` comes up in the log within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while text not in self.log:
            if time.monotonic() > deadline:
                return False
            threading.Event().wait(0.02)  # the log is a pipe read by another thread; there is nothing to wait on
        return True

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """SIGTERM and wait for its end; SIGKILL after STOP_SECONDS. Returns its exit code."""
        if self._process is None:
            return 0
        self.terminate()
        try:
            code = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._reader is not None:
            self._reader.join(timeout=5)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        return code

    def __enter__(self) -> LocalService:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self._log.append(line)


def call_orchestrate(
    url: str, arguments: Mapping[str, Any], headers: Mapping[str, str]
) -> tuple[dict[str, Any], float]:
    """Connect to an MCP endpoint and call its tool: (structured answer, milliseconds of the call itself).

    Raises ValueError with the tool's text when it answers with an error.
    """
    return asyncio.run(_call(url, dict(arguments), dict(headers)))


async def _call(url: str, arguments: dict[str, Any], headers: dict[str, str]) -> tuple[dict[str, Any], float]:
    async with (
        httpx2.AsyncClient(headers=headers, timeout=30) as http,
        mcp.Client(streamable_http_client(url, http_client=http)) as client,
    ):
        started = time.perf_counter()
        result = await client.call_tool("orchestrate", arguments)
        milliseconds = 1000 * (time.perf_counter() - started)
    text = " ".join(getattr(block, "text", "") for block in result.content)
    if result.is_error or result.structured_content is None:
        raise ValueError(text)
    return dict(result.structured_content), milliseconds
