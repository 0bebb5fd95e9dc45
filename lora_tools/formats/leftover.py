"""What a run that was ended has left beside its destination: removed, refused, or gone on with.

Its staging folder holds files that are partly written, and a ledger of what it has done. Where that
is worth less than a minute of work, nobody is asked.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from lora_tools.errors import UsageError
from lora_tools.formats import kept, ledger
from lora_tools.formats.journal import forget_journal, read_journal, stands
from lora_tools.formats.staging import discard, is_ours, put_back, remove_all, stale

Way = Literal["refuse", "resume", "clean"]
_WAYS = "--resume goes on with it, --clean removes it and begins anew"


def clear(destination: Path, way: Way) -> None:
    """Remove what dead commands have left, unless there is work in it to go on with.

    Raises:
        UsageError: it is worth more than a minute, and ``way`` says neither what is to become of
            it.
    """
    for folder, lock in stale(destination):
        seconds = _worth(folder, destination, lock)
        if way == "clean" or seconds < (ledger.WORTH if way == "refuse" else _ANY):
            discard(folder, destination, lock)
            continue
        put_back(folder, destination)
        forget_journal(folder)
        if way == "refuse":
            raise UsageError(
                f"{destination}: a run that was ended has left {said(folder)}; {_WAYS}"
            )


_ANY = 1e-9  # seconds


def _worth(folder: Path, destination: Path, lock: int) -> float:
    """Seconds of work in a folder that is held; 0 where its output is complete."""
    if not is_ours(lock) or stands(destination, read_journal(folder, destination)):
        return 0.0
    return ledger.worth(folder)


def said(folder: Path) -> str:
    """How much there is, in words."""
    seconds, nbytes = ledger.worth(folder), kept.held_bytes(folder)
    minutes = round(seconds / 60)
    took = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    took = took if minutes else f"{seconds:.0f} s"
    return f"work of {took} ({_size(nbytes)})"


def _size(nbytes: int) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {name}"
    return f"{nbytes / 1e3:.1f} kB"


def stays(folder: Path) -> str:
    """What is said of the folder of a run that ends here before its time, where it is to stay; else
    nothing."""
    if ledger.worth(folder) < ledger.WORTH:
        return ""
    return f"{said(folder)} is kept; {_WAYS}"


def reusable(destination: Path) -> int:
    """Bytes on the disk that a run which goes on need not ask for."""
    return sum(kept.held_bytes(folder) for folder, _ in stale(destination))


def adopt(destination: Path) -> tuple[Path, int] | None:
    """The staging folder in which most was done, held and with nothing in it but what can be used
    again; others are removed. None where there is none."""
    best = max(
        (
            (seconds, folder)
            for folder, lock in stale(destination)
            if (seconds := _worth(folder, destination, lock))
        ),
        default=None,
    )
    found = None
    for folder, lock in stale(destination):
        if best is None or folder != best[1]:
            discard(folder, destination, lock)
            continue
        put_back(folder, destination)
        kept.keep(folder)
        mine = {*ledger.files(folder), folder / kept.FOLDER}
        remove_all(folder, [path for path in folder.iterdir() if path not in mine], lock)
        found = folder, os.dup(lock)  # which holds it, too
    return found
