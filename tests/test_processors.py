"""Threads follow the quota of a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_tools.engine import processors


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
    quotas = list(processors._quotas(tmp_path / "cgroup", tmp_path / "self"))
    monkeypatch.setattr(processors, "_quotas", lambda root, membership: iter(quotas))
    assert processors.available() == found


def test_the_first_version_of_groups(tmp_path: Path) -> None:
    folder = tmp_path / "cgroup" / "cpu" / "docker"
    folder.mkdir(parents=True)
    (folder / "cpu.cfs_quota_us").write_text("250000\n")
    (folder / "cpu.cfs_period_us").write_text("100000\n")
    (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "self").write_text("5:memory:/docker\n4:cpu,cpuacct:/docker\n")
    assert list(processors._quotas(tmp_path / "cgroup", tmp_path / "self")) == [2.5]


def test_where_there_are_no_groups(tmp_path: Path) -> None:
    assert list(processors._quotas(tmp_path, tmp_path / "no")) == []
    assert processors.available() >= 1
