"""How agents are confined, and what is started in the CLI's place. probing.py finds out what there is on a machine.

confined   Landlock and seccomp hold a run in its folder and at the relay (jail.py): all its tools
limited    they are not to be had here: only the tools that need neither files nor commands nor a connection of
           their own, unless the owner has allowed all of them
"""

from __future__ import annotations

import marshal
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pokestrator.claude import jail, processes
from pokestrator.claude.supervisor import Supervisor
from pokestrator.subagents import Tool
from pokestrator.telemetry import get_logger

log = get_logger(__name__)

ROOT = Path(__file__).parents[2]
# The agent's own folders, of which it may write all; the run's folder itself is not among them.
FOLDERS = ("home", "config", "tmp", "work")

# Users that a run becomes where we are root, one for each slot: below 65,536, which containers have, and of the range
# that systemd gives out to services, so that nobody else is one of them.
FIRST_USER, USERS = 61_184, 4_096

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
WRITABLE = ("/dev/null",)
CERTIFICATES = ("SSL_CERT_FILE", "NODE_EXTRA_CA_CERTS")

# Of each process. With less memory the CLI crashes; a limit on its addresses (AS) would end it at once.
LIMITS = {"DATA": 2 * 2**30, "FSIZE": 256 * 2**20, "NOFILE": 1_024, "CORE": 0}
PROCESSES = 128  # and threads, beside those that the user has already
MORE_CPU_SECONDS = 10

# WebSearch runs at the provider. WebFetch runs in the CLI, which would reach whatever listens on this machine.
TOOLS_OF_THE_LIMITED = frozenset({"WebSearch"})

Tier = Literal["confined", "limited"]
Egress = Literal["relay only", "by port only", "open"]


@dataclass(frozen=True)
class Confinement:
    """What holds here, and why it is not more."""

    tier: Tier
    egress: Egress
    landlock: int = 0  # version of the kernel's interface; 0 is none
    as_user: bool = False  # runs become users of their own
    reason: str = ""
    readable: tuple[str, ...] = ()
    all_tools: bool = False  # the owner's word, for where the tier is limited

    def allowed(self, tools: Sequence[str]) -> tuple[str, ...]:
        """Those of the tools that a run may have here: none beyond those that there are for subagents at all."""
        every = self.all_tools or self.tier == "confined"
        return tuple(tool for tool in tools if tool in get_args(Tool) and (every or tool in TOOLS_OF_THE_LIMITED))

    def __str__(self) -> str:
        tools = "all tools" if self.all_tools or self.tier == "confined" else "no commands and no files"
        return f"agents are {self.tier} ({tools}), egress: {self.egress}" + (f"; {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Orders:
    """What jail.py does before it executes `program`."""

    program: str
    uid: int | None  # the user to become
    limits: Mapping[str, int]
    port: int | None  # the only one that can be reached; None confines nothing
    supervisor: str | None  # where the supervisor listens
    readable: Sequence[str] = ()
    writable: Sequence[str] = ()
    tries: Mapping[str, Any] | None = None  # for the probe

    def written(self) -> str:
        """As jail.py reads it."""
        return marshal.dumps(asdict(self)).hex()


# The launcher ----------------------------------------------------------------------------------------------------


@contextmanager
def launcher(
    confinement: Confinement, folder: Path, program: Path, variables: Mapping[str, str], seconds: float
) -> Iterator[tuple[Path, dict[str, str]]]:
    """What to start in the place of `program` for a run in `folder`, and the variables to start it with.

    `seconds` is how long the run may take at most. As root, the folder is given to the user that the run becomes. All
    of the run's processes must be dead when the block ends. Raises OSError, ValueError.
    """
    port = _relay_port(variables) if confinement.tier == "confined" else None
    uid = user_of_this_process() if confinement.as_user else None
    certificates = _copied_certificates(folder, variables)
    program = program if uid is None else _reachable(program, folder)
    orders = Orders(
        program=str(program),
        uid=uid,
        limits=_limits(uid, seconds),
        port=port,
        # Relative to the folder where the CLI starts: its own path may be too long for a socket.
        supervisor=f"../{Supervisor.NAME}" if port and confinement.egress == "relay only" else None,
        readable=[*confinement.readable, str(program), *certificates.values()],
        writable=[*WRITABLE, *(str(folder / name) for name in FOLDERS)],
    )
    with _supervised(folder, orders):
        script = _script(folder)
        if uid is not None:
            for each in (*(folder / name for name in FOLDERS), folder):
                os.chown(each, uid, uid)
        seen = {"PATH": _path(variables), "GIT_CONFIG_NOSYSTEM": "1"}  # or git complains about what it may not read
        yield script, {**variables, **certificates, **seen, jail.ORDERS: orders.written()}


def user_of_this_process() -> int:
    """Whom this process's run becomes: processes that run at once are different users."""
    return FIRST_USER + os.getpid() % USERS


@contextmanager
def _supervised(folder: Path, orders: Orders) -> Iterator[None]:
    if orders.supervisor is None:
        yield
        return
    assert orders.port is not None
    supervisor = Supervisor(folder, orders.port)
    try:
        supervisor.start()
        yield
    finally:
        supervisor.close()


def _script(folder: Path) -> Path:
    """A program that is the jail: the SDK takes one path and no arguments before its own."""
    script = folder / "claude"
    code = f"import sys; sys.path.append({str(ROOT)!r}); from pokestrator.claude.jail import main; main()"
    words = shlex.join([sys.executable, "-I", "-S", "-c", code])
    script.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8", errors="surrogateescape")
    script.chmod(0o700)
    return script


def _reachable(program: Path, folder: Path) -> Path:
    """The program, by a name of its own in the run's folder where its own folder is closed to other users.

    The CLI is executed by a descriptor and would start even so; but it also starts itself by its name, as ripgrep.
    """
    program = program.resolve()
    if all(parent.stat().st_mode & stat.S_IXOTH for parent in program.parents):
        return program
    name = folder / "cli"
    try:
        name.hardlink_to(program)
    except OSError as error:  # on another file system: Grep and Glob will not work
        log.warning("cli_out_of_reach", program=str(program), reason=repr(error))
        return program
    return name


def _copied_certificates(folder: Path, variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that name files with certificates, naming copies: the originals may lie where only we can go."""
    copies = {}
    for name in CERTIFICATES:
        original, copy = Path(variables.get(name, "")), folder / f"{name}.pem"
        if original.is_file():
            copy.write_bytes(original.read_bytes())
            copy.chmod(0o644)
            copies[name] = str(copy)
    return copies


def _limits(uid: int | None, seconds: float) -> dict[str, int]:
    cpu = int(seconds * (os.cpu_count() or 1)) + MORE_CPU_SECONDS
    # Every thread of the user counts, ours too where the run stays the same user; a user of its own has none.
    there = processes.threads_of(os.getuid()) if uid is None else 0
    return {**LIMITS, "CPU": cpu, "NPROC": there + PROCESSES}


def _relay_port(variables: Mapping[str, str]) -> int:
    relay = urlsplit(variables.get("ANTHROPIC_BASE_URL", ""))
    if relay.hostname != "127.0.0.1" or relay.port is None:
        raise ValueError("a confined agent reaches Claude's API only through a relay on 127.0.0.1")
    return relay.port


def _path(variables: Mapping[str, str]) -> str:
    """PATH without the folders that are closed to the run: a shell would find programs there and fail to start them."""
    folders = [each for each in variables.get("PATH", "").split(os.pathsep) if _is_below(each, PROGRAMS)]
    return os.pathsep.join(folders) or os.defpath


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)
