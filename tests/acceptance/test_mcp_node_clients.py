"""TypeScript MCP clients from npm, the one Poke uses among them, against our endpoint with a key."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pokestrator.jobs import CallbackTarget
from pokestrator.web import tool
from tests.integration.mcp_peer import FakeService, our_server

KEY = "a-long-random-key"
CLIENTS = Path(__file__).parent / "mcp_clients"

UNREACHABLE = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ECONNRESET|E?TIMEDOUT|ENETUNREACH|EHOSTUNREACH")

# Package, way of negotiating, and the version that must come of it.
NODE_CLIENTS = [
    ("sdk-poke", "legacy", "2025-06-18"),
    ("sdk-latest", "legacy", "2025-11-25"),
    ("@modelcontextprotocol/client", "legacy", "2025-11-25"),
    ("@modelcontextprotocol/client", "auto", "2026-07-28"),
    ("@modelcontextprotocol/client", "2026-07-28", "2026-07-28"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the clients' folder with its packages installed; node_modules stays out of the checkout."""
    copy = tmp_path_factory.mktemp("npm") / "mcp_clients"
    shutil.copytree(CLIENTS, copy, ignore=shutil.ignore_patterns("node_modules"))
    reason = why_not_installed(copy, dict(os.environ))
    if reason and os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI must run the TypeScript clients")
    if reason:
        pytest.skip(reason)
    return copy


def why_not_installed(folder: Path, environment: dict[str, str]) -> str | None:
    """Install the packages of `folder`: None, or what this machine lacks for it. Any other trouble fails the test."""
    missing = [program for program in ("node", "npm") if shutil.which(program) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    options = ["--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--fetch-retries=1"]
    try:
        install = subprocess.run(
            ["npm", "install", *options],
            check=False,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    except subprocess.TimeoutExpired:
        return "npm's registry does not answer"
    unreachable = UNREACHABLE.search(install.stderr) if install.returncode else None
    if unreachable:
        return f"npm's registry cannot be reached ({unreachable[0]})"
    assert install.returncode == 0, install.stderr
    return None


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm not installed")
def test_a_registry_out_of_reach_is_a_reason_to_skip(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text('{"dependencies": {"a-package": "1.0.0"}}')
    nowhere = {"npm_config_registry": "http://127.0.0.1:9/", "npm_config_fetch_retry_mintimeout": "10"}
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **nowhere}
    assert why_not_installed(tmp_path, environment) == "npm's registry cannot be reached (ECONNREFUSED)"


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def url(service: FakeService) -> Iterator[str]:
    with our_server(service, api_key=KEY) as address:
        yield address


def run_client(folder: Path, *arguments: str) -> Any:
    done = subprocess.run(
        ["node", "orchestrate.mjs", *arguments], check=False, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("package", "mode", "version"), NODE_CLIENTS)
def test_typescript_client_lists_the_tool_and_gets_its_ack(
    folder: Path, url: str, service: FakeService, package: str, mode: str, version: str
) -> None:
    seen = run_client(folder, package, mode, url, KEY)
    assert seen["version"] == version
    assert seen["instructions"] == tool.INSTRUCTIONS
    assert seen["server"]["name"] == "pokestrator"
    [listed] = seen["tools"]
    assert listed["name"] == "orchestrate"
    [job] = service.jobs
    ack = seen["good"]["structuredContent"]
    assert (ack["status"], ack["request_id"]) == ("accepted", str(job.id))
    assert json.loads(seen["good"]["content"][0]["text"]) == ack
    assert (job.caller, job.metadata) == ("user-1", {"zone": "Europe/Madrid"})
    assert job.callback == CallbackTarget("https://poke.example/cb", "token-1")


@pytest.mark.parametrize(("package", "mode", "version"), NODE_CLIENTS)
def test_typescript_client_reads_a_refusal_as_a_tool_error(
    folder: Path, url: str, service: FakeService, package: str, mode: str, version: str
) -> None:
    bad = run_client(folder, package, mode, url, KEY)["bad"]
    assert bad["isError"] is True
    assert bad["content"][0]["text"].startswith("task_description: is empty")
    assert len(service.jobs) == 1  # the good call alone


@pytest.mark.parametrize(("package", "mode", "version"), NODE_CLIENTS)
def test_typescript_client_is_told_of_a_wrong_key(
    folder: Path, url: str, service: FakeService, package: str, mode: str, version: str
) -> None:
    refused = run_client(folder, package, mode, url, "wrong")["refused"]
    assert "401" in refused or "unauthorized" in refused.lower()
    assert service.jobs == []
