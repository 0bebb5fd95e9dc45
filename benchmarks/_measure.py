"""Whole commands timed by the system's own accounting, peers in turn, medians and ratios."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """One run of a command: CPU seconds (user + system), wall seconds, peak memory in MiB."""

    cpu: float
    wall: float
    memory: float


def run(command: Sequence[str], env: dict[str, str] | None = None) -> Cost:
    """Run a command to its end; its output is thrown away unless it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\nfailed:\n{errors.decode()[-2000:]}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, usage.ru_maxrss / 1024)


def compare(
    ours: Callable[[], Cost], peer: Callable[[], Cost], runs: int, warmup: int = 1
) -> tuple[list[Cost], list[Cost]]:
    """Run the two in turn, so that a machine that slows down slows both."""
    for _ in range(warmup):
        ours(), peer()
    pairs = [(ours(), peer()) for _ in range(runs)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def table(title: str, name: str, ours: list[Cost], peer_name: str, peer: list[Cost]) -> str:
    """A Markdown table of medians, and of the ratios peer / ours pair by pair."""
    lines = [f"### {title}", "", "| | CPU s | wall s | peak MiB |", "|---|---|---|---|"]
    for label, costs in ((name, ours), (peer_name, peer)):
        cells = [
            f"{statistics.median(getattr(c, f) for c in costs):.{digits}f}"
            for f, digits in (("cpu", 2), ("wall", 2), ("memory", 0))
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    ratios = [
        statistics.median(getattr(b, f) / getattr(a, f) for a, b in zip(ours, peer, strict=True))
        for f in ("cpu", "wall", "memory")
    ]
    lines.append("| **ratio** | " + " | ".join(f"**{r:.1f}**" for r in ratios) + " |")
    return "\n".join(lines) + f"\n\n({len(ours)} runs each, in turn; medians.)\n"


def loratools() -> str:
    """The console script beside this interpreter."""
    path = Path(sys.executable).with_name("loratools")
    if not path.exists():
        sys.exit("install loratools into this environment first")
    return str(path)


def clean(path: Path) -> None:
    """Remove a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
