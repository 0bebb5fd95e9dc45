"""What a run that was ended has left beside its destination: removed, refused, or gone on with.

Its staging folder holds files that are partly written, and a ledger of what it has done. Where that
is worth less than a minute of work, nobody is asked.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Literal

from lora_tools.errors import UsageError
from lora_tools.formats import kept, ledger, shared_staging
from lora_tools.formats.journal import forget_journal, read_journal, stands
from lora_tools.formats.staging import PLAN, Adopted, discard, is_ours, put_back, remove_all, stale

Way = Literal["refuse", "resume", "clean", "share", "finish"]
_WAYS = "--resume continues it, --clean deletes it and starts again"


def clear(destination: Path, way: Way) -> None:
    """Remove what dead commands have left, unless there is work in it to go on with.

    Raises:
        UsageError: it is worth more than a minute, or was made by shards, and ``way`` does not say
            what is to become of it.
    """
    _clear_shared(destination, way)
    for folder, lock in stale(destination):
        seconds = _worth(folder, destination, lock)
        if way == "clean" or seconds < (_ANY if way == "resume" else ledger.WORTH):
            discard(folder, destination, lock)
            continue
        put_back(folder, destination)
        forget_journal(folder)
        if way != "resume":
            raise UsageError(f"{destination}: an interrupted run has left {said(folder)}; {_WAYS}")


_ANY = 1e-9  # seconds


def _clear_shared(destination: Path, way: Way) -> None:
    """The same for what shards have left. Raises UsageError, OutputError."""
    folder = shared_staging.place(destination)
    if not folder.is_dir():
        return
    is_done = not (folder / PLAN).exists() or stands(destination, read_journal(folder, destination))
    if way == "refuse" and not is_done:
        shared_staging.refuse(destination)
    elif way == "clean" or (is_done and way != "share"):
        found = shared_staging.take_over(destination)
        if found is not None:
            with found.hold:
                discard(folder, destination, found.lock)
                os.close(found.lock)


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


def stays(folder: Path, destination: Path, is_of_use: bool) -> str:
    """What is said of the folder of a run that ends here before its time, where it is to stay; else
    nothing. What shards have made stays."""
    worth_it = is_of_use and ledger.worth(folder) >= ledger.WORTH
    if not worth_it and folder != shared_staging.place(destination):
        return ""
    return f"{said(folder)} is kept; {_WAYS}"


def reusable(destination: Path) -> int:
    """Bytes on the disk that a run which goes on need not ask for."""
    left = [folder for folder, _ in stale(destination)]
    return sum(map(kept.held_bytes, [*left, shared_staging.place(destination)]))


def adopt(destination: Path) -> Adopted | None:
    """The staging folder of shards, or else the one in which most was done, held and with nothing
    in it but what can be used again; others are removed. None where there is none.

    Raises:
        OutputError: shards of it are being made.
    """
    shared = shared_staging.take_over(destination)
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
        if shared is not None or best is None or folder != best[1]:
            discard(folder, destination, lock)
            continue
        found = Adopted(folder, os.dup(lock), contextlib.ExitStack())  # which holds it, too
        _put_together(found, destination)
    if shared is not None:
        found = shared
        _put_together(found, destination)
    return found


def _put_together(found: Adopted, destination: Path) -> None:
    """Have nothing in a folder but what can be used again, and that in its place."""
    folder = found.folder
    put_back(folder, destination)
    kept.keep(folder)
    mine = {*ledger.files(folder), *shared_staging.files(folder), folder / kept.FOLDER}
    remove_all(folder, [path for path in folder.iterdir() if path not in mine], found.lock)
