"""Staging folders: how they are called, by what they are known, and how they are cleared away.

A command holds ``flock`` on its own staging folder while it lives, and the kernel lets go of it
when it dies. The package filelock would need a file beside each output for that, which stays there
or is removed while another command waits for it. Where a file system has no ``flock``, it takes the
mere existence of that file for a lock, which a killed command would leave behind. No two commands
share a staging folder: each has a name of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from lora_tools.formats import ledger
from lora_tools.formats.journal import Moves, read_journal, take_back
from lora_tools.formats.renames import put_new

_MARK = ".loratools-"
OPENED = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
TRIES = 5
PLAN = "plan.json"  # what several processes share; without it a folder is not taken for theirs
_LONG = 230  # bytes of a name that a staging folder's can hold; 255 is the most of any


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A staging folder that was left: its path, its descriptor, and what lets go of all else that
    is held for it."""

    folder: Path
    lock: int
    hold: contextlib.ExitStack


def some_name(destination: Path) -> Path:
    """A name for a new one, beside the destination."""
    return destination.with_name(prefix(destination.name) + secrets.token_hex(4))


def prefix(name: str) -> str:
    """What the names of staging folders begin with; of a long name it has the first letters."""
    encoded = os.fsencode(name)
    if len(encoded) > _LONG:
        known = hashlib.sha256(encoded).hexdigest()[:16]
        name = f"{encoded[: _LONG - 17].decode(errors='ignore')}~{known}"
    return f".{name}{_MARK}"


def put_back(staging: Path, destination: Path, moves: Moves | None = None) -> None:
    """Have all as it was before the end of a run that came not to its end: what is old, had stepped
    aside into its staging folder, and has no successor comes back.

    Args:
        moves: what was put; by default what its journal says.
    """
    take_back(destination, read_journal(staging, destination) if moves is None else moves)
    for old in (*staging.glob("old.*"), *staging.glob("aside/*"), staging / "old"):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            named = old.name if old.parent != staging else destination.name + old.name[len("old") :]
            put_new(old, destination.with_name(named))


def discard(staging: Path, destination: Path, lock: int, moves: Moves | None = None) -> None:
    """Remove a staging folder that is open as ``lock`` and marked as one, once all is put back."""
    if not is_ours(lock):
        with contextlib.suppress(OSError):  # killed before it was marked: then it is empty
            staging.rmdir()
        return
    put_back(staging, destination, moves)
    for _ in range(TRIES):  # a thread that was not waited for may make another file
        with contextlib.suppress(OSError):
            first = [staging / PLAN, *ledger.files(staging)]
            remove_all(staging, [*first, *staging.iterdir()], lock)
            (staging / marker(lock)).unlink(missing_ok=True)  # last: a kill leaves none without
            staging.rmdir()
            return


def remove_all(staging: Path, paths: Iterable[Path], lock: int) -> None:
    """Remove these from a staging folder, in their order, but what marks it."""
    for path in paths:
        if path.name == marker(lock):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def marker(folder: int) -> str:
    """The file that marks an open folder as a staging folder: a copy of one has another number."""
    return f"{_MARK[1:]}{os.fstat(folder).st_ino}"


def is_ours(folder: int) -> bool:
    """Whether an open folder is a staging folder, made by this user."""
    try:
        mark = os.stat(marker(folder), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(mark.st_mode) and os.fstat(folder).st_uid == mark.st_uid == os.geteuid()


def stale(destination: Path) -> Iterator[tuple[Path, int]]:
    """What dead commands have left of their staging folders, each held while it is looked at: of
    exactly such a name, real folders, this user's."""
    name = re.compile(re.escape(prefix(destination.name)) + "[0-9a-f]{8}")
    for path in destination.parent.glob("*"):
        if not name.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, no folder, or another user's
            lock = os.open(path, OPENED)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process is alive
                if os.fstat(lock).st_uid == os.geteuid():
                    yield path, lock
            finally:
                os.close(lock)
