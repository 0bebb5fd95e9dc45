"""Output that appears whole or not at all.

Everything is written into a staging folder beside the destination, synced, then renamed to where
nothing is, or with ``force`` in exchange for what is there. A staging folder is marked as one, and
held by an advisory lock while its process lives, so that one left behind by a kill is known, and
removed or gone on with by the next command that writes to the same place (``leftover``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_tools import interruption
from lora_tools.errors import ClusterError, LoraToolsError, OutputError, reason
from lora_tools.formats import kept, ledger
from lora_tools.formats.journal import (
    Moves,
    forget_journal,
    is_at,
    known,
    others,
    put,
    stands,
    write_journal,
)
from lora_tools.formats.leftover import Way, adopt, clear, stays
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.staging import OPENED, TRIES, discard, marker, put_back, some_name
from lora_tools.jobs import Job
from lora_tools.records import Report
from lora_tools.watch import files

_SPARE = 8  # descriptors that are kept for clearing away


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Something to be written, once its plan stands.

    Attributes:
        report: of the plan, as a dry run returns it.
        inputs: all that is read to write it, as found on the disk.
        nbytes: how much room it takes, at most.
        input_bytes: of the tensors that are read, each counted once.
        write: makes it at a path where nothing is, and returns the report of what was made.
        beside: suffixes of files that are written beside the output; ``dropped`` of those that
            belong to the one replaced.
        added: where only these files are put into the output, a folder that exists.
        pipeline: the sentence-transformers folder that the output is made as, where it is one.
        copied: small files that are copied into it, besides what ``nbytes`` counts.
        is_folder: whether a folder is made, whatever its name.
        card: what README.md is to hold, where it is restored.
        jobs: the work on the tensors, which ``write`` does; None where it depends on results.
        passes: what the work on a number that is changed comes to, in those of ``engine.rates``;
            None where that is not known beforehand.
    """

    report: Report[Any]
    inputs: tuple[Path, ...]
    nbytes: int
    input_bytes: int
    write: Callable[[Path], Report[Any]]
    beside: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    pipeline: Pipeline | None = None
    copied: tuple[Path, ...] = ()
    is_folder: bool = False
    card: bytes | None = None
    jobs: Callable[[], Iterator[Job]] | None = None
    passes: float | None = None


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


def check_destination(destination: Path, force: bool, way: Way = "refuse") -> None:
    """Refuse a destination that exists (without ``force``), or is a device or a pipe.

    What a killed command left beside it is cleared away first, or is what ``way`` says done with.

    Raises:
        OutputError: and nothing has been written.
        UsageError: there is work in what was left, and ``way`` does not say what becomes of it.
    """
    if destination.name in ("", ".."):
        raise OutputError(
            f"{destination} is not the name of a new file or folder; choose another output"
        )
    if not destination.parent.is_dir():
        raise OutputError(f"{destination.parent} is not a folder; create it first")
    try:
        there = destination.exists()
    except OSError as error:  # a name that is longer than any
        raise OutputError(f"{destination}: {error.strerror}; choose another output") from None
    if there and not (destination.is_file() or destination.is_dir()):
        raise OutputError(f"{destination} is neither a file nor a folder; choose another output")
    clear(destination, way)
    if is_at(destination) and not force:
        raise OutputError(f"{destination} already exists; choose another output or pass --force")
    if there and _is_mounted(destination):
        raise OutputError(
            f"{destination}: another file system is mounted there, so it cannot be replaced; name "
            "a new folder inside it"
        )


