"""``python -m tests.campaign``: as large as one likes, and one table of what came of it."""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

_MEMORY = Path("/dev/shm")
_ENDING = threading.Event()  # by a signal: what has begun is done, and the table printed
_COLUMNS = (
    "refused", "done", "checked", "tracebacks", "hangs > 20 s", "> 1.5 GB", "left on disk",
    "wrong content",
)  # fmt: skip
_OPTIONS: dict[str, tuple[dict[str, object], str]] = {
    "--inputs": ({"type": int, "default": 0}, "damaged files, over all doors"),
    "--door": ({"default": ""}, "of these, doors in whose name this is found"),
    "--seconds": ({"type": float}, "for the damaged files, at most"),
    "--bombs": ({"action": "store_true"}, "small files that stand for far too much"),
    "--kills": ({"type": int, "default": 0}, "runs that are killed or sent a signal"),
    "--resumes": ({"type": int, "default": 0}, "kills of each kind that are gone on from"),
    "--races": ({"type": int, "default": 0}, "for one destination, of two to four runs"),
    "--disks": ({"type": int, "default": 0, "metavar": "BYTES"},
        "disks of all sizes in steps of so many bytes, and bounds on a file"),
    "--elsewhere": ({"action": "store_true"},
        "the same bytes with other jobs, threads, hashes, languages, processors"),
    "--gigabytes": ({"type": float, "default": 0}, "of a checkpoint in little memory"),
    "--limit": ({"type": int, "default": 500, "metavar": "MB"}, "of that memory"),
    "--seed": ({"type": int, "default": 0}, "of everything"),
    "--jobs": ({"type": int, "default": os.cpu_count()}, "at a time"),
    "--here": ({"type": Path, "default": _MEMORY if _MEMORY.is_dir() else None},
        "a folder for all that is made [default: /dev/shm, where there is one]"),
    "--faults": ({"type": Path}, "a file for all that was wrong, in full"),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    for flag, (kind, text) in _OPTIONS.items():
        made.add_argument(flag, help=text, **kind)  # type: ignore[arg-type]
    return made


class Table:
    """Rows as they come, and what was wrong in a file."""

    def __init__(self, faults: Path | None) -> None:
        self._faults, self.wrong = faults, 0

    def row(self, what: str, count: int, figures: str, wrong: Iterable[str] = ()) -> None:
        said = list(wrong)
        self.wrong += len(said)
        print(f"{what:36} {count:8,}  {figures}", flush=True)
        for text in said:
            if self._faults:
                with self._faults.open("a") as file:
                    print(f"===== {what}: {text}", file=file)
            else:
                print(f"  {text}", file=sys.stderr)


def bombs(options: argparse.Namespace, here: Path, table: Table) -> None:
    import torch

    from tests.campaign import bombs as b
    from tests.campaign import sound
    from tests.forkserver import import_everything

    torch.set_num_threads(1)  # before a fork
    (here / "sound").mkdir()
    whole = sound.make(here / "sound")
    import_everything()
    every = {f"{number}": bomb for number, bomb in enumerate(b.bombs())}
    tried = list(until_told(every))
    wrong = [text for n in tried for text in b.meet(every[n], whole, here / n)]
    table.row("bombs", len(tried), f"{len(wrong)} wrong", wrong)


def until_told(items: Iterable[str]) -> Iterator[str]:
    """The items, until the campaign is told to end."""
    for item in items:
        if _ENDING.is_set():
            return
        yield item


def fuzz(options: argparse.Namespace, here: Path, table: Table) -> None:
    import torch

    from tests.campaign import sound
    from tests.campaign.fuzz import Bench
    from tests.campaign.workers import Pool, deal
    from tests.forkserver import import_everything

    torch.set_num_threads(1)
    (here / "sound").mkdir()
    whole = sound.make(here / "sound")
    import_everything()
    Bench(whole, here / "warm").warm()
    dealt = [pair for pair in deal(options.inputs, options.seed) if options.door in pair[0]]
    tallies = Pool(whole, here, dealt, options.jobs).run(options.seconds, _ENDING)
    print(f"{'damaged files of':36} {'inputs':>8}  " + "  ".join(_COLUMNS))
    total: collections.Counter[str] = collections.Counter()
    for t in tallies.values():
        found = t.kinds + collections.Counter(checked=t.checked, inputs=t.inputs)
        total += found
        table.row(t.door, t.inputs, _figures(found), t.faults)
    table.row("all doors", total["inputs"], _figures(total))


def _figures(found: collections.Counter[str]) -> str:
    return "  ".join(f"{found[column]:{len(column)},}" for column in _COLUMNS)


def over(
    count: int, jobs: int, here: Path, one: Callable[[Path, random.Random], list[str]], seed: str
) -> tuple[int, list[str]]:
    """So many times, each in a folder of its own, ``jobs`` at a time; 0: in this thread. Returns
    how many there were, and what was wrong."""
    tried = []

    def each(number: int) -> list[str]:
        if _ENDING.is_set():
            return []
        tried.append(number)
        folder = here / str(number)
        folder.mkdir(parents=True)
        wrong = one(folder, random.Random(f"{seed} {number}"))
        shutil.rmtree(folder)
        return [f"{number}: {text}" for text in wrong]

    with ThreadPoolExecutor(max(jobs, 1)) as pool:
        found = pool.map(each, range(count)) if jobs else map(each, range(count))
        wrong = [text for texts in found for text in texts]
    return len(tried), wrong


def moments(options: argparse.Namespace, here: Path, table: Table) -> None:
    from tests import iotools
    from tests.campaign import machines
    from tests.campaign import moments as m

    top = here / "ground"
    top.mkdir()
    place = m.ground(top)
    for what, count, one in (
        ("kills and signals", options.kills, m.kill),
        ("races", options.races, m.race),
    ):
        if count:
            seed = f"{options.seed} {what}"
            count, wrong = over(
                count, options.jobs, here / what, lambda f, r, o=one: o(place, f, r), seed
            )
            table.row(what, count, f"{len(wrong)} wrong", wrong)
    if options.resumes:
        _resumes(options, here, place, table)
    if options.disks:
        _disks(options.disks, here, place, table)
    if options.elsewhere:
        for what in until_told(machines.ELSEWHERE):
            wrong = [w for verb in m.VERBS for w in machines.elsewhere(place, here, verb, what)]
            table.row(f"elsewhere: {what}", len(m.VERBS), f"{len(wrong)} with other bytes", wrong)
    if iotools.tree(place.top) != place.inputs:
        table.row("inputs that changed", 1, "", ["an input was written to"])


def _resumes(options: argparse.Namespace, here: Path, place: object, table: Table) -> None:
    """Commands, shares and workers that are killed, and what goes on with their work."""
    from tests.campaign import moments as m
    from tests.campaign import resumption

    assert isinstance(place, m.Ground)
    kinds = {
        "killed and resumed": resumption.caller,
        "a share killed, then finished": resumption.share,
        "a Dask worker killed": resumption.worker,
    }
    for what, one in kinds.items():
        jobs = 0 if one is resumption.worker else options.jobs  # it runs in this very process
        seed = f"{options.seed} {what}"
        count, wrong = over(
            options.resumes, jobs, here / what, lambda f, r, o=one: o(place, f, r), seed
        )
        table.row(what, count, f"{len(wrong)} wrong", wrong)


def _disks(step: int, here: Path, place: object, table: Table) -> None:
    """Each verb on disks, and with a limit on files, from one step on until it has room."""
    from tests.campaign import moments as m

    assert isinstance(place, m.Ground)
    for what, try_, where in (
        ("files that may not be longer", m.short_file, None),
        ("full disks", m.full_disk, m.small_disk),
    ):
        folder, count, wrong = here / what, 0, []
        folder.mkdir()
        try:
            with where(folder) if where else tempfile.TemporaryDirectory(dir=here):
                for verb in m.VERBS:
                    enough, size = False, 0
                    while not (enough or _ENDING.is_set()):
                        size, count = size + step, count + 1
                        enough, said = try_(place, folder, verb, size)
                        wrong += said
        except OSError as error:
            print(f"{what}: not tried ({error})")
            continue
        table.row(what, count, f"{len(wrong)} wrong", wrong)


def memory(options: argparse.Namespace, here: Path, table: Table) -> None:
    from tests.campaign import machines
    from tests.campaign.lines import VERBS

    if here.is_relative_to(_MEMORY):
        sys.exit("--gigabytes wants --here on a disk: files in memory count as memory")
    top = machines.large(here, options.gigabytes)
    for verb in until_told(VERBS):
        begun = time.monotonic()
        code, peak, said = machines.in_little_memory(top, here, verb, options.limit << 20)
        wrong = [f"exit {code}: {said}"] if code else []
        figures = (
            f"exit {code}, at most {peak / 1e6:.0f} MB of no file, {time.monotonic() - begun:.0f} s"
        )
        table.row(f"{options.gigabytes:g} GB in {options.limit} MB: {verb}", 1, figures, wrong)
        for left in (here / "out", *here.glob(".out.loratools-*")):  # which a killed run keeps
            shutil.rmtree(left, ignore_errors=True)


def main() -> int:
    options = parser().parse_args()
    table = Table(options.faults)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _ENDING.set())
    with tempfile.TemporaryDirectory(prefix="campaign-", dir=options.here) as folder:
        for wanted, part in (
            (options.inputs, fuzz),
            (options.bombs, bombs),
            (
                options.kills
                or options.resumes
                or options.races
                or options.disks
                or options.elsewhere,
                moments,
            ),
            (options.gigabytes, memory),
        ):
            if wanted and not _ENDING.is_set():
                here = Path(folder, part.__name__)
                here.mkdir()
                part(options, here, table)
    print(f"{table.wrong} faults, seed {options.seed}")
    return int(table.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
