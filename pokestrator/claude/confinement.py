"""How far agents can be confined on this machine, found out by trying; and what is started in the CLI's place.

confined   Landlock and seccomp hold a run in its folder and at the relay (jail.py): all its tools
limited    they are not to be had here: only the tools that need neither files nor commands nor a connection of
           their own, unless the owner has allowed all of them
"""

from __future__ import annotations

import functools
import marshal
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pokestrator.claude import jail, landlock, processes
from pokestrator.claude.supervisor import Supervisor
from pokestrator.environ import minimal_environment
from pokestrator.telemetry import one_line

ROOT = Path(__file__).parents[2]
PROBE_SECONDS = 30.0  # for what takes a tenth of a second where the machine is not busy

# The agent's own folders, of which it may write all; the run's folder itself is not among them.
FOLDERS = ("home", "config", "tmp", "work")

# Users that a run becomes where we are root, one for each slot: below 65,536, which containers have, and of the range
# that systemd gives out to services, so that nobody else is one of them.
FIRST_USER, USERS = 61_184, 4_096

PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
READABLE = (
    *PROGRAMS,
    *("/dev/urandom", "/dev/random", "/dev/zero"),
    *("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/etc/localtime", "/etc/mime.types"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl", "/etc/pki", "/etc/ca-certificates"),
)
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

    def allowed(self, tools: Sequence[str]) -> list[str]:
        """Those of the tools that a run may have here."""
        every = self.all_tools or self.tier == "confined"
        return [tool for tool in tools if every or tool in TOOLS_OF_THE_LIMITED]

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
    certificates = [variables[name] for name in CERTIFICATES if variables.get(name)]
    orders = Orders(
        program=str(program),
        uid=uid,
        limits=_limits(uid, seconds),
        port=port,
        # Relative to the folder where the CLI starts: its own path may be too long for a socket.
        supervisor=f"../{Supervisor.NAME}" if port and confinement.egress == "relay only" else None,
        readable=[*confinement.readable, str(program), *certificates],
        writable=[*WRITABLE, *(str(folder / name) for name in FOLDERS)],
    )
    with _supervised(folder, orders):
        script = _script(folder)
        if uid is not None:
            for each in (*(folder / name for name in FOLDERS), folder):
                os.chown(each, uid, uid)
        seen = {"PATH": _path(variables), "GIT_CONFIG_NOSYSTEM": "1"}  # or git complains about what it may not read
        yield script, {**variables, **seen, jail.ORDERS: orders.written()}


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


# The probe -------------------------------------------------------------------------------------------------------


def probe(*, all_tools: bool = False) -> Confinement:
    """What holds on this machine. `all_tools` is the owner's word for where little does."""
    return replace(_probe(), all_tools=all_tools)


@functools.cache
def _probe() -> Confinement:
    """Try to get out of a jail such as runs have. Once a process, in some tenths of a second; what fails is limited."""
    best = Confinement("confined", "relay only", landlock.version(), os.geteuid() == 0, readable=tuple(_readable()))
    reasons: list[str] = []
    for wanted in (best, replace(best, egress="by port only")):
        problems = _problems(wanted)
        if not problems:
            return replace(wanted, reason="; ".join(reasons))
        reasons.append(f"{wanted.egress}: {', '.join(problems)}")
    limited = replace(best, tier="limited", egress="open", reason="; ".join(reasons))
    return replace(limited, as_user=limited.as_user and not _problems(limited))


def _readable() -> list[str]:
    """What agents may read, without our own program, the folder it was started in and that of all runs."""
    closed = [each.resolve() for each in (ROOT, Path.cwd(), Path(tempfile.gettempdir()))]
    roots = dict.fromkeys(Path(each).resolve() for each in READABLE)
    return [path for each in roots for path in without(each, closed)]


def without(path: Path, closed: Sequence[Path]) -> list[str]:
    """`path`, or if some of `closed` lies below it, all that is in it but that: Landlock can only allow.

    Links are left out then: they may lead to what is closed. A folder that is closed as a whole is not below itself:
    nobody keeps a service's files in /usr/bin, but it may be started there.
    """
    inside = [each for each in closed if each != path and each.is_relative_to(path)]
    if not inside:
        return [str(path)]
    entries = [Path(entry.path) for entry in os.scandir(path) if not entry.is_symlink()]
    return [found for entry in entries if entry not in inside for found in without(entry, inside)]


def _problems(wanted: Confinement) -> list[str]:
    """What a process confined like this can do and must not, or must and cannot; empty when it is as wanted."""
    try:
        done = _tried(wanted)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return [one_line(str(error))]
    if wanted.tier == "limited":
        return []
    wrong = [
        name for name in jail.MUST_NOT if name in done and (name, wanted.egress) != ("dial elsewhere", "by port only")
    ]
    return [f"it can {name}" for name in wrong] + [f"it cannot {name}" for name in jail.MUST if name not in done]


def _tried(wanted: Confinement) -> list[str]:
    """What a process confined like this could do (jail.tried). Raises OSError, ValueError, SubprocessError."""
    with (
        tempfile.TemporaryDirectory(prefix="pokestrator-probe-") as name,
        socket.create_server(("", 0)) as relay,  # on every address, so that the wrong one could be dialled
    ):
        folder, port = Path(name), relay.getsockname()[1]
        for own in FOLDERS:
            (folder / own).mkdir(mode=0o700)
        secret = folder / "secret"
        secret.write_text("secret")
        tries = {
            "port": port,
            "inside": str(folder / "work" / "new"),
            "outside": str(folder / "new"),
            "secret": str(secret),
        }
        url = {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port}"}
        with launcher(wanted, folder, Path("/bin/true"), minimal_environment() | url, PROBE_SECONDS) as (script, env):
            orders = Orders(**{**marshal.loads(bytes.fromhex(env[jail.ORDERS])), "tries": tries})
            secret.chmod(0o644)
            done = subprocess.run(
                [str(script)],
                check=False,
                cwd=folder / "work",
                env={**env, jail.ORDERS: orders.written()},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PROBE_SECONDS,
            )
    if done.returncode:
        raise ValueError(done.stderr.strip() or f"exit code {done.returncode}")
    return done.stdout.splitlines()


def _is_below(path: str, roots: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(root) for root in roots)
