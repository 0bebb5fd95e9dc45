"""What it takes to carry a plan out: bytes, room, memory, and on this machine how long."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lora_tools.engine import rates
from lora_tools.engine.threads import PROGRAM, THREAD, default_jobs, most_at_once
from lora_tools.formats.output import Prepared, free_bytes
from lora_tools.jobs import Job
from lora_tools.options import Running
from lora_tools.records import Action, Report
from lora_tools.totals import TimedTotals
from lora_tools.watch.places import said_of

_WORTH = 1 << 30  # bytes read and written, below which a run takes seconds anyway

_BY_NETWORK = "the time does not include the network, over which the inputs are read"


def with_needs(prepared: Prepared, out: Path, nbytes: int, running: Running) -> Report[Any]:
    """The report of a plan, with what it takes to carry it out.

    Args:
        nbytes: the room on the disk.
    """
    needs: TimedTotals = {"input_bytes": prepared.input_bytes, "disk_needed": nbytes}
    free = free_bytes(out) if out.parent.is_dir() else None
    if free is not None:
        needs["disk_free"] = free
    notes: list[str] = []
    if prepared.jobs is not None:
        work, sizes = _Work(prepared.passes), []
        for job in prepared.jobs():
            work.add(job)
            sizes.append(job.peak_memory)
        threads = running.jobs or default_jobs()
        needs["output_bytes"] = work.written
        needs["peak_memory"] = most_at_once(sizes, running.jobs) + PROGRAM + THREAD * threads
        seconds = work.seconds(out, threads) if running.engine == "threads" else None
        if seconds is not None:
            needs["expected_seconds"] = seconds
            notes += [_BY_NETWORK] if work.is_elsewhere else []
    report = prepared.report
    totals = {**report.totals, **needs}
    return dataclasses.replace(report, totals=totals, notes=(*report.notes, *notes))


class _Work:
    """Sums over jobs; ``each``: passes for a number that is changed."""

    def __init__(self, each: float | None) -> None:
        self._each, self._passes = each, 0.0
        self._files: dict[str, None] = {}
        self.read = self.written = 0

    def add(self, job: Job) -> None:
        """One more."""
        self.read, self.written = self.read + job.bytes_read, self.written + job.bytes_written
        self._files.update((each.path, None) for each in job.inputs)
        each = self._each or 0.0
        if job.action in (Action.COPY, Action.SAVE_WHOLE_IF_CHANGED, Action.SKIP):
            each = rates.COPY if job.bytes_read >= job.bytes_written else rates.CAST
        self._passes += each * job.numbers

    @property
    def is_elsewhere(self) -> bool:
        """Whether something is read by its address."""
        return any(said_of(Path(file)) != file for file in self._files)

    def seconds(self, out: Path, threads: int) -> float | None:
        """Until all is done here; None where that is not known, or not worth a measurement."""
        if self._each is None or self.read + self.written < _WORTH or not out.parent.is_dir():
            return None
        files = [] if self.is_elsewhere else [Path(file) for file in self._files]
        found = rates.measure(files, out.parent, threads)
        return None if found is None else found.seconds(self.read, self.written, self._passes)
