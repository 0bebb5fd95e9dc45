"""How many processors there are for this process: those it may run on, and no more than what the
quota of its control group (cgroup v2's ``cpu.max``, v1's ``cpu.cfs_quota_us``) comes to."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def available() -> int:
    """At least 1."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    quotas = list(_quotas(_ROOT, Path("/proc/self/cgroup")))
    return max(min([mine, *(math.ceil(quota) for quota in quotas)]), 1)


def _quotas(root: Path, membership: Path) -> Iterator[float]:
    """Processors that each limit above this process allows, where there is one."""
    for folder in _folders(root, membership):
        # What is not there, or not a number ("max"), is no limit.
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text().split()
            yield int(quota) / int(period)
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota = (folder / "cpu.cfs_quota_us").read_text()
            if int(quota) > 0:
                yield int(quota) / int((folder / "cpu.cfs_period_us").read_text())


def _folders(root: Path, membership: Path) -> Iterator[Path]:
    """The group's folder and those above it. Within a container its own group is the root."""
    with contextlib.suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            top = root / "cpu" if controllers else root
            group = top / path.lstrip("/")
            yield from (group, *(p for p in group.parents if p == top or top in p.parents))
