"""How fast this machine is, as measured in a second, and how long work takes then.

What a tensor costs is counted in passes: the time that numpy takes to turn a number of bfloat16
into float32, to multiply, to add, and to turn it back. How many passes a kind of work comes to was
measured once, in processor time on 2 GB of weights in bfloat16 (``benchmarks/bench_estimate.py``),
so that an estimate follows the machine, and how busy it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# For each number that is changed, hashing, reading and writing it included.
COPY, CAST = 0.6, 1.3
MERGE, MERGE_REVERSIBLE, RESTORE, DEQUANTIZE, REQUANTIZE = 1.7, 16.0, 8.0, 2.1, 12.0
QUANTIZE = {"fp8-block": 4.5, "fp8-channel": 4.5, "nvfp4": 10.0}
QUANTIZE_OTHERS = 6.0
# To decompose to a rank is so much, and so much for each rank.
DECOMPOSE, DECOMPOSE_RANK = 10.0, 0.2
_START = 1.0  # seconds until torch is there
_SECONDS = 0.3  # of each measurement
_CHUNK = 4 << 20  # bytes at a time
_MOST = 256 << 20  # bytes that are written
_BLOCK = 1 << 20  # numbers at a time: in fewer, threads wait for the interpreter


@dataclasses.dataclass(frozen=True)
class Rates:
    """Bytes read and written, and passes, a second; passes of all threads together."""

    read: float
    write: float
    passes: float

    def seconds(self, read: int, written: int, passes: float) -> float:
        """How long work takes. What is written goes to the disk while more is worked on."""
        return _START + max(read / self.read + passes / self.passes, written / self.write)


def measure(files: Sequence[Path], folder: Path, jobs: int) -> Rates | None:
    """The rates at which this machine reads these files, writes into a folder, and computes on so
    many threads; None where it cannot read or write there. Without files, reading takes no time."""
    with contextlib.suppress(OSError):
        reading = _reading(files) if files else math.inf
        return Rates(reading, _writing(folder), _computing(jobs))
    return None


def _timed(steps: Iterator[int]) -> float:
    """What steps come to in a second, as far as they get in the time there is."""
    begun, done = time.perf_counter(), 0
    for each in steps:
        done += each
        if time.perf_counter() - begun > _SECONDS:
            break
    steps.close()  # type: ignore[attr-defined]  # a generator: its end is part of the work
    return max(done, 1) / (time.perf_counter() - begun)


def _reading(files: Sequence[Path]) -> float:
    """Pieces from all over the files, as a run would find them: in memory, or not."""

    def steps() -> Iterator[int]:
        places = [(p, at) for p in files for at in range(0, p.stat().st_size, _CHUNK)]
        apart = max(len(places) // 64, 1)
        for first in range(apart):
            for path, at in places[first::apart]:
                with path.open("rb", buffering=0) as file:
                    file.seek(at)
                    yield len(file.read(_CHUNK))

    return _timed(steps())


def _writing(folder: Path) -> float:
    """A file that has no name, and is gone whatever happens; its room is taken beforehand, as an
    output's is."""
    data = bytes(_CHUNK)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        with contextlib.suppress(OSError):  # a file system that cannot
            os.posix_fallocate(file.fileno(), 0, _MOST)

        def steps() -> Iterator[int]:
            try:
                for _ in range(_MOST // _CHUNK):
                    yield file.write(data)
            finally:
                os.fsync(file.fileno())

        return _timed(steps())


def _computing(jobs: int) -> float:
    rates: list[float] = []

    def compute() -> None:
        rates.append(_timed(_passes()))

    threads = [threading.Thread(target=compute) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates)


def _passes() -> Iterator[int]:
    import numpy as np

    stored = np.arange(_BLOCK, dtype=np.uint32).astype(np.uint16) & np.uint16(0x3FFF)  # small ones
    while True:
        for _ in range(4):
            wide = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
            wide = wide * np.float32(0.5) + np.float32(0.25)
            (wide.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        yield 4 * _BLOCK
