"""What there is for this process: processors, and free memory. Both are what the machine has, and
no more than the limits of the control groups that the process is in (cgroup v2's ``cpu.max`` and
``memory.max``; v1's ``cpu.cfs_quota_us`` and ``memory.limit_in_bytes``).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MEMORY = Path("/proc/meminfo")


def processors() -> int:
    """At least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    quotas = list(_quotas(_ROOT, _MEMBERSHIP))
    return max(min([mine, *(math.ceil(quota) for quota in quotas)]), 1)


def free_memory() -> int:
    """Bytes that the process can take before other memory must go to the disk, pages of files that
    can be read again not counted; 0 where the system does not tell (Linux does)."""
    free = 0
    with contextlib.suppress(OSError, KeyError, ValueError):
        free = 1024 * _table(_MEMORY)["MemAvailable:"]
    return max(min([free, *_rooms(_ROOT, _MEMBERSHIP)]), 0)


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    """Processors that each limit above this process allows, where there is one."""
    for folder in _folders(root, membership, "cpu"):
        # What is not there, or not a number ("max"), is no limit.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())


def _rooms(root: Path, membership: Path) -> Iterator[int]:
    """Bytes that each limit above this process leaves free, where there is one."""
    names = (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    )
    for folder in _folders(root, membership, "memory"):
        for limit, used, prefix in names:
            with contextlib.suppress(OSError, KeyError, ValueError):
                room = int((folder / limit).read_text()) - int((folder / used).read_text())
                of_kind = _table(folder / "memory.stat")
                yield room + sum(of_kind[f"{prefix}{k}_file"] for k in ("active", "inactive"))


def _table(path: Path) -> dict[str, int]:
    """A file of lines that are a name, a whole number and perhaps a unit."""
    lines = path.read_text().splitlines()
    return {name: int(value) for name, value, *_ in map(str.split, lines)}


def _folders(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """The group's folder and those above it. Within a container its own group is the root."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = root / controller if controllers else root
            group = top / path.lstrip("/")
            yield from (group, *(p for p in group.parents if p == top or top in p.parents))
