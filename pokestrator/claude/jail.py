"""Starts in the CLI's place: confines itself, then becomes the CLI.

Its orders (confinement.Orders) stand in the variable ORDERS, which the CLI does not get to see. What is done here holds
for the CLI and for all that it starts, and none of them can undo it. The order is forced: each step takes away what one
before it needs.

    1  open the CLI and what it may touch   while their folders can still be entered
    2  meet the supervisor                  while there are Unix sockets
    3  limits                               no process of a run is ever without them
    4  another user, no capabilities        while we are root; no_new_privs, which 5 and 6 need
    5  Landlock: which files, which port
    6  seccomp: which system calls          after those of 4 and 5, which it refuses
    7  execute                              by the descriptor of 1

A step that fails ends the process: exit code FAILED, one line on stderr, and nothing of the CLI has run. Every run
waits for this program: it runs without site-packages (`python -I -S`), and loads little of the standard library.
"""

from __future__ import annotations

import _socket  # the bare one, as in seccomp.py
import marshal
import os
import resource
import struct
import sys

from pokestrator.claude import landlock, seccomp
from pokestrator.claude.system_calls import Failed, checked, libc

TYPE_CHECKING = False  # so that `typing` is not loaded
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

ORDERS = "POKESTRATOR_JAIL"
FAILED = 97  # exit code

# prctl(2), capabilities(7)
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 24, 38, 47, 4
CAPABILITY_VERSION_3, MOST_CAPABILITIES = 0x20080522, 64

# For the probe: what a confined process is there to do, and what it is there not to do.
MUST = ("write inside", "dial the relay")
SIGNAL, ELSEWHERE = "signal the service", "dial elsewhere"
MUST_NOT = ("write outside", "read outside", SIGNAL, ELSEWHERE, "send by UDP", "open a Unix socket")


def main() -> None:
    """What the launcher's script runs. Does not return."""
    try:
        # The parent is the same Python; loading json takes as long as all the rest.
        follow(marshal.loads(bytes.fromhex(os.environ.pop(ORDERS))), sys.argv[1:])
    except (Failed, OSError, KeyError, ValueError) as error:
        sys.stderr.write(f"jail: {error}\n")
        sys.exit(FAILED)


def follow(orders: dict[str, Any], arguments: list[str]) -> None:
    program = os.open(orders["program"], os.O_RDONLY | os.O_CLOEXEC)
    readable, writable = landlock.opened(orders["readable"]), landlock.opened(orders["writable"])
    supervisor = met(orders["supervisor"]) if orders["supervisor"] else None
    limit(orders["limits"])
    gain_nothing_more(orders["uid"])
    if orders["port"] is not None:
        landlock.restrict(readable, writable, orders["port"])
        seccomp.restrict(supervisor)
    if orders["tries"] is not None:
        print(*tried(orders["tries"]), sep="\n", flush=True)
    os.execve(program, [orders["program"], *arguments], os.environ)  # by execveat: its folder may be closed to us now


def met(path: str) -> _socket.socket:
    """A connection to the supervisor, who listens at `path` for this run alone."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection.connect(path)
    return connection


def limit(limits: dict[str, int]) -> None:
    """Set limits by their names without RLIMIT_, soft and hard; a hard one that is lower already stays."""
    for name, wanted in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))


def gain_nothing_more(uid: int | None) -> None:
    """Become this user (None: stay who we are), without capabilities, and without set-uid programs that give some."""
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if uid is not None:
        for capability in range(MOST_CAPABILITIES):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # refused for those that the kernel does not know
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header, none = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    checked(libc.capset(header, none), "capset")


def tried(tries: dict[str, Any]) -> list[str]:
    """What can be done from in here, by name; for the probe at start."""

    def dial(address: str) -> None:
        connection = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
        connection.settimeout(5)
        connection.connect((address, tries["port"]))

    actions: dict[str, Callable[[], object]] = {
        "write inside": lambda: os.close(os.open(tries["inside"], os.O_WRONLY | os.O_CREAT)),
        "dial the relay": lambda: dial("127.0.0.1"),
        "write outside": lambda: os.close(os.open(tries["outside"], os.O_WRONLY | os.O_CREAT)),
        "read outside": lambda: os.close(os.open(tries["secret"], os.O_RDONLY)),
        SIGNAL: lambda: os.kill(os.getppid(), 0),
        ELSEWHERE: lambda: dial("127.0.0.2"),
        "send by UDP": lambda: _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM),
        "open a Unix socket": lambda: _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM),
    }
    done = []
    for name, action in actions.items():
        try:
            action()
            done.append(name)
        except OSError:
            continue
    return done
