"""What a run has done so far, on the disk beside what it makes, for a run that goes on with it.

An entry is a key, the seconds that its work took, and bytes; its own digest tells one that was torn
by a kill, or by a power cut. What a key stands for is ``engine.memo``'s matter. Each run appends to
a file of its own, so that several may do so at a time, and reads those that were there.

Nothing is on the disk before it is worth keeping: short runs leave none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import xxhash

WORTH = 60.0  # seconds of work; what is worth less is done anew
_MOST = 4 << 20  # bytes that wait in memory
_HEAD = struct.Struct("<16s16sdQ")  # digest of the rest, key, seconds, bytes that follow
_NAME = "ledger."


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where the bytes of an entry lie."""

    path: Path
    offset: int
    nbytes: int
    digest: bytes
    head: bytes


def files(folder: Path) -> list[Path]:
    """The files of ledgers in a folder."""
    return sorted(folder.glob(f"{_NAME}*"))


def worth(folder: Path) -> float:
    """Seconds of work that the ledgers in a folder hold."""
    return sum(seconds for path in files(folder) for _, seconds, _ in _entries(path))


def _entries(path: Path) -> Iterator[tuple[bytes, float, _Place]]:
    """(key, seconds, where) of each entry that is whole by its length."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        size, at = os.fstat(file.fileno()).st_size, 0
        while len(raw := file.read(_HEAD.size)) == _HEAD.size:
            digest, key, seconds, nbytes = _HEAD.unpack(raw)
            at += _HEAD.size
            if nbytes > size - at:
                return
            yield key, seconds, _Place(path, at, nbytes, digest, raw[16:])
            at = file.seek(at + nbytes)


class Ledger:
    """The ledger of a run that writes into ``folder``.

    Args:
        name: of its own file; its number among those that are there, where none is given. Of a
            file with a name all is on the disk at once.

    Attributes:
        worth: seconds of work that it holds.
    """

    def __init__(self, folder: Path, name: str = "") -> None:
        there = files(folder)
        self._at_once = bool(name)
        self._path = folder / f"{_NAME}{name or len(there)}"
        self._known: dict[bytes, _Place] = {}
        self.worth = 0.0
        for path in there:
            for key, seconds, place in _entries(path):
                self._known[key] = place
                self.worth += seconds
        self._waiting: list[bytes] = []
        self._nbytes = 0
        self._is_open, self._file = True, -1

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def get(self, key: bytes) -> bytes | None:
        """What an earlier run has put under that key; None where that is nothing, or damaged."""
        place = self._known.get(key)
        if place is None:
            return None
        try:
            with place.path.open("rb") as file:
                file.seek(place.offset)
                data = file.read(place.nbytes)
        except OSError:
            return None
        return data if _digest(place.head, data) == place.digest else None

    def put(self, key: bytes, seconds: float, data: bytes) -> None:
        """Keep an entry; by one thread at a time. A disk that is full, or fails, ends the ledger,
        and not the run."""
        rest = _HEAD.pack(b"", key, seconds, len(data))[16:]
        self.worth += seconds
        self._waiting += [_digest(rest, data), rest, data]
        self._nbytes += len(data)
        if self._at_once or self.worth >= WORTH or self._nbytes >= _MOST:
            self._write()

    def _write(self) -> None:
        lines, self._waiting, self._nbytes = b"".join(self._waiting), [], 0
        if not self._is_open or not lines:
            return
        try:
            if self._file < 0:
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._file = os.open(self._path, flags, 0o600)
            while lines:
                lines = lines[os.write(self._file, lines) :]
        except OSError:
            self._is_open, self.worth = False, 0.0
            with contextlib.suppress(OSError):  # its room is the run's
                os.ftruncate(self._file, 0)

    def close(self) -> None:
        """Write what waits, where it is worth it."""
        if self.worth >= WORTH:
            self._write()
        self._is_open = False
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _digest(head: bytes, data: bytes) -> bytes:
    state = xxhash.xxh3_128(head)
    state.update(data)
    return state.digest()
