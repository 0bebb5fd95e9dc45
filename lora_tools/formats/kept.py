"""Files that a run which was ended has left, for the one that goes on with its work.

A writer that is about to make a file takes up the one that lies in its place among them: what is in
it need not be written again, once its digests say that it is there (``engine.memo``).
"""

from __future__ import annotations

import contextvars
from contextlib import AbstractContextManager
from pathlib import Path

from lora_tools.within import holding

FOLDER = "kept"  # in the staging folder
_SUFFIX = ".safetensors"
_staging: contextvars.ContextVar[Path | None] = contextvars.ContextVar("staging", default=None)


def within(staging: Path) -> AbstractContextManager[None]:
    """Files that are made in that folder take up what is kept in it."""
    return holding(_staging, staging)


def take_up(path: Path) -> bool:
    """Put what is kept of that file into its place. False where nothing is."""
    staging = _staging.get()
    if staging is None or staging not in path.parents:
        return False
    kept = staging / FOLDER / path.relative_to(staging)
    if not kept.is_file() or path.exists():
        return False
    kept.rename(path)
    return True


def keep(staging: Path) -> None:
    """Put all files of tensors in a staging folder among those that are kept."""
    kept = staging / FOLDER
    for path in _files(staging):
        if kept in path.parents:
            continue
        place = kept / path.relative_to(staging)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def held_bytes(staging: Path) -> int:
    """Room on the disk that files of tensors in a staging folder take."""
    return sum(path.stat().st_blocks * 512 for path in _files(staging))


def _files(staging: Path) -> list[Path]:
    found = [staging / "out", staging / FOLDER / "out", *staging.rglob(f"*{_SUFFIX}")]
    return [path for path in found if path.is_file() and not path.is_symlink()]
