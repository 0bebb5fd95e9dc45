"""Output that appears whole or not at all.

Everything is written into a staging folder beside the destination, synced, then renamed to where
nothing is, or with ``force`` in exchange for what is there. A staging folder is marked as one, and
held by an advisory lock while its process lives, so that one left behind by a kill is known and
removed by the next command that writes to the same place.
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
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_tools import interruption
from lora_tools.errors import LoraToolsError, OutputError
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.regular_files import open_file
from lora_tools.formats.renames import exchange, put_new
from lora_tools.records import Report

_MARK = ".loratools-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
_TRIES = 5
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
def staged(destination: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder to write into. On success its one entry ``out`` (a file or a folder) becomes
    ``destination``; on any exception nothing remains. An OSError comes out as an OutputError, and
    an error that names the folder names ``destination`` instead.

    Files beside ``out`` whose names begin with ``out.`` (a sidecar) are renamed alongside it,
    before it.

    Args:
        force: take the place of what is there at the end; else it is an OutputError if something
            has appeared meanwhile, and that stays as it is.
    """
    course = interruption.current()
    staging = _Staging(destination, course.placed)
    course.open(staging.settle)
    try:
        staging.make()
        yield staging.folder
        course.go_on()
        staging.commit(force)
    except LoraToolsError as error:
        hidden = re.escape(str(staging.folder)) + r"(/\w+)?"  # made in it: nobody asked for that
        text = re.sub(hidden, lambda _: str(destination), str(error))
        error.args = (text, *error.args[1:])
        raise
    except OSError as error:
        named = str(error.filename or staging.folder)
        where = destination if named.startswith(str(staging.folder)) else Path(named)
        raise OutputError(f"{where}: {error.strerror or error}") from error
    finally:
        course.close(staging.settle)


class _Staging:
    """One staging folder: made and held, its content put into its places, cleared away.

    Where each thing is can be told from its number on the disk alone, whenever a signal struck:
    what is put somewhere is noted before, and ``settle`` looks whether it is there.
    """

    def __init__(self, destination: Path, placed: list[str]) -> None:
        self._destination, self._placed = destination, placed
        self.folder = _some_name(destination)
        self._lock = -1
        self._moves: dict[Path, tuple[Path, os.stat_result]] = {}  # by place

    def make(self) -> None:
        """Make and hold it. Raises OutputError where nothing can be written."""
        for _ in range(_TRIES):
            try:
                self.folder.mkdir(mode=0o700)
            except OSError as error:
                where = self._destination.parent
                raise OutputError(f"{where}: cannot write there ({error.strerror})") from None
            if self._hold():
                return
            self.folder = _some_name(self._destination)
        raise OutputError(f"{self._destination}: another command clears away what is begun there")

    def _hold(self) -> bool:
        """Lock and mark it. False where another command took it for a dead one's before that."""
        try:
            self._lock = os.open(self.folder, _FOLDER)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (self.folder / _marker(self._lock)).touch(0o600, exist_ok=False)
            return os.path.samestat(os.lstat(self.folder), os.fstat(self._lock))
        except (FileNotFoundError, BlockingIOError):
            self._let_go()
            return False

    def commit(self, force: bool) -> None:
        """Put all that was made into its place; ``out`` is last.

        Raises:
            OutputError: something is there, and not to be replaced.
        """
        out = self.folder / "out"
        for path in [out, *out.rglob("*")] if out.is_dir() else [out]:
            if path.is_dir():
                _sync(path)
        for made in (*sorted(self.folder.glob("out.*")), out):
            name = self._destination.name + made.name.removeprefix("out")
            place = self._destination.with_name(name)
            self._moves[place] = made, os.lstat(made)
            try:
                _put(made, place, force)
            except FileExistsError:
                raise OutputError(
                    f"{place} appeared while this ran, and stays as it is; choose another output "
                    "or pass --force"
                ) from None
        _sync(self._destination.parent)

    def settle(self) -> None:
        """Note what stands in its place, or else have all as it was, and remove the folder."""
        if self._stands(self._destination):
            if str(self._destination) not in self._placed:
                self._placed.append(str(self._destination))
        else:
            for place, (made, found) in self._moves.items():
                if not self._stands(place):
                    continue
                if os.path.lexists(made) and not os.path.samestat(os.lstat(made), found):
                    made.replace(place)  # it was exchanged for this
                else:
                    place.unlink()
        if self._lock >= 0:
            _discard(self.folder, self._destination, self._lock)
            self._let_go()
        else:
            with contextlib.suppress(OSError):  # there is none, or it was not held
                self.folder.rmdir()

    def _let_go(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _stands(self, place: Path) -> bool:
        if place not in self._moves or not os.path.lexists(place):
            return False
        return os.path.samestat(self._moves[place][1], os.lstat(place))


def _some_name(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}{_MARK}{secrets.token_hex(4)}")


def _put(made: Path, place: Path, force: bool) -> None:
    """Rename to where nothing is, or with ``force`` in exchange for what is there."""
    while True:
        try:
            return put_new(made, place)
        except FileExistsError:
            if not force:
                raise
        try:
            if exchange(made, place):
                return None
            break
        except FileNotFoundError:  # gone meanwhile
            continue
    if made.name == "out" and not made.is_dir() and not place.is_dir():
        made.replace(place)
    else:
        # A folder cannot be renamed over one that is not empty, and a sidecar may have to come
        # back: the old one steps aside into the staging folder. If the new one does not take its
        # place, or the main one does not, _discard brings it back.
        place.rename(made.with_name("old" + made.name.removeprefix("out")))
        put_new(made, place)
    return None


def _discard(staging: Path, destination: Path, lock: int) -> None:
    """Remove a staging folder that is open as ``lock`` and marked as one. What is old, had stepped
    aside into it, and has no successor comes back."""
    if not _is_ours(lock):
        with contextlib.suppress(OSError):  # killed before it was marked: then it is empty
            staging.rmdir()
        return
    for old in (*staging.glob("old.*"), staging / "old"):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            put_new(old, destination.with_name(destination.name + old.name.removeprefix("old")))
    mark = staging / _marker(lock)
    for _ in range(_TRIES):  # a thread that was not waited for may make another file
        with contextlib.suppress(OSError):
            for path in [path for path in staging.iterdir() if path != mark]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            mark.unlink(missing_ok=True)  # last: a kill leaves nothing that has no mark
            staging.rmdir()
            return


def _marker(folder: int) -> str:
    """The file that marks an open folder as a staging folder: a copy of one has another number."""
    return f"{_MARK[1:]}{os.fstat(folder).st_ino}"


def _is_ours(folder: int) -> bool:
    """Whether an open folder is a staging folder, made by this user."""
    try:
        mark = os.stat(_marker(folder), dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return stat.S_ISREG(mark.st_mode) and os.fstat(folder).st_uid == mark.st_uid == os.geteuid()


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_stale(destination: Path) -> None:
    """Remove what dead commands have left of their staging folders: of exactly such a name, real
    folders, this user's, marked."""
    name = re.compile(re.escape(f".{destination.name}{_MARK}") + "[0-9a-f]{8}")
    for path in destination.parent.glob("*"):
        if not name.fullmatch(path.name):
            continue
        with contextlib.suppress(OSError):  # gone meanwhile, no folder, or another user's
            lock = os.open(path, _FOLDER)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if its process is alive
                if os.fstat(lock).st_uid == os.geteuid():
                    _discard(path, destination, lock)
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
