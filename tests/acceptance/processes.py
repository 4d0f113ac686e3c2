"""Processes and connections, looked up in /proc: what a test has left behind, and what state it is in."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

LISTENS = "0A"  # in /proc/net/tcp


def eventually(condition: Callable[[], object], timeout: float = 10.0) -> bool:
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


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a process has been sent a signal that it has not taken yet."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    [pending] = [int(line.split()[1], 16) for line in lines if line.startswith("ShdPnd")]
    return bool(pending & 1 << (number - 1))


def backlog(port: int) -> int:
    """Connections to a loopback port that the kernel has taken for its listener, and the listener has not."""
    return sum(queued for local, _, state, queued in _loopback_sockets() if (local, state) == (port, LISTENS))


def is_read(client: socket.socket) -> bool:
    """Whether the other end, on loopback, has read all that was sent on a connection."""
    ports = client.getpeername()[1], client.getsockname()[1]
    return any((local, remote, queued) == (*ports, 0) for local, remote, _, queued in _loopback_sockets())


def _loopback_sockets() -> list[tuple[int, int, str, int]]:
    """Local port, remote port, state, and what waits to be received, of each TCP socket on 127.0.0.1."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [
        (int(row[1][9:], 16), int(row[2][9:], 16), row[3], int(row[4].split(":")[1], 16))
        for row in rows
        if row[1].startswith("0100007F:")
    ]
