"""What holds on this machine, found out by trying: a jail such as runs have is built, and tried to get out of.

Asking the kernel would not do: Landlock may be there and switched off, seccomp may be refused by a container.
"""

from __future__ import annotations

import functools
import marshal
import os
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pokestrator.claude import jail, landlock
from pokestrator.claude.confinement import FOLDERS, PROGRAMS, ROOT, Confinement, Orders, launcher
from pokestrator.claude.folders import PREFIX
from pokestrator.environ import minimal_environment
from pokestrator.telemetry import one_line

PROBE_SECONDS = 30.0  # for what takes a tenth of a second where the machine is not busy

SIGNALLED = f"agents can end this user's processes (Landlock {landlock.WITH_SCOPES}, or starting as root, prevents it)"

READABLE = (
    *PROGRAMS,
    *("/dev/urandom", "/dev/random", "/dev/zero"),
    *("/etc/passwd", "/etc/group", "/etc/hosts", "/etc/nsswitch.conf", "/etc/localtime", "/etc/mime.types"),
    *("/etc/ld.so.cache", "/etc/alternatives", "/etc/ssl", "/etc/pki", "/etc/ca-certificates"),
)


def probe(*, all_tools: bool = False) -> Confinement:
    """What holds on this machine. `all_tools` is the owner's word for where little does."""
    return replace(_probe(), all_tools=all_tools)


@functools.cache
def _probe() -> Confinement:
    """Try to get out of a jail such as runs have. Once a process, in some tenths of a second; what fails is limited."""
    best = Confinement("confined", "relay only", landlock.version(), os.geteuid() == 0, readable=tuple(_readable()))
    reasons = [SIGNALLED] if _can_signal(best) else []
    for wanted in (best, replace(best, egress="by port only")):
        problems = _problems(wanted)
        if not problems:
            return replace(wanted, reason="; ".join(reasons))
        reasons.append(f"{wanted.egress}: {', '.join(problems)}")
    limited = replace(best, tier="limited", egress="open", reason="; ".join(reasons))
    return replace(limited, as_user=limited.as_user and not _problems(limited))


def _can_signal(wanted: Confinement) -> bool:
    """Whether nothing keeps a run from signalling its user's other processes, us among them."""
    return landlock.WITH_PORTS <= wanted.landlock < landlock.WITH_SCOPES and not wanted.as_user


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
        tempfile.TemporaryDirectory(prefix=f"{PREFIX}probe-") as name,
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
