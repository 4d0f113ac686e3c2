"""Runs of a hostile agent: the real CLI in a real slot, whose model, the scripted one, does as the attacker likes.

Where the tests are root, everything is done twice: by a service that is root, and by one that is an ordinary user, in a
process of its own (`python -m tests.security.agent_attacks`).
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from pokestrator.claude import processes
from pokestrator.claude.confinement import ROOT
from pokestrator.claude.folders import PREFIX
from pokestrator.claude.pool import Slots
from pokestrator.claude.probing import probe
from pokestrator.demo.local import LocalService
from pokestrator.demo.messages_api import MessagesApi
from pokestrator.runs import RunRequest
from tests.integration.agent_runs import (
    agent_environment,
    agents,
    bash,
    command_line,
    ignore,
    scripted,
    tool_outputs,
    wait_until,
)

INSIDE = Path(__file__).with_name("inside.py")
NOBODY = 65_534
CANARY = "canary-5c1d77"
TOOLS = ("Bash", "Read", "Write", "Edit", "Glob", "Grep")


def inside(targets: Mapping[str, Any]) -> dict[str, Any]:
    """The tool call that tries everything in inside.py."""
    arguments = shlex.quote(json.dumps(targets))
    return bash(
        f"python3 - {arguments} <<'END OF THE ATTACK'\n{INSIDE.read_text(encoding='utf-8')}\nEND OF THE ATTACK\n"
    )


def attack_all(database: str) -> dict[str, Any]:
    """Everything in inside.py, and what the file tools are asked for, by one run, while another one goes on.

    Returns `tries` (name: what came of it), `tools` (what each call of a file tool answered), and what was seen from
    outside: `decoys` (connections that reached what must not be reached) and whether the service's file is `intact`.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pokestrator-attacked-")))
        folder.chmod(0o755)
        secret = folder / "secret"
        secret.write_text(CANARY)
        secret.chmod(0o666)
        decoys = stack.enter_context(_decoys(folder))
        api = stack.enter_context(MessagesApi())
        slots = Slots(2, agent_environment(api.url))
        slots.start()
        stack.callback(slots.close)
        gate = folder / "gate"
        held = bash(f"echo {CANARY} > mine; until [ -e {gate} ]; do command sleep 0.05; done")
        other = threading.Thread(target=slots.run, args=(_request(held, {"text": "Done."}), ignore))
        other.start()
        stack.callback(other.join)
        stack.callback(gate.touch)
        mine = wait_until(lambda: next(Path(tempfile.gettempdir()).glob(f"{PREFIX}*/work/mine"), None), 30)
        targets = {
            **decoys.targets,
            "service": os.getpid(),
            "secret": str(secret),
            "program": str(ROOT / "pokestrator" / "settings.py"),
            "database": database,
            "other_run": str(mine),
            "runs": tempfile.gettempdir(),
            "machine": _address_of_the_machine(),
        }
        steps = [inside(targets), *_file_tools(secret, mine)]
        request = _request(*steps, {"text": "Done."})
        result = slots.run(request, ignore)
        assert result.text == "Done.", result
        tries, *tools = tool_outputs(api, request)
        return {
            "tries": dict(line.split(" ", 1) for line in tries.splitlines() if " " in line),
            "tools": tools,
            "decoys": decoys.reached,
            "intact": secret.read_text() == CANARY and sorted(p.name for p in folder.glob("secret*")) == ["secret"],
            "confinement": str(probe()),
        }


def _file_tools(secret: Path, mine: Path) -> Iterator[dict[str, Any]]:
    """Calls of the tools that the CLI itself carries out."""
    yield {"tool": "Read", "input": {"file_path": str(secret)}}
    yield {"tool": "Read", "input": {"file_path": str(mine)}}
    yield {"tool": "Read", "input": {"file_path": str(ROOT / "README.md")}}
    yield {"tool": "Read", "input": {"file_path": f"/proc/{os.getpid()}/environ"}}
    yield {"tool": "Write", "input": {"file_path": f"{secret}.new", "content": "x"}}
    yield {"tool": "Edit", "input": {"file_path": str(secret), "old_string": CANARY, "new_string": "x"}}
    yield {"tool": "Grep", "input": {"pattern": "canary", "path": str(secret.parent), "output_mode": "content"}}
    yield {"tool": "Glob", "input": {"pattern": "*", "path": str(secret.parent)}}


