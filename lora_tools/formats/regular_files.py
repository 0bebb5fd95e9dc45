"""Files that a folder holds, opened for what they are.

A name in a folder may be a link to nothing, a pipe or a device. What is there and cannot be read is
an error, never taken for absent; what waits or never ends is not opened; and a small file is read
up to a bound.
"""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from lora_tools.errors import CheckpointError, LoraToolsError, UnsafeInput

_PIECE = 1 << 24  # bytes read at a time
MOST = 100_000_000  # bytes of a small file that is read: as the header of a safetensors file
MOST_OF_GRAPH = 2**31 - 1  # of a graph: protobuf's own limit
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_there(path: Path, fail: type[LoraToolsError] = CheckpointError) -> bool:
    """Whether a file is there.

    Raises:
        fail: something is that is no file, or leads to none.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - Path.stat says as much
    except (FileNotFoundError, NotADirectoryError):
        refuse_dangling(path, fail)
        return False
    except OSError as error:
        raise fail(f"{path}: {error.strerror or error}") from None
    _refuse_kind(path, mode, fail)
    return True


def refuse_dangling(path: Path, fail: type[LoraToolsError] = CheckpointError) -> None:
    """Raises ``fail`` for a link that leads to where nothing is."""
    if os.path.islink(path) and not os.path.exists(path):  # noqa: PTH110, PTH114 - Path's raise on an overlong name
        raise fail(
            f"{path}: a link to {os.readlink(path)}, "  # noqa: PTH115
            "which does not exist; put the file itself there"
        ) from None


def open_file(path: Path, fail: type[LoraToolsError] = CheckpointError) -> io.BufferedReader:
    """A file, open for reading.

    Raises:
        fail: it is a folder, what waits or never ends (a pipe, a device), or a link to nothing.
        OSError: as ``open`` does.
    """
    try:
        mode = os.stat(path).st_mode  # noqa: PTH116 - opening a device may do things
    except FileNotFoundError:
        refuse_dangling(path, fail)
        raise
    _refuse_kind(path, mode, fail)
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_kind(path, os.fstat(number).st_mode, fail)
        return io.BufferedReader(io.FileIO(number))
    except BaseException:
        os.close(number)
        raise


def read_file(path: Path, fail: type[LoraToolsError] = CheckpointError, most: int = MOST) -> bytes:
    """What a small file holds.

    Raises:
        fail: it is no file, cannot be read, or holds more than ``most`` bytes.
    """
    try:
        with open_file(path, fail) as file:
            size = os.fstat(file.fileno()).st_size
            data = _start_of(file, most + 1) if size <= most else b""  # /proc tells no size
    except OSError as error:
        if isinstance(error, fail):
            raise
        raise fail(f"{path}: {error.strerror or error}") from None
    if size > most or len(data) > most:
        raise fail(f"{path}: {max(size, len(data)):,} bytes; at most {most:,} are read of it")
    return data


def _start_of(file: io.BufferedReader, most: int) -> bytes:
    """Up to so many bytes. ``read`` would take memory for all of them, whatever there is."""
    pieces: list[bytes] = []
    while most and (piece := file.read(min(most, _PIECE))):
        pieces.append(piece)
        most -= len(piece)
    return b"".join(pieces)


def refuse_outside(path: Path, folder: Path) -> None:
    """A file of a folder whose contents are to be copied out of it.

    Links are followed inside the folder, and from a snapshot of the hub's cache into the ``blobs``
    of its repository.

    Raises:
        UnsafeInput: it is a link that leads elsewhere.
    """
    target = path.resolve()
    root = folder.resolve()
    blobs = [
        parent.parent / "blobs"
        for parent in root.parents
        if parent.name == "snapshots" and parent.parent.name.startswith("models--")
    ]
    if not any(place in target.parents for place in (root, *blobs)):
        raise UnsafeInput(
            f"{path}: a link out of its folder, to {target}, so that file would be copied; put the "
            "file itself there (cp -L), or remove the link"
        )


def _refuse_kind(path: Path, mode: int, fail: type[LoraToolsError]) -> None:
    if not stat.S_ISREG(mode):
        raise fail(f"{path}: {_KINDS.get(stat.S_IFMT(mode), 'something')}, not a file")
