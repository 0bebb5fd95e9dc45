"""Files that a run which was ended has left, for the one that goes on with its work.

A writer that is about to make a file takes up the one that lies in its place among them: what is in
it need not be written again, once its digests say that it is there (``engine.memo``).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from lora_tools.watch import files
from lora_tools.within import holding

FOLDER = "kept"  # in the staging folder
_SUFFIX = ".safetensors"


@dataclasses.dataclass(frozen=True)
class _Place:
    staging: Path
    shared: Path | None


_place: contextvars.ContextVar[_Place | None] = contextvars.ContextVar("place", default=None)


@contextlib.contextmanager
def within(staging: Path, shared: Path | None = None) -> Iterator[None]:
    """Files that are made in that folder take up what is kept in it.

    Args:
        shared: where several processes at a time write into the files of one checkpoint.
    """
    with holding(_place, _Place(staging, shared)), files.own(staging):
        yield


def shared_place(path: Path) -> Path | None:
    """Where several processes write into what was to be made there; None where this one makes it
    alone."""
    place = _place.get()
    if place is None or place.shared is None or place.staging not in path.parents:
        return None
    return place.shared / path.relative_to(place.staging)


def take_up(path: Path) -> bool:
    """Put what is kept of that file into its place. False where nothing is."""
    place = _place.get()
    if place is None or place.staging not in path.parents:
        return False
    kept = place.staging / FOLDER / path.relative_to(place.staging)
    if not kept.is_file() or path.exists():
        return False
    kept.rename(path)
    return True


def keep(staging: Path) -> None:
    """Put all files of tensors in a staging folder among those that are kept."""
    for path in loose(staging):
        place = staging / FOLDER / path.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def loose(staging: Path) -> list[Path]:
    """The files of tensors in a staging folder that are not among those."""
    return [path for path in _files(staging) if staging / FOLDER not in path.parents]


def held_bytes(staging: Path) -> int:
    """Room on the disk that files of tensors in a staging folder take."""
    return sum(path.lstat().st_blocks * 512 for path in _files(staging))


def _files(staging: Path) -> list[Path]:
    walked = os.walk(staging)  # passes over folders that other processes remove meanwhile
    tensors = [
        Path(folder, name)
        for folder, _, names in walked
        for name in names
        if name.endswith(_SUFFIX)
    ]
    found = [staging / "out", staging / FOLDER / "out", *tensors]
    return [path for path in found if path.is_file() and not path.is_symlink()]
