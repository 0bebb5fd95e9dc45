"""Other machines: little memory, other processors, threads, seeds of hashes, and languages. Each
returns what was wrong, in words; nothing is well."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from tests import iotools
from tests.campaign.lines import command
from tests.campaign.moments import Ground

# --------------------------------------------------------------------- the same bytes everywhere

ELSEWHERE: dict[str, dict[str, str]] = {
    "two jobs": {"JOBS": "2"},
    "four threads": {"OMP_NUM_THREADS": "4", "JOBS": "3"},
    "hashes": {"PYTHONHASHSEED": "1"},
    "Turkish": {"LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "2", "TZ": "Asia/Tokyo"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "no AVX2": {"ATEN_CPU_CAPABILITY": "default"},
}


def elsewhere(place: Ground, here: Path, verb: str, what: str) -> list[str]:
    """A run in a new process that is told so."""
    env = {**os.environ, **ELSEWHERE[what]}
    line = [sys.executable, "-m", "lora_tools", *command(verb, place.top, here / "out")]
    done = subprocess.run(
        [*line, "-j", env.pop("JOBS", "1")], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return [f"{verb} with {what}: exit {done.returncode}: {done.stderr}"]
    found = iotools.tree(here / "out")
    shutil.rmtree(here / "out")
    other = sorted(
        n for n in found.keys() | place.made[verb].keys() if found.get(n) != place.made[verb].get(n)
    )
    return [f"{verb} with {what}: other bytes in {', '.join(other)}"] if other else []


# ---------------------------------------------------------------------------------- little memory


def large(top: Path, gigabytes: float) -> Path:
    """A base of that size, an adapter on it and all that the verbs read, in a folder that is
    there."""
    from lora_tools.cli import run

    width = 2048
    layers = max(int(gigabytes * 1e9 / (2 * 3 * width * width)), 1)
    tensors = _layers(layers, width)
    iotools.checkpoint(top / "base", tensors, shards=4)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[:8] += 0.5
    iotools.checkpoint(top / "tuned", tensors, shards=4)
    shapes = iotools.linear_shapes(tensors)
    iotools.adapter(top / "adapter", shapes, 8)
    shutil.copytree(top / "adapter", top / "second")
    iotools.graph(top / "graph", top / "base", tensors)
    del tensors
    merge = ["merge", str(top / "base"), str(top / "adapter"), "-o", str(top / "merged")]
    assert run([*merge, "--reversible", "-q"]) == 0
    assert run(["quantize", str(top / "base"), "-o", str(top / "packed"), "-q"]) == 0
    return top


def _layers(layers: int, width: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.randn(24, width, generator=noise).bfloat16()}
    for i in range(layers):
        for name, rows in (("q_proj", width), ("up_proj", 2 * width)):
            x = torch.empty(rows, width, dtype=torch.bfloat16).normal_(generator=noise)
            tensors[f"model.layers.{i}.{name}.weight"] = x
    return tensors


@contextlib.contextmanager
def cgroup(nbytes: int) -> Iterator[Path]:
    """A group of processes that have so much memory together, pages of files included.

    Raises:
        OSError: none can be made here.
    """
    top = Path("/sys/fs/cgroup")
    second = (top / "cgroup.controllers").exists()
    folder = (top if second else top / "memory") / f"loratools-campaign-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(nbytes))
        yield folder
    finally:
        folder.rmdir()


def in_little_memory(top: Path, here: Path, verb: str, nbytes: int) -> tuple[int, int, str]:
    """A run in such a group. Returns its exit code, the most memory it held that is of no file, and
    what it said."""
    line = [sys.executable, "-m", "lora_tools", *command(verb, top, here / "out")]
    with cgroup(nbytes) as group:
        run = subprocess.Popen(
            line, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )  # fmt: skip
        peak, ended = [0], threading.Event()
        watch = threading.Thread(target=_watch, args=(run.pid, peak, ended))
        watch.start()
        _, said = run.communicate()
        ended.set()
        watch.join()
    return run.returncode, peak[0], said


def _watch(pid: int, peak: list[int], ended: threading.Event) -> None:
    while not ended.wait(0.02):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            held = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
            peak[0] = max(peak[0], *held, 0)
