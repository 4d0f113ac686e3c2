from __future__ import annotations

import pytest

from pokestrator.claude import capacity

GB, MB = 2**30, 2**20

MEMINFO = "MemTotal:       16384 kB\nMemFree:         1024 kB\nMemAvailable:    8192 kB\n"


def test_cores_decide_where_memory_is_plenty() -> None:
    assert capacity.runs_for(4, [None], [64 * GB]) == 4


@pytest.mark.parametrize(("memory", "runs"), [(512 * MB, 2), (2 * GB, 8), (100 * MB, 1), (250 * MB, 1), (500 * MB, 2)])
def test_memory_bounds_the_runs_at_250_mb_each_but_one_always_runs(memory: int, runs: int) -> None:
    assert capacity.runs_for(16, [], [memory]) == runs


def test_the_tightest_limit_of_all_cgroups_counts() -> None:
    assert capacity.runs_for(16, [None, 8.0, 2.0], [None, 64 * GB, 4 * GB]) == 2
    assert capacity.runs_for(16, [None, 8.0, 4.0], [None, 64 * GB, 750 * MB]) == 3


def test_a_part_of_a_core_counts_as_a_core() -> None:
    assert capacity.runs_for(8, [0.5], [64 * GB]) == 1
    assert capacity.runs_for(8, [1.5], [64 * GB]) == 2


def test_an_instance_is_shared_by_its_workers_and_none_goes_without() -> None:
    assert [capacity.share(8, workers) for workers in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", None), ("200000 100000\n", 2.0), ("50000 100000", 0.5), ("150000", 1.5)]
)
def test_cgroup_v2_cpu_limits_are_read(text: str, cores: float | None) -> None:
    assert capacity.quota_v2(text) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1\n", None), ("300000\n", 3.0)])
def test_cgroup_v1_cpu_limits_are_read(quota: str, cores: float | None) -> None:
    assert capacity.quota_v1(quota, "100000\n") == cores


@pytest.mark.parametrize(
    ("text", "limit"), [("max\n", None), ("536870912\n", 512 * MB), ("9223372036854771712\n", None)]
)
def test_memory_limits_are_read_from_both_cgroup_versions(text: str, limit: int | None) -> None:
    assert capacity.limit_of(text) == limit


def test_available_memory_is_preferred_to_all_of_it() -> None:
    assert capacity.available_of(MEMINFO) == 8 * MB
    assert capacity.available_of("MemTotal:       16384 kB\n") == 16 * MB
    assert capacity.available_of("") is None


def test_a_cgroup_is_looked_up_with_all_its_parents() -> None:
    v2 = "0::/system.slice/web.service\n"
    v1 = "12:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n"
    assert [str(path) for path in capacity.cgroup_paths(v2, "")] == [
        "/system.slice/web.service",
        "/system.slice",
        "/",
    ]
    assert [str(path) for path in capacity.cgroup_paths(v1, "cpu")] == ["/docker/abc", "/docker", "/"]
    assert capacity.cgroup_paths(v1, "io") == []


def test_this_machine_can_run_something() -> None:
    alone = capacity.default_concurrency(1)
    assert alone >= 1
    assert capacity.default_concurrency(2) == capacity.share(alone, 2)