def _is_mounted(path: Path) -> bool:
    """Whether it is a mount point, be it of a file or of a folder of the same file system."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # another system
        return os.path.ismount(path)
    place = os.fsencode(real(path.parent) / path.name)
    place = re.sub(rb"[\\ \t\n]", lambda m: b"\\%03o" % m[0][0], place)
    return place in (line.split()[4] for line in lines)


def free_bytes(destination: Path) -> int | None:
    """What the file system has free; None where it has no size, such as /proc."""
    total, _, free = shutil.disk_usage(destination.parent)
    return free if total else None


def check_space(destination: Path, nbytes: int, held: int = 0) -> None:
    """Raises OutputError where the file system has less than ``nbytes`` free, besides those that
    are ``held`` for it."""
    free, nbytes = free_bytes(destination), max(nbytes - held, 0)
    if free is not None and free < nbytes:
        raise OutputError(
            f"{destination}: needs {nbytes:,} bytes, but {destination.parent} has only {free:,} "
            "free; free some space or choose another disk"
        )


@contextlib.contextmanager
def staged(destination: Path, *, force: bool = False, going_on: bool = False) -> Iterator[Path]:
    """A folder to write into. On success its one entry ``out`` (a file or a folder) becomes
    ``destination``; on any exception nothing remains, but where a ledger in it is worth a minute of
    work and the exception does not say that the work is of no use. An OSError comes out as an
    OutputError, and an error that names the folder names ``destination`` instead.

    Files beside ``out`` whose names begin with ``out.`` (a sidecar) are renamed alongside it,
    before it. So are the files in its folders ``beside``, which keep their names, and ``parts``,
    which only ``out`` refers to: these replace what is there without ``force``, too. After a kill
    among several the next command to the same place has all as it was; until then the new and the
    old never lie side by side with the old ``out`` where there are such folders: it is away.

    Args:
        force: take the place of what is there at the end; else it is an OutputError if something
            has appeared meanwhile, and that stays as it is.
        going_on: in the folder that runs before this one have left, where there is one.
    """
    course = interruption.current()
    staging = _Staging(destination, course)
    course.open(staging.settle)
    try:
        staging.make(going_on)
        with kept.within(staging.folder):
            yield staging.folder
        files.check()  # before anything takes the place of what was read
        course.go_on()
        staging.commit(force)
    except LoraToolsError as error:
        staging.is_of_use = isinstance(error, OSError | ClusterError)
        name_instead(error, staging.folder, destination)
        raise
    except OSError as error:
        raise failed(error, staging.folder, destination) from error
    finally:
        course.close(staging.settle)


def name_instead(error: LoraToolsError, folder: Path, destination: Path) -> None:
    """Have an error that names a hidden folder, or what is in it, name what was asked for."""
    hidden = re.escape(str(folder)) + r"(/\w+)?"
    text = re.sub(hidden, lambda _: str(destination), str(error))
    error.args = (text, *error.args[1:])


def failed(error: OSError, folder: Path, destination: Path) -> OutputError:
    """What an error of the system comes out as."""
    named = str(error.filename or folder)
    where = destination if named.startswith(str(folder)) else Path(named)
    return OutputError(f"{where}: {reason(error)}")


class _Staging:
    """One staging folder: made and held, its content put into its places, cleared away.

    Where each thing is can be told from its number on the disk alone, whenever a signal struck:
    what is put somewhere is noted before, and ``settle`` looks whether it is there.
    """

    def __init__(self, destination: Path, course: interruption.Course) -> None:
        self._destination, self._course = destination, course
        self.folder = some_name(destination)
        self._lock = -1
        self._hold = contextlib.ExitStack()  # what else is held for it
        self._spare: list[int] = []
        self._moves: Moves = {}
        self.is_of_use = True  # what was done, for another run

    def make(self, going_on: bool) -> None:
        """Make and hold it, or take one that was left. Raises OutputError where nothing can be
        written."""
        if going_on and (found := adopt(self._destination)) is not None:
            self.folder, self._lock, self._hold = found.folder, found.lock, found.hold
            return
        for _ in range(TRIES):
            try:
                self.folder.mkdir(mode=0o700)
            except OSError as error:
                where = self._destination.parent
                raise OutputError(f"{where}: cannot write there ({error.strerror})") from None
            if self._is_held():
                return
            self.folder = some_name(self._destination)
        raise OutputError(f"{self._destination}: another command is cleaning up there; try again")

    def _is_held(self) -> bool:
        """Lock and mark it. False where another command took it for a dead one's before that."""
        try:
            self._lock = os.open(self.folder, OPENED)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Clearing away opens folders, and may be needed since no more files can be opened.
            for _ in range(_SPARE):
                self._spare.append(os.dup(self._lock))
            (self.folder / marker(self._lock)).touch(0o600, exist_ok=False)
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
        mine = {made: self._place(made) for made in others(self.folder)} | {out: self._destination}
        if len(mine) > 1 or ledger.files(self.folder):
            write_journal(self.folder, mine)
            _sync(self.folder)
        alone = all(made.parent == self.folder for made in mine)
        if not alone and force and is_at(self._destination):
            self._destination.rename(self.folder / "old")
        for made, place in mine.items():
            self._moves[place] = made, known(made)
            try:
                put(made, place, force or made.parent.name == "parts")
            except FileExistsError:
                raise OutputError(
                    f"{place} appeared during this run and was not replaced; choose another output "
                    "or pass --force"
                ) from None
        _sync(self._destination.parent)

    def _place(self, made: Path) -> Path:
        name = made.name
        if made.parent == self.folder:
            name = self._destination.name + name.removeprefix("out")
        return self._destination.with_name(name)

    def settle(self) -> None:
        """Note what stands in its place, or else have all as it was, and remove the folder."""
        placed, known = stands(self._destination, self._moves), self._course.placed
        if placed and str(self._destination) not in known:
            known.append(str(self._destination))
        self._give_spare()
        if self._lock < 0:
            with contextlib.suppress(OSError):  # there is none, or it was not held
                self.folder.rmdir()
        elif not placed and (said := stays(self.folder, self._destination, self.is_of_use)):
            put_back(self.folder, self._destination, self._moves)
            forget_journal(self.folder)
            kept.keep(self.folder)
            self._course.kept.append(f"{self._destination}: {said}")
            self._let_go()
        else:
            discard(self.folder, self._destination, self._lock, self._moves)
            self._let_go()

    def _let_go(self) -> None:
        self._give_spare()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)
        self._hold.close()

    def _give_spare(self) -> None:
        while self._spare:
            os.close(self._spare.pop())


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
