"""Moments that are not chosen: kills and signals at random times and steps, disks that are full,
runs that race for one destination. Each returns what was wrong, in words; nothing is well."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from tests import forks, forkserver, iotools, killing
from tests.campaign.lines import VERBS, command, inputs, left_over

_SIGNALS = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@dataclasses.dataclass
class Ground:
    """All that the verbs read, what each of them makes of it, and in how many steps and seconds."""

    top: Path
    inputs: dict[str, str]
    made: dict[str, dict[str, str]]
    steps: dict[str, int]
    seconds: dict[str, float]


def ground(folder: Path, verbs: Iterable[str] | None = None) -> Ground:
    """Made once, in a folder that is there, for these verbs (all)."""
    top = folder / "inputs"
    top.mkdir()
    inputs(top, width=64, layers=2, shards=2)
    found = Ground(top, iotools.tree(top), {}, {}, {})
    for verb in verbs or VERBS:
        here = folder / verb
        here.mkdir()
        line = command(verb, top, here / "out")
        found.steps[verb] = len(killing.steps(line, here, folder / "log"))
        found.made[verb] = iotools.tree(here / "out")
        shutil.rmtree(here / "out")
        begun = time.monotonic()
        assert forks.run(*line).returncode == 0
        found.seconds[verb] = time.monotonic() - begun
        shutil.rmtree(here)
    return found


# ------------------------------------------------------------------------------------------ kills


def kill(place: Ground, here: Path, r: random.Random) -> list[str]:
    """One run that is killed, or sent a signal; then another that is not."""
    verb, number, force = r.choice(list(place.made)), r.choice(_SIGNALS), r.random() < 0.4
    out = here / "out"
    flags = ["--force"] if force else []
    if force:
        assert forks.run(*command(verb, place.top, out)).returncode == 0
        (out / "of the old one").write_text("the old one")
    line = command(verb, place.top, out, *flags)
    if r.random() < 0.5:
        step = r.randrange(1, place.steps[verb] + 1)
        done, when = killing.stopped(line, here, step, number), f"step {step}"
    else:
        after = r.random() * place.seconds[verb] * 1.2
        done, when = _stopped_after(line, after, number), f"{after:.3f} s"
    old = (out / "of the old one").exists()
    wrong = _words(done, out, old) if number != signal.SIGKILL else []
    if out.exists() and not old and iotools.tree(out) != place.made[verb]:
        wrong.append("wrong destination")
    if force and not out.exists():
        wrong.append("wrong destination: the old one is gone")
    again = forks.run(*command(verb, place.top, out, "--force"))
    if again.returncode or iotools.tree(out) != place.made[verb]:
        wrong.append(f"the next run: {again.returncode} {again.stderr}")
    if left := left_over(here, out):
        wrong.append(f"strays after the next run: {left}")
    return [f"{verb} {' '.join(flags)} {number.name} at {when}: {what}" for what in wrong]


def _stopped_after(
    line: Sequence[str], seconds: float, number: signal.Signals
) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryFile("w+") as said:
        run = forks.Run(line, stderr=said)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            run.send_signal(number)
        code = run.wait()
        said.seek(0)
        return subprocess.CompletedProcess(list(line), code, "", said.read())


def _words(done: subprocess.CompletedProcess[str], out: Path, old: bool) -> list[str]:
    """What a command that was sent a signal says must be so."""
    stands = out.exists() and not old
    if "in become\n" in done.stderr and "lora_tools" not in done.stderr:
        return ["it was written before it began"] if stands else []  # the fork had not got there
    code = -done.returncode + 128 if done.returncode < 0 else done.returncode
    if code == 0:
        return [] if stands else ["false words: done, and nothing is there"]
    if code not in (130, 143):
        return [f"false words: exit {done.returncode}: {done.stderr}"]
    if done.returncode < 0 and not done.stderr:  # before Python could say anything
        return ["false words: none, and it was written"] if stands else []
    wanted = str(out) if stands else "nothing"
    return [] if f"; {wanted} was written." in done.stderr else [f"false words: {done.stderr}"]


# ----------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of its own in memory. Raises OSError where none can be mounted."""
    folder.mkdir(exist_ok=True)
    line = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    try:
        subprocess.run(line, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OSError(f"no file system can be mounted: {error}") from None
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# The check before the work is left out, so that the disk is full in the middle of it; or no file
# may be longer than so much.
_NO_CHECK = """
import lora_tools.verbs.writing as writing
writing.check_space = lambda *given: None
"""
_LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))
"""


def full_disk(place: Ground, disk: Path, verb: str, size: int) -> tuple[bool, list[str]]:
    """A run on a disk of so many bytes. Returns whether it was enough, and what was wrong."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)
    return _short(place, verb, disk / "out", _NO_CHECK, f"a disk of {size:,} bytes")