def _request(*steps: Mapping[str, Any], **changes: Any) -> RunRequest:
    return scripted(*steps, **{"tools": TOOLS, "timeout_seconds": 120.0, **changes})


class _Decoys:
    """Listeners that nothing of a run may reach."""

    def __init__(self) -> None:
        self.targets: dict[str, Any] = {}
        self.reached: list[str] = []


@contextmanager
def _decoys(folder: Path) -> Iterator[_Decoys]:
    decoys = _Decoys()
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
    ):
        unix.bind(str(folder / "unix"))
        unix.listen()
        datagram.bind(str(folder / "datagram"))
        port = tcp.getsockname()[1]
        udp.bind(("127.0.0.1", port))
        for name in ("unix", "datagram"):
            (folder / name).chmod(0o666)
        decoys.targets = {"decoy": port, "unix": str(folder / "unix"), "unix_datagram": str(folder / "datagram")}
        yield decoys
        for name, each in (("tcp", tcp), ("unix", unix), ("datagram", datagram), ("udp", udp)):
            each.setblocking(False)
            try:
                each.accept() if name in ("tcp", "unix") else each.recv(1)
                decoys.reached.append(name)
            except BlockingIOError:
                continue


def _address_of_the_machine() -> str:
    """One that is not loopback, if there is one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe_socket:
        try:
            probe_socket.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.3"
        return str(probe_socket.getsockname()[0])


# as an ordinary user ----------------------------------------------------------------------------------------------


def as_ordinary_user(what: str, *arguments: str) -> Any:
    """Call a function of this module as NOBODY, with a temp folder of its own; what it returned.

    Skips the test where that user cannot read what is needed.
    """
    with tempfile.TemporaryDirectory(prefix="pokestrator-nobody-", ignore_cleanup_errors=True) as folder:
        os.chown(folder, NOBODY, NOBODY)
        environment = {"PATH": os.environ["PATH"], "HOME": folder, "TMPDIR": folder, "PYTHONPATH": _packages()}
        identity: dict[str, Any] = {
            "user": NOBODY,
            "group": NOBODY,
            "extra_groups": [],
            "env": environment,
            "cwd": ROOT,
        }
        python = next((each for each in (sys.executable, "/usr/bin/python3") if _can(each, identity)), None)
        if python is None:
            pytest.skip("an ordinary user cannot read this Python, its packages or the repository")
        command = [python, "-m", __name__, what, *arguments]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, **identity)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def _packages() -> str:
    return os.pathsep.join(path for path in sys.path if path.endswith("-packages"))


def _can(python: str, identity: Mapping[str, Any]) -> bool:
    """Whether the user can start this Python with our packages, and it is one that we support."""
    check = "import sys, tests.security.agent_attacks, claude_agent_sdk; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", check], check=False, capture_output=True, **identity).returncode == 0
    except OSError:
        return False


def readers_of_environs() -> dict[str, int]:
    """Who may read /proc/PID/environ of a service's processes: root alone, of those that hide their memory."""
    environment = {
        **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "PYTHONPATH")},
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/none",
        "POKESTRATOR_CONCURRENCY": "1",
        "POKESTRATOR_DRAIN_SECONDS": "0",
    }
    with LocalService(environment) as service:
        [slot, *_] = wait_until(lambda: [p for p in processes.descendants(service.pid) if _is_slot(p.pid)], 30)
        wait_until(lambda: _owner(slot.pid) == 0, 30)  # it has to start first
        return {"master": _owner(service.pid), "worker": _owner(slot.parent), "slot": _owner(slot.pid)}


def _is_slot(pid: int) -> bool:
    return "spawn_main" in command_line(pid)


def _owner(pid: int) -> int:
    return Path(f"/proc/{pid}/environ").stat().st_uid


FUNCTIONS: dict[str, Any] = {function.__name__: function for function in (attack_all, readers_of_environs)}


def main(arguments: Sequence[str]) -> None:
    what, *rest = arguments
    print(json.dumps(FUNCTIONS[what](*rest)))
    assert agents() == []


if __name__ == "__main__":
    main(sys.argv[1:])
