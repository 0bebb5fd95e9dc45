"""Runs that die, or are interrupted, at a step of our choosing: a change of the file system."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import forks

# Before each change below a folder it counts one step; at the step given it sends itself a signal,
# in the middle of a write where the step is one. With a file to log to, it notes each step's kind.
_CODE = r"""
import json, os, sys, threading
from lora_tools.cli import run
top, at, number, log = json.loads(sys.argv.pop(1))
notes = open(log, "w") if log else None
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate"}
lock, count = threading.Lock(), 0

def step(what, path, before=lambda: None):
    global count
    path = os.fspath(path) if isinstance(path, str | os.PathLike) else os.readlink(
        f"/proc/self/fd/{path}")
    if not path.startswith(top):
        return
    with lock:
        count += 1
        if notes:
            print(what, path.removeprefix(top), file=notes, flush=True)
        if count != at:
            return
    before()
    os.kill(os.getpid(), number)

def hook(event, values):
    if event == "open":
        path, _, flags = values
        if isinstance(path, str | os.PathLike) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            step("open", path)
    elif event in CHANGES:
        step(event, values[0])

def watched(name, half=False):
    real = getattr(os, name)
    def call(fd, *rest):
        step(name, fd, lambda: half and real(fd, rest[0][: len(rest[0]) // 2], rest[1]))
        return real(fd, *rest)
    setattr(os, name, call)

watched("pwrite", half=True)
watched("fsync")
watched("posix_fallocate")
sys.addaudithook(hook)
code = run(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""


# Steps of which there is one a tensor: the first and the last of each kind say it all.
DATA = ("pwrite", "fsync", "posix_fallocate")


def stopped(
    command: Sequence[str],
    top: Path,
    step: int,
    number: signal.Signals = signal.SIGKILL,
    log: Path | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[str]:
    """Run a command until that many-th step below ``top``, counted from 1, and send it a signal
    there; at step 0 it is left alone. The options: ``imports`` of ``forks.run``, and a ``prelude``
    of code."""
    given = json.dumps([str(top), step, int(number), log and str(log)])
    return forks.run(given, *command, code=options.pop("prelude", "") + _CODE, **options)


def steps(command: Sequence[str], top: Path, log: Path, **options: Any) -> list[str]:
    """Run a command to its end, which must be well. Returns the kind of each of its steps below
    ``top``: what is done, and to which file, without what differs from run to run."""
    done = stopped(command, top, 0, log=log, **options)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    log.unlink()
    return [re.sub(r"loratools-\w+|\d+", "#", line) for line in lines]


def mark(folder: Path) -> None:
    """Have a folder pass for the staging folder of a command that was killed."""
    (folder / f"loratools-{folder.stat().st_ino}").touch()


def telling(kinds: Sequence[str]) -> list[int]:
    """The numbers of the steps after which things may stand differently: every step that is about
    a name, and of those that are about data the first and the last of each kind."""
    return [
        i + 1
        for i, kind in enumerate(kinds)
        if not kind.startswith(DATA) or kind not in kinds[:i] or kind not in kinds[i + 1 :]
    ]


def some(kinds: Sequence[str], told: Sequence[int], seed: str, part: int) -> list[int]:
    """One in so many of those steps, others for another seed, and all of them from the first one
    on that gives a file or a folder its name."""
    named = next(i for i, kind in enumerate(kinds) if kind.startswith("os.rename"))
    first = random.Random(seed).randrange(part)
    return [step for i, step in enumerate(told) if i % part == first or step > named]
