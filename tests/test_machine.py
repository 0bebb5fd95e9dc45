"""Threads and memory follow the limits of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_tools.engine import machine, threads


def group(folder: Path, quota: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.max").write_text(quota)


@pytest.mark.parametrize(
    ("own", "above", "found"),
    [
        ("150000 100000\n", "max 100000\n", 2),
        ("max 100000\n", "50000 100000\n", 1),
        ("300000 100000\n", "200000 100000\n", 2),
        ("max 100000\n", "max 100000\n", 64),
        ("nonsense", "", 64),
        ("1 0", "200000 100000", 2),
    ],
)
def test_the_least_quota_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, above: str, found: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    group(tmp_path / "cgroup", above)
    group(tmp_path / "cgroup" / "job" / "own", own)
    (tmp_path / "self").write_text("0::/job/own\n")
    quotas = list(machine._quotas(tmp_path / "cgroup", tmp_path / "self"))
    monkeypatch.setattr(machine, "_quotas", lambda root, membership: iter(quotas))
    assert machine.processors() == found


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup" / "cpu" / "docker"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("250000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "self").write_text("5:memory:/docker\n4:cpu,cpuacct:/docker\n")
    assert list(machine._quotas(tmp_path / "cgroup", tmp_path / "self")) == [2.5]


def test_where_there_are_no_groups(tmp_path: Path) -> None:
    assert list(machine._quotas(tmp_path, tmp_path / "no")) == []
    assert machine.processors() >= 1


STAT = "anon 700\nactive_file 20\ninactive_file 80\n"
FIRST = {
    "limit_in_bytes": "1000\n",
    "usage_in_bytes": "900\n",
    "stat": "total_active_file 5\ntotal_inactive_file 6\n",
}


@pytest.mark.parametrize(
    ("own", "above", "free"),
    [
        ({"max": "1000\n", "current": "900\n", "stat": STAT}, {}, 200),
        ({"max": "max\n", "current": "900\n", "stat": STAT}, {}, 4096),
        ({"max": "9000", "current": "1"}, {"max": "950", "current": "900", "stat": STAT}, 150),
        ({"max": "10", "current": "900", "stat": STAT}, {}, 0),
        (FIRST, {}, 111),
    ],
)
def test_free_memory_is_the_least_that_is_left(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, str],
    above: dict[str, str],
    free: int,
) -> None:
    for folder, files in ((tmp_path / "job" / "own", own), (tmp_path / "job", above)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / f"memory.{name}").write_text(text)
    (tmp_path / "self").write_text("0::/job/own\n")
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable:   4 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setattr(machine, "_MEMBERSHIP", tmp_path / "self")
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "meminfo")
    assert machine.free_memory() == free


def test_where_the_system_does_not_tell_nothing_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_MEMORY", tmp_path / "no")
    assert machine.free_memory() == 0


@pytest.mark.parametrize(
    ("sizes", "jobs", "free", "most"),
    [
        ([100, 100, 100], 2, 10_000, 200),
        ([100, 100, 100], 2, 600, 150),
        ([100, 100, 100], 2, 0, 125),
        ([100, 1, 1], 2, 0, 102),
        ([100, 90, 80], 3, 1040, 260),
        ([100, 90], 8, 10_000, 190),
        ([], 2, 10_000, 0),
    ],
)
def test_tasks_at_once_take_a_quarter_of_the_free_memory(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], jobs: int, free: int, most: int
) -> None:
    monkeypatch.setattr(threads, "free_memory", lambda: free)
    assert threads.most_at_once(sizes, jobs) == most
