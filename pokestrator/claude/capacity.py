"""How many runs this machine can hold at once: its cores, but no more than its memory carries."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MEMORY_OF_A_RUN = 250 * 2**20  # bytes; a run of the CLI peaks at 195-290 MB

_CGROUP_FILESYSTEM = Path("/sys/fs/cgroup")


def default_concurrency(workers: int) -> int:
    """Runs at once for each of this instance's `workers` processes: by cores and memory, at least 1."""
    cpu_limits = [quota_v2(text) for text in _read("", "cpu.max")]
    cpu_limits += [
        quota_v1(quota, period)
        for quota, period in zip(_read("cpu", "cpu.cfs_quota_us"), _read("cpu", "cpu.cfs_period_us"), strict=False)
    ]
    memory_limits = [limit_of(text) for text in _read("", "memory.max")]
    memory_limits += [limit_of(text) for text in _read("memory", "memory.limit_in_bytes")]
    meminfo = Path("/proc/meminfo")
    memory = available_of(meminfo.read_text()) if meminfo.exists() else None
    return share(runs_for(_cores(), cpu_limits, [*memory_limits, memory]), workers)


def share(total: int, workers: int) -> int:
    """What each of `workers` processes gets of `total` runs at once: at least 1."""
    return max(1, total // max(1, workers))


def runs_for(cores: int, cpu_limits: list[float | None], memory_limits: list[int | None]) -> int:
    """Runs at once for `cores` under limits in cores and in bytes, where None is no limit; at least 1.

    >>> runs_for(8, [None, 2.0], [None, 512 * 2**20])
    2
    """
    by_cores = min([float(cores), *(limit for limit in cpu_limits if limit is not None)])
    by_memory = min((limit // MEMORY_OF_A_RUN for limit in memory_limits if limit is not None), default=cores)
    return max(1, min(math.ceil(by_cores), by_memory))


def quota_v2(cpu_max: str) -> float | None:
    """Cores that a cgroup v2 `cpu.max` allows: `150000 100000` is 1.5, `max 100000` no limit."""
    quota, _, period = cpu_max.strip().partition(" ")
    return None if quota == "max" else int(quota) / int(period or 100_000)


def quota_v1(quota: str, period: str) -> float | None:
    """Cores that cgroup v1's cfs quota and period allow; a quota of -1 is no limit."""
    return None if int(quota) <= 0 else int(quota) / int(period)


def limit_of(memory: str) -> int | None:
    """Bytes of a cgroup's `memory.max` or `memory.limit_in_bytes`; v1 writes a huge number for no limit."""
    text = memory.strip()
    if text == "max" or int(text) >= 2**60:
        return None
    return int(text)


def available_of(meminfo: str) -> int | None:
    """Bytes that /proc/meminfo calls available, or else all it has."""
    fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    kilobytes = fields.get("MemAvailable") or fields.get("MemTotal")
    return int(kilobytes.split()[0]) * 1024 if kilobytes else None


def cgroup_paths(proc_self_cgroup: str, controller: str) -> list[PurePosixPath]:
    """This process's cgroup and its parents, from the text of /proc/self/cgroup; `controller` is "" for v2.

    >>> [str(path) for path in cgroup_paths("0::/app/web", "")]
    ['/app/web', '/app', '/']
    """
    for line in proc_self_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            own = PurePosixPath(path)
            return [own, *own.parents]
    return []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(controller: str, name: str) -> Iterator[str]:
    """The texts of one limit's file in this process's cgroup and all above it: the tightest counts."""
    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:
        return
    mount = _CGROUP_FILESYSTEM / controller
    # In a container the path in /proc may be the host's, while only the container's own cgroup is mounted at the root.
    for path in dict.fromkeys([*cgroup_paths(membership, controller), PurePosixPath("/")]):
        try:
            yield (mount / path.relative_to("/") / name).read_text()
        except (OSError, ValueError):
            continue