def short_file(place: Ground, here: Path, verb: str, size: int) -> tuple[bool, list[str]]:
    """A run in which no file may be longer. Returns whether it was enough, and what was wrong."""
    return _short(place, verb, here / "out", _LIMIT.format(size), f"files of {size:,} bytes")


def _short(place: Ground, verb: str, out: Path, prelude: str, where: str) -> tuple[bool, list[str]]:
    done = forks.run(*command(verb, place.top, out), code=prelude + forkserver.ENTRY)
    wrong = []
    if done.returncode == 0:
        if iotools.tree(out) != place.made[verb]:
            wrong.append("wrong destination")
        shutil.rmtree(out)
    else:
        if done.returncode != 1 or not done.stderr.startswith("Error: "):
            wrong.append(f"exit {done.returncode}: {done.stderr}")
        if done.stderr.count("\n") != 1:
            wrong.append(f"not one line: {done.stderr}")
    wrong += [f"left: {name}" for name in left_over(out.parent, out.with_name("none"))]
    return done.returncode == 0, [f"{verb} with {where}: {what}" for what in wrong]


# ----------------------------------------------------------------------------------------- races

# All wait for each other right before their output would appear.
_TOGETHER = """
import json, os, sys, time
import lora_tools.formats.output as output
given = json.loads(sys.argv.pop(1))
commit = output._Staging.commit
def together(self, force):
    open(os.path.join(given["here"], str(os.getpid())), "w").close()
    while len(os.listdir(given["here"])) < given["count"]:
        time.sleep(0.001)
    commit(self, force)
if given["here"]:
    output._Staging.commit = together
"""


def race(place: Ground, here: Path, r: random.Random) -> list[str]:
    """Runs of several verbs for one destination, begun at once; some meet at the end."""
    verbs = [r.choice(list(place.made)) for _ in range(r.choice([2, 3, 4]))]
    force, out, meet = r.random() < 0.3, here / "out", here.with_name(f"{here.name}-meeting")
    meet.mkdir()
    given = json.dumps({"here": str(meet) if r.random() < 0.6 else "", "count": len(verbs)})
    flags = ["--force"] if force else []
    with contextlib.ExitStack() as stack:
        said: list[IO[str]] = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in verbs]
        runs = [
            forks.Run(
                [given, *command(verb, place.top, out, *flags)],
                code=_TOGETHER + forkserver.ENTRY,
                stderr=each,
            )
            for verb, each in zip(verbs, said, strict=True)
        ]
        codes = [run.wait() for run in runs]
        for each in said:
            each.seek(0)
        texts = [each.read() for each in said]
    wrong = []
    winners = [verb for verb, code in zip(verbs, codes, strict=True) if code == 0]
    if not winners or (len(winners) != 1 and not force):
        wrong.append(f"{len(winners)} winners")
    if not any(iotools.tree(out) == place.made[verb] for verb in winners):
        wrong.append("the bytes are no winner's")
    for code, text in zip(codes, texts, strict=True):
        lost = code == 1 and text.startswith("Error: ") and text.count("\n") == 1
        if not (code == 0 or lost):
            wrong.append(f"exit {code}: {text}")
    if left := left_over(here, out):
        wrong.append(f"strays: {left}")
    shutil.rmtree(meet)
    return [f"{verbs} {given} {flags}: {what}" for what in wrong]
