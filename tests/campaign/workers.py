"""Damaged inputs on all processors: forks of one process that has imported everything, watched for
hangs and for memory, and begun anew where one is lost."""

from __future__ import annotations

import collections
import dataclasses
import json
import mmap
import os
import resource
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tests.campaign.doors import DOORS
from tests.campaign.fuzz import DONE, TRACEBACK, Bench

HANG, MEMORY = "hangs > 20 s", "> 1.5 GB"
_HANG = 20.0  # seconds of processor time for one input
_MEMORY = 1_500_000_000  # bytes, resident
_GUARD = 6_000_000_000  # bytes that a process may ask for, so that the machine stands
_WORDS = 2  # of each worker: the input that it is at, and the processor time at its start


@dataclasses.dataclass
class Tally:
    """What came of a door's inputs, by kind, and of what is a fault one example of each."""

    door: str
    inputs: int = 0
    checked: int = 0
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: list[str] = dataclasses.field(default_factory=list)


def deal(inputs: int, seed: int) -> Iterator[tuple[str, str]]:
    """(door, seed) of so many inputs, the doors in turn, those that take long less often."""
    dealt = dict.fromkeys(DOORS, 0.0)
    for _ in range(inputs):
        door = min(dealt, key=lambda name: dealt[name] / DOORS[name].share)
        dealt[door] += 1
        yield door, f"{seed} {door} {int(dealt[door])}"


class Pool:
    """Workers, each with its own part of the inputs and its own copy of the sound ones."""

    def __init__(
        self, sound: Path, here: Path, inputs: Sequence[tuple[str, str]], jobs: int
    ) -> None:
        self._sound, self._here, self._inputs, self._jobs = sound, here, inputs, jobs
        # The last says that all is to end. Each is written in one go: struct.pack_into writes zeros
        # first, which another process then reads.
        self._shared = memoryview(mmap.mmap(-1, 8 * (_WORDS * jobs + 1))).cast("d")
        self._pids: dict[int, int] = {}  # by process, which worker
        self.tallies = {door: Tally(door) for door in DOORS}

    def run(
        self, seconds: float | None = None, ending: threading.Event | None = None
    ) -> dict[str, Tally]:
        """All inputs, or those of so many seconds, or those until it is told to end."""
        end = time.monotonic() + seconds if seconds else float("inf")
        for worker in range(self._jobs):
            self._begin(worker, worker)
        while self._pids:
            time.sleep(0.2)
            if time.monotonic() > end or (ending is not None and ending.is_set()):
                self._shared[-1] = 1
            for pid in list(self._pids):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._ended(pid, status)
                elif (kind := self._fault(pid)) is not None:
                    self._lost(pid, kind)
        for worker in range(self._jobs):
            self._add(worker)
        return self.tallies

    def _begin(self, worker: int, first: int) -> None:
        if self._shared[-1]:
            return
        self._note(worker, first, float("inf"))
        pid = os.fork()
        if pid == 0:
            self._work(worker, first)
        self._pids[pid] = worker

    def _work(self, worker: int, first: int) -> NoReturn:
        """In the fork: input after input; what came of each is a line in a file."""
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # from a terminal: it says so to all
            resource.setrlimit(resource.RLIMIT_DATA, (_GUARD, _GUARD))
            bench = Bench(self._sound, self._here / str(worker))
            with (self._here / f"{worker}.log").open("a") as log:
                for number in range(first, len(self._inputs), self._jobs):
                    if self._shared[-1]:
                        break
                    door, seed = self._inputs[number]
                    self._note(worker, number, time.process_time())
                    outcome = bench.meet(door, seed)
                    fault = set(outcome.kinds) - {DONE, "refused"}
                    row = [
                        door,
                        seed,
                        outcome.kinds,
                        outcome.checked,
                        outcome.said if fault else "",
                    ]
                    print(json.dumps(row), file=log, flush=True)
                    if _peak() > _MEMORY:
                        print(json.dumps([door, seed, [MEMORY], False, ""]), file=log, flush=True)
                        status = 3
                        break
                else:
                    status = 0
                status = 0 if self._shared[-1] else status
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)

    def _note(self, worker: int, number: int, seconds: float) -> None:
        """Which input a worker is at. The time first: the next input's is never held for the old
        one's."""
        self._shared[_WORDS * worker + 1] = seconds
        self._shared[_WORDS * worker] = number

    def _fault(self, pid: int) -> str | None:
        """What a process is doing too long, or with too much."""
        begun = self._shared[_WORDS * self._pids[pid] + 1]
        if _seconds(pid) - begun > _HANG:
            return HANG
        return MEMORY if _resident(pid) > _MEMORY else None

    def _lost(self, pid: int, kind: str) -> None:
        """Note it, end the process and go on after that input."""
        worker = self._pids.pop(pid)
        number = int(self._shared[_WORDS * worker])
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        door, seed = self._inputs[number]
        with (self._here / f"{worker}.log").open("a") as log:
            print(json.dumps([door, seed, [kind], False, seed]), file=log)
        self._begin(worker, number + self._jobs)

    def _ended(self, pid: int, status: int) -> None:
        worker = self._pids[pid]
        number = int(self._shared[_WORDS * worker])
        if os.waitstatus_to_exitcode(status) == 3:
            del self._pids[pid]
            self._begin(worker, number + self._jobs)
        elif status:  # it died of this input
            with (self._here / f"{worker}.log").open("a") as log:
                row = [*self._inputs[number], [TRACEBACK], False, f"the process ended: {status}"]
                print(json.dumps(row), file=log)
            del self._pids[pid]
            self._begin(worker, number + self._jobs)
        else:
            del self._pids[pid]

    def _add(self, worker: int) -> None:
        for line in (self._here / f"{worker}.log").read_text().splitlines():
            door, seed, kinds, checked, said = json.loads(line)
            tally = self.tallies[door]
            tally.kinds.update(kinds)
            tally.inputs += kinds != [MEMORY]  # which is said besides what came of it
            tally.checked += checked
            if said:
                tally.faults.append(f"{seed}: {', '.join(kinds)}\n{said}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
