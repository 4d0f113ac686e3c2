"""Which processes a test left behind, looked up in /proc."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def eventually(condition: Callable[[], bool], timeout: float = 10.0) -> bool:
    """Whether `condition` comes true within `timeout` seconds. For what the kernel tells nobody about."""
    deadline = time.monotonic() + timeout
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            return False
        pause.wait(0.02)
    return True


def living(marker: str) -> list[str]:
    """Command lines of living processes whose environment or command line holds `marker`."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:  # it has just ended
            continue
        if state != "Z" and (marker.encode() in environment or marker in command):
            found.append(f"{entry.name} {command}")
    return found


def children(pid: int) -> list[int]:
    """Living direct children of a process."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def sockets(pid: int) -> int:
    """How many sockets a process holds open."""
    total = 0
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            total += descriptor.readlink().name.startswith("socket:")
        except OSError:  # closed since it was listed
            continue
    return total


def threads(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
