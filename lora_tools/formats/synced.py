"""Small files written, and files copied, so that they are on the disk once that is done."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lora_tools.formats.regular_files import open_file

_FICLONE = getattr(fcntl, "FICLONE", 0x40049409)  # named from Python 3.12 on


def sync_file(path: Path) -> None:
    """Sync a file that another library wrote."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and sync it."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def held_bytes(path: Path) -> int:
    """Bytes that a copy of a file takes: of a sparse one, those that are not in a hole."""
    with open_file(path) as file:
        return sum(end - begin for begin, end in _data(file.fileno()))


def _data(file: int) -> Iterator[tuple[int, int]]:
    """Where in an open file there is something, [begin, end) by [begin, end)."""
    size, end = os.fstat(file).st_size, 0
    while end < size:
        try:
            begin = os.lseek(file, end, os.SEEK_DATA)
            end = os.lseek(file, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno != errno.ENXIO:  # the file system knows no holes
                yield end, size
            return
        yield begin, end


def copy_synced(source: Path, target: Path) -> None:
    """Copy a file's contents (never its link or its permissions) and sync it.

    Where the file system can (btrfs, XFS), the copy is a reflink: it shares the blocks on the disk
    until one of the two changes. Else what is a hole in the source is one in the copy.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_file(source) as reader, target.open("xb") as writer:
        try:
            fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
        except OSError:  # the file system cannot, or source and target are not on the same one
            for begin, end in _data(reader.fileno()):
                reader.seek(begin)
                writer.seek(begin)
                while begin < end and (piece := reader.read(min(end - begin, 1 << 20))):
                    writer.write(piece)
                    begin += len(piece)
            writer.truncate(os.fstat(reader.fileno()).st_size)
        writer.flush()
        os.fsync(writer.fileno())
