"""Work that is ended by SIGKILL and gone on with: of the command, of a share of it, of a worker of
a cluster. Each returns what was wrong, in words; nothing is well."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

from tests import forks, forkserver, iotools, killing
from tests.campaign.lines import VERBS, command, left_over
from tests.campaign.moments import Ground

KEPT = sorted(VERBS.keys() - {"export"})  # verbs whose work is gone on with
# However little was done, it is worth it.
_ALL_COUNTS = "import lora_tools.formats.ledger as ledger; ledger.WORTH = 1e-9\n"


def _run(*line: str) -> Any:
    return forks.run(*line, code=_ALL_COUNTS + forkserver.ENTRY)


def _wrong(place: Ground, verb: str, here: Path, done: Any) -> list[str]:
    out = here / "out"
    if done.returncode:
        return [f"exit {done.returncode}: {done.stderr}"]
    found = [] if iotools.tree(out) == place.made[verb] else ["wrong destination"]
    return found + [f"stray: {name}" for name in left_over(here, out)]


def caller(place: Ground, here: Path, r: random.Random) -> list[str]:
    """One command that is killed, up to three times in going on; then it comes to its end."""
    verb = r.choice([each for each in place.made if each in KEPT])
    line, killed = command(verb, place.top, here / "out"), list[int]()
    for _ in range(r.choice([1, 1, 2, 3])):
        step = r.randrange(1, place.steps[verb] + 1)
        done = killing.stopped(line, here, step, prelude=_ALL_COUNTS)
        if done.returncode != -signal.SIGKILL:
            break
        killed.append(step)
        line = command(verb, place.top, here / "out", "--resume")
    # What was killed once it stood in its place is replaced.
    done = _run(*command(verb, place.top, here / "out", "--resume", "--force"))
    return [f"{verb} at {killed}: {what}" for what in _wrong(place, verb, here, done)]


def share(place: Ground, here: Path, r: random.Random) -> list[str]:
    """One of three shares, or what completes them, is killed and started again."""
    verb = r.choice([each for each in place.made if each in KEPT])
    lines = [
        command(verb, place.top, here / "out", *words)
        for words in (("--shard", "1/3"), ("--shard", "2/3"), ("--shard", "3/3"), ("--finish",))
    ]
    which = r.randrange(len(lines))
    step = r.randrange(1, place.steps[verb] // 2)
    said = f"{verb} {' '.join(lines[which][-2:])} at {step}"
    for number, line in enumerate(lines):
        # Either has fewer steps than the whole.
        while number == which and killing.stopped(line, here, step).returncode == 0:
            if number == 3:
                return [f"{said}: not killed"]
            step = r.randrange(1, step)
        done = _run(*line, *(["--force"] if number == 3 and which == 3 else []))
        if done.returncode and number < 3:
            return [f"{said}: exit {done.returncode}: {done.stderr}"]
    if which == 3 and done.returncode == 2 and (here / "out").exists():
        done.returncode = 0  # it was complete when it was killed, and nothing was left to complete
    return [f"{said}: {what}" for what in _wrong(place, verb, here, done)]


def worker(place: Ground, here: Path, r: random.Random) -> list[str]:
    """One of two workers is killed after some of the results have come; the other does what it had.
    In the main thread only."""
    import distributed

    from lora_tools.cli import run
    from lora_tools.engine import dask

    verb = r.choice([each for each in place.made if each in KEPT])
    real, left = dask._Batch.made, r.randrange(4)

    def made(batch: Any) -> Any:
        nonlocal left
        if left == 0:
            os.kill(r.choice(sorted(client.run(os.getpid).values())), signal.SIGKILL)
        left -= 1
        return real(batch)

    handlers = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    with dask._local(2) as address, distributed.Client(address) as client:
        client.wait_for_workers(2, timeout=600)
        line = command(verb, place.top, here / "out", "--engine", address.replace("tcp", "dask"))
        dask._Batch.made = made  # type: ignore[method-assign]
        try:
            code = run(line)
        finally:
            dask._Batch.made = real  # type: ignore[method-assign]
            for each, handler in handlers.items():
                signal.signal(each, handler)
    if code or left >= 0:
        return [f"{verb}: exit {code}, {'no ' if left >= 0 else 'a '}worker killed"]
    same = iotools.tree(here / "out") == place.made[verb]
    return [] if same else [f"{verb}, its worker killed: wrong destination"]
