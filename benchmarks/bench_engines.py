"""What the plan and Dask cost, against threads, and how much memory a worker takes.

    python benchmarks/bench_engines.py [FOLDER] [--layers 18] [--runs 3]

Each verb runs on the model of 2 GB that ``bench_estimate.py`` makes (or finds) in FOLDER: on two
threads, on them with the plan written, and on two workers of Dask, in turn. What it takes to start
is that of a model of eight tiny tensors; so "more" is what the work itself takes more, in the
median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from benchmarks._measure import clean
from benchmarks.bench_estimate import command, prepared

SMALL = "merge tiny.safetensors --dtype float16"
WORDS = (SMALL, "merge base adapter", "quantize base", "extract base tuned --rank 16")
WAYS = {
    "threads": ("--jobs", "2"),
    "threads, with a plan": ("--jobs", "2", "--plan", "plan.json"),
    "Dask": ("--engine", "dask", "--workers", "2"),
}


@dataclass(frozen=True)
class Cost:
    """Seconds of the command and of its workers; MiB of it, and of the largest worker."""

    cpu: float
    wall: float
    memory: float
    worker: float


def run(line: list[str], folder: Path) -> Cost:
    """One command to its end. Memory is that of no file, looked at fifty times a second."""
    begun, peaks, ended = time.perf_counter(), dict[int, float](), threading.Event()
    process = subprocess.Popen(line, cwd=folder, stdout=subprocess.DEVNULL)

    def look() -> None:
        top = psutil.Process(process.pid)
        while not ended.wait(0.02):
            for pid in [top.pid, *(each.pid for each in top.children(recursive=True))]:
                peaks[pid] = max(peaks.get(pid, 0.0), anonymous(pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    wall = time.perf_counter() - begun
    ended.set()
    watcher.join()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(line)}: exit {process.returncode}")
    own, others = peaks.pop(process.pid), max(peaks.values(), default=0.0)
    return Cost(usage.ru_utime + usage.ru_stime, wall, own, others)


def anonymous(pid: int) -> float:
    """MiB that a process holds of no file; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def costs(folder: Path, words: str, runs: int) -> dict[str, Cost]:
    """Of each way, the medians; in turn, so that a machine that slows down slows all."""
    found: dict[str, list[Cost]] = {way: [] for way in WAYS}
    for _ in range(runs):
        for way, more in WAYS.items():
            clean(folder / "out")
            clean(folder / "plan.json")
            line = command(folder, words, "-o", str(folder / "out"), "-q", *more)
            found[way].append(run(line, folder))
    clean(folder / "out")
    return {
        way: Cost(
            *(statistics.median(getattr(c, f) for c in each) for f in Cost.__dataclass_fields__)
        )
        for way, each in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--verb", choices=[words.split()[0] for words in WORDS[1:]])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = prepared((args.folder or Path(scratch)).resolve(), args.layers)
        tiny(folder / "tiny.safetensors")
        print("| | engine | CPU s | more | wall s | more | MiB | MiB of a worker |")
        print("|---|---|---|---|---|---|---|---|")
        start: dict[str, Cost] = {}
        for words in (
            SMALL,
            *(w for w in WORDS[1:] if w.split()[0] == (args.verb or w.split()[0])),
        ):
            found = costs(folder, words, args.runs)
            start = start or found
            for way, cost in found.items():
                cells = [f"`{words}`" if words != SMALL else "start", way]
                for kind in ("cpu", "wall"):
                    spent, least = getattr(cost, kind), getattr(found["threads"], kind)
                    work = spent - getattr(start[way], kind)
                    plain = least - getattr(start["threads"], kind)
                    more = f"{work / plain - 1:+.0%}" if plain and way != "threads" else ""
                    cells += [f"{spent:.1f}", more]
                cells += [f"{cost.memory:.0f}", f"{cost.worker:.0f}" if cost.worker else ""]
                print(f"| {' | '.join(cells)} |", flush=True)


def tiny(path: Path) -> None:
    """A model of so few numbers, of which each worker has some."""
    import torch
    from safetensors.torch import save_file

    save_file({f"layers.{i}.weight": torch.ones(4, 4) for i in range(8)}, path)


if __name__ == "__main__":
    main()
