"""The staging folder that the processes of one job share, such as those of an array of jobs.

In it lie the files that all of them write into, a ledger of each, what they are shares of, and a
file for each that is locked while its process lives. A lock on a file that is open for writing
holds on network file systems as well, where one on a folder does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from lora_tools import interruption
from lora_tools.errors import OutputError, UsageError
from lora_tools.formats import kept
from lora_tools.formats.renames import put_new
from lora_tools.formats.reopen import Stamp
from lora_tools.formats.staging import OPENED, PLAN, Adopted, is_ours, marker, prefix, remove_all
from lora_tools.watch.places import said_of

_SHARD, _OWN = "shard.", "own-"
_READ = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".json", ".sidecar"}
_WORDS = ("the command", "the version")
_REMOVE = "delete it to start again"


@dataclasses.dataclass(frozen=True)
class Job:
    """What is shared out, so that no process takes part in another's.

    Attributes:
        said: what must be the same for all of them, by what it is called.
        count: how many shares there are; None: as many as the others say.
    """

    said: Mapping[str, str]
    count: int | None = None


def job_of(command: str, versions: Sequence[str], inputs: Sequence[Path], count: int | None) -> Job:
    """A command's work, shared out among so many."""
    files = {said_of(file.absolute()): file for path in inputs for file in _files(path)}
    stamps = {name: Stamp.of(file) for name, file in sorted(files.items())}
    return Job(
        {
            **dict(zip(_WORDS, (command, " ".join(versions)), strict=True)),
            **{name: f"{each.nbytes:,} bytes of {each.mtime_ns}" for name, each in stamps.items()},
        },
        count,
    )


def _files(path: Path) -> list[Path]:
    """What is read of an input, and of its folders."""
    if path.is_file():
        return [path]
    found = [*path.glob("*"), *path.glob("*/*")]
    return [file for file in found if file.suffix in _READ and file.is_file()]


def place(destination: Path) -> Path:
    """Where the folder lies, if there is one."""
    return destination.with_name(f"{prefix(destination.name)}shards")


def check(destination: Path, job: Job) -> int:
    """How many shares there are of what is to be completed.

    Raises:
        UsageError: there are none, or of another job.
    """
    folder = place(destination)
    try:
        there = json.loads((folder / PLAN).read_bytes())
    except FileNotFoundError:
        raise UsageError(
            f"{destination}: --finish needs the work of --shard 1/N to N/N, and there is none; "
            "start them first"
        ) from None
    _compare(folder, there, job)
    count: int = there["shards"]
    return count


def _compare(folder: Path, there: Mapping[str, object], job: Job) -> None:
    """Raises UsageError where the shares that are there are others than these."""
    if job.count is not None and there["shards"] != job.count:
        raise UsageError(
            f"--shard …/{job.count}: {folder} has {there['shards']} shards; give --shard "
            f"I/{there['shards']}, or {_REMOVE}"
        )
    said = there["said"]
    assert isinstance(said, dict)
    for what in (*job.said, *said):
        before, now = said.get(what), job.said.get(what)
        if before != now:
            if before is None or now is None or what not in _WORDS:
                raise UsageError(
                    f"{what} has changed since the shards in {folder} were made; {_REMOVE}"
                )
            raise UsageError(
                f"the shards in {folder} are of other work: {what} was {before}, and is {now}; use "
                f"the same, or {_REMOVE}"
            )


def refuse(destination: Path) -> NoReturn:
    """Raises UsageError, for a command that does nothing with the shares that are there."""
    raise UsageError(
        f"{destination}: shards of it are in {place(destination)}; --shard and --finish continue "
        "with them, --resume does the rest here, --clean deletes them and starts again"
    )


def take_over(destination: Path) -> Adopted | None:
    """The folder, held as a staging folder is, and no share of it can begin meanwhile. None where
    there is no folder.

    Raises:
        OutputError: a process is at work on one of them.
    """
    folder = place(destination)
    with contextlib.ExitStack() as stack:
        try:
            lock = os.open(folder, OPENED)
        except FileNotFoundError:
            return None
        stack.callback(os.close, lock)
        if not is_ours(lock):
            raise OutputError(f"{folder}: was made by another user, or is not a folder of shards")
        for each in _shards(folder):
            stack.callback(os.close, _hold(folder / each, destination))
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_all(folder, folder.glob(f"{_OWN}*"), lock)
        return Adopted(folder, os.dup(lock), stack.pop_all())
    raise AssertionError


def files(folder: Path) -> list[Path]:
    """What says in such a folder whose it is."""
    return [*folder.glob(PLAN), *folder.glob(f"{_SHARD}*")]


def _shards(folder: Path) -> list[str]:
    """The files that stand for the shares, also of those that have not begun."""
    names = {path.name for path in folder.glob(f"{_SHARD}*")}
    with contextlib.suppress(FileNotFoundError):
        count = json.loads((folder / PLAN).read_bytes())["shards"]
        names |= {_name(number, count) for number in range(1, count + 1)}
    return sorted(names)


def _name(number: int, count: int) -> str:
    return f"{_SHARD}{number}-of-{count}"


def _hold(path: Path, destination: Path) -> int:
    """Its descriptor, locked. Raises OutputError where another process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(path.lstat(), os.fstat(lock)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    shard = path.name.removeprefix(_SHARD).replace("-of-", "/")
    raise OutputError(
        f"{destination}: another process works on --shard {shard}, or completes or deletes the "
        "shards; wait for it"
    )


@contextlib.contextmanager
def joined(destination: Path, number: int, job: Job) -> Iterator[tuple[Path, Path, str]]:
    """The folder, one in it for this process alone, and the name of its ledger.

    Raises:
        UsageError: the shares there are of another job, or were being completed.
        OutputError: another process is at work on this one, or on the whole.
    """
    assert job.count is not None
    folder, course = place(destination), interruption.current()
    loose = [path.relative_to(folder).parts[0] for path in kept.loose(folder)]
    if not all(name.startswith(_OWN) for name in loose):  # where other shares are at work
        raise UsageError(
            f"{destination}: a --finish was killed there; run it again to restore everything"
        )
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(folder, OPENED)
    try:
        (folder / marker(lock)).touch(0o600)
    finally:
        os.close(lock)
    name = _name(number, job.count)
    _note(folder, job)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, _hold(folder / name, destination))
        own = Path(tempfile.mkdtemp(prefix=_OWN, dir=folder))

        def settle() -> None:
            shutil.rmtree(own, ignore_errors=True)

        course.open(settle)
        stack.callback(course.close, settle)
        with kept.within(own, folder / kept.FOLDER):
            yield folder, own, f"{name}.{secrets.token_hex(4)}"


def _note(folder: Path, job: Job) -> None:
    """Say what is shared out, or have the same said by another. Raises UsageError."""
    number, name = tempfile.mkstemp(prefix=_OWN, dir=folder)
    new = Path(name)
    try:
        with os.fdopen(number, "w") as file:
            json.dump({"shards": job.count, "said": job.said}, file, indent=1)
        with contextlib.suppress(FileExistsError):
            put_new(new, folder / PLAN)  # whole or not at all, and once
    finally:
        new.unlink(missing_ok=True)
    _compare(folder, json.loads((folder / PLAN).read_bytes()), job)
