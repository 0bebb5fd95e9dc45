"""Output that appears whole or not at all.

Everything is written into a staging folder beside the destination, synced, then renamed. A staging
folder is held by an advisory lock while its process lives, so that one left behind by a kill is
recognised and removed by the next command that writes to the same place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_tools.errors import LoraToolsError, OutputError
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.regular_files import open_file
from lora_tools.records import Report

_MARK = ".loratools-"
_FICLONE = getattr(fcntl, "FICLONE", 0x40049409)  # named from Python 3.12 on


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Something to be written, once its plan stands.

    Attributes:
        report: of the plan, as a dry run returns it.
        inputs: all that is read to write it, as found on the disk.
        nbytes: how much room it takes, at most.
        write: makes it at a path where nothing is, and returns the report of what was made.
        beside: suffixes of files that are written beside the output; ``dropped`` of those that
            belong to the one replaced.
        added: where only these files are put into the output, a folder that exists.
        pipeline: the sentence-transformers folder that the output is made as, where it is one.
        copied: small files that are copied into it, besides what ``nbytes`` counts.
    """

    report: Report[Any]
    inputs: tuple[Path, ...]
    nbytes: int
    write: Callable[[Path], Report[Any]]
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    pipeline: Pipeline | None = None
    copied: tuple[Path, ...] = ()


def real(path: Path) -> Path:
    """Where a path leads, links followed; of links that lead in a circle, one of them."""
    return Path(os.path.realpath(path))


def overlap(one: Path, other: Path) -> bool:
    """Whether two paths are the same, or one lies inside the other, links followed."""
    a, b = real(one), real(other)
    return a == b or a in b.parents or b in a.parents


def refuse_overlap(output: Path, source: Path) -> None:
    """Raises OutputError for an output that is an input, lies inside one, or has one inside."""
    if overlap(output, source):
        raise OutputError(
            f"{output} is the input {source}, or one contains the other; the input is never "
            "modified: choose another output"
        )


def check_destination(destination: Path, force: bool) -> None:
    """Refuse a destination that exists (without ``force``), or is a device or a pipe.

    What a killed command left beside it is cleared away first.

    Raises:
        OutputError: and nothing has been written.
    """
    if destination.name in ("", ".."):
        raise OutputError(f"{destination} is no name for something new; choose another output")
    if not destination.parent.is_dir():
        raise OutputError(f"{destination.parent} is not a folder; create it first")
    if destination.exists() and not (destination.is_file() or destination.is_dir()):
        raise OutputError(f"{destination} is neither a file nor a folder; choose another output")
    _remove_stale(destination)
    if os.path.lexists(destination) and not force:
        raise OutputError(f"{destination} already exists; choose another output or pass --force")


def check_space(destination: Path, nbytes: int) -> None:
    """Raises OutputError where the file system has less than ``nbytes`` free."""
    total, _, free = shutil.disk_usage(destination.parent)
    if total and free < nbytes:  # a file system without a size, such as /proc, says nothing
        raise OutputError(
            f"{destination}: needs {nbytes:,} bytes and {destination.parent} has {free:,} free; "
            "free some space or choose another disk"
        )


@contextlib.contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A folder to write into. On success its one entry ``out`` (a file or a folder) becomes
    ``destination``; on any exception nothing remains. An OSError comes out as an OutputError, and
    an error that names the folder names ``destination`` instead.

    Files beside ``out`` whose names begin with ``out.`` (a sidecar) are renamed alongside it,
    before it.
    """
    staging = destination.with_name(f".{destination.name}{_MARK}{secrets.token_hex(4)}")
    lock = -1
    try:
        try:
            staging.mkdir(mode=0o700)
        except OSError as error:
            where = destination.parent
            raise OutputError(f"{where}: cannot write there ({error.strerror})") from None
        lock = os.open(staging, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield staging
        _commit(staging, destination)
    except LoraToolsError as error:
        hidden = re.escape(str(staging)) + r"(/\w+)?"  # what is made in it: nobody asked for that
        text = re.sub(hidden, lambda _: str(destination), str(error))
        error.args = (text, *error.args[1:])
        raise
    except OSError as error:
        named = str(error.filename or staging)
        where = destination if named.startswith(str(staging)) else Path(named)
        raise OutputError(f"{where}: {error.strerror or error}") from error
    finally:
        _discard(staging, destination)
        if lock >= 0:
            os.close(lock)


def _discard(staging: Path, destination: Path) -> None:
    """Remove a staging folder. An old destination that had stepped aside into it, and has no
    successor, comes back."""
    old = staging / "old"
    if os.path.lexists(old) and not os.path.lexists(destination):
        old.rename(destination)
    shutil.rmtree(staging, ignore_errors=True)


def _commit(staging: Path, destination: Path) -> None:
    out = staging / "out"
    for path in [out, *out.rglob("*")] if out.is_dir() else [out]:
        if path.is_dir():
            _sync(path)
    for extra in sorted(staging.glob("out.*")):
        extra.replace(destination.with_name(destination.name + extra.name.removeprefix("out")))
    if out.is_dir() or destination.is_dir():
        # A folder cannot be renamed over one that is not empty: the old one steps aside into the
        # staging folder first. If the new one does not take its place, _discard brings it back.
        if os.path.lexists(destination):
            destination.rename(staging / "old")
        out.rename(destination)
    else:
        out.replace(destination)
    _sync(destination.parent)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_stale(destination: Path) -> None:
    prefix = f".{destination.name}{_MARK}"
    for path in destination.parent.glob("*"):
        if not (path.name.startswith(prefix) and path.is_dir()):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process is alive
                _discard(path, destination)
            finally:
                os.close(lock)


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
