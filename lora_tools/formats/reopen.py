"""Files of tensors that another process can open as this one has: ``pickle`` sends their path."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from lora_tools.formats.regular_files import is_there, read_file
from lora_tools.watch.files import changed


@dataclasses.dataclass(frozen=True)
class Stamp:
    """By which a file is known again: its size in bytes, and when it was written."""

    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, file: Path | int) -> Stamp:
        """Of a path or an open file. Raises OSError."""
        found = os.stat(file)  # noqa: PTH116 - of a descriptor, too
        return cls(found.st_size, found.st_mtime_ns)


class Reopened:
    """A file that is pickled as its path, and opened anew where that is unpickled.

    Unpickling raises CheckpointError where the file is not the one that was opened: its offsets
    would be taken for another's.
    """

    path: Path
    header: bytes
    stamp: Stamp

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        known = self.stamp, xxhash.xxh3_128_hexdigest(self.header)
        return _reopen, (type(self), self.path.absolute(), *known)


def _reopen(kind: Callable[[Path], Reopened], path: Path, stamp: Stamp, header: str) -> Reopened:
    file = kind(path)
    if file.stamp != stamp or xxhash.xxh3_128_hexdigest(file.header) != header:
        raise changed(path)
    return file


@dataclasses.dataclass(frozen=True)
class SmallFile:
    """A small file that something was read from, such as a config.json: what was read is pickled,
    and unpickling raises CheckpointError where the file says something else by then.

    Attributes:
        digest: of its bytes; "" where there is none.
    """

    path: Path
    digest: str

    @classmethod
    def of(cls, path: Path) -> SmallFile:
        """As it lies there now."""
        there = is_there(path)
        return cls(path.absolute(), xxhash.xxh3_128_hexdigest(read_file(path)) if there else "")

    def __reduce__(self) -> tuple[Callable[..., SmallFile], tuple[Path, str]]:
        return _unchanged, (self.path, self.digest)


def _unchanged(path: Path, digest: str) -> SmallFile:
    file = SmallFile.of(path)
    if file.digest != digest:
        raise changed(path)
    return file
