"""One safetensors file, written: its header is known beforehand.

It exists beside the ``safetensors`` package because that needs every tensor of the file in memory
at once. The format: ``safetensors_file``.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from lora_tools.errors import OutputError
from lora_tools.formats.kept import take_up
from lora_tools.formats.open_files import Descriptor, OpenFile
from lora_tools.records import TensorSpec

_STEP = 8 << 20  # bytes that are looked at in one go
WRITEBACK = 64 << 20  # start writing to disk in steps of this size
# Network file systems else write whole pages back, with what another machine has written there
# meanwhile, and some of it after a file's owner takes it for complete.
_THROUGH = os.O_DSYNC


_json = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode


def encode_header(
    specs: Iterable[TensorSpec],
    metadata: Mapping[str, str] | None = None,
    body: bytes | None = None,
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes (length included), each tensor's offset in the file, and the file's size.

    Tensors keep the order given; the header is padded with spaces to a multiple of 8 bytes as the
    safetensors package does. ``body`` is JSON to write as it is, for the same tensors in order.
    """
    entries = [f'"__metadata__":{_json(dict(metadata))}'] if metadata else []
    position, starts = 0, {}
    for spec in specs:
        starts[spec.name] = position
        end = position + spec.nbytes
        if body is None:
            shape = ",".join(map(str, spec.shape))
            entries.append(
                f'{encode_basestring(spec.name)}:{{"dtype":"{spec.dtype}","shape":[{shape}],'
                f'"data_offsets":[{position},{end}]}}'
            )
        position = end
    if body is None:
        body = f"{{{','.join(entries)}}}".encode()
        body += b" " * (-len(body) % 8)
    header = len(body).to_bytes(8, "little") + body
    return header, {k: v + len(header) for k, v in starts.items()}, len(header) + position


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer that was reopened elsewhere has done: bytes by tensor, and what came by
    ``write_last``."""

    nbytes: Mapping[str, int]
    last: Mapping[str, bytes]


def machine() -> str:
    """By which machines are told apart: a file that two processes write has the same pages in
    memory where it is the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class SafetensorsWriter:
    """Writes a planned file in any order and from any thread; the header goes first.

    Space for the whole file is reserved at once, so a full disk is met before any work. ``close``
    raises if a planned tensor was not written whole, then syncs the file to disk. A file that a run
    before this one has left there is taken up, with what it holds (``formats.kept``).

    ``pickle`` sends the path and the plan; what is unpickled writes into the same file. Only the
    owner, which made the file, completes it, once it was told of what others wrote: ``credit`` of
    their ``hand_over``.

    Args:
        shared: other processes make the same file at this time, of the same plan. It is not
            completed then.
        through: what was written is on the disk, and nothing around it.
    """

    def __init__(
        self,
        path: Path,
        specs: Iterable[TensorSpec],
        metadata: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        is_owner: bool = True,
        shared: bool = False,
        through: bool = False,
    ) -> None:
        self.specs = list(specs)
        self.path, self._metadata, self._body, self._is_owner = path, metadata, body, is_owner
        header, self._offsets, self.size = encode_header(self.specs, metadata, body)
        self._header_size = len(header)
        self._written: Counter[str] = Counter()
        self._last: dict[str, bytes] = {}
        self._unsynced = 0
        flags = os.O_RDWR | os.O_CLOEXEC | (_THROUGH if through else 0)
        is_new = is_owner and not shared and not take_up(path)
        made = os.O_CREAT | os.O_EXCL if is_new else os.O_CREAT if shared else 0
        first = _opened(path, flags | made)
        self._open = OpenFile(first, functools.partial(_opened, path.absolute(), flags))
        self._abandoned = False
        try:
            if is_owner:
                size = os.fstat(first.number).st_size
                if shared:  # to reserve space may mean to write into it
                    os.ftruncate(first.number, max(size, self.size))
                else:
                    os.ftruncate(first.number, min(size, self.size))
                    reserve(first.number, self.size, path)
                write_all(first.number, header, 0)
            elif os.pread(first.number, len(header), 0) != header:
                raise OutputError(f"{path}: changed while it was written; write it again")
        except BaseException:
            self.abandon()
            raise

    def __reduce__(self) -> tuple[Callable[..., SafetensorsWriter], tuple[Any, ...]]:
        again = functools.partial(SafetensorsWriter, is_owner=False)
        return again, (self.path.absolute(), self.specs, self._metadata, self._body)

    def _file(self) -> Descriptor:
        if self._abandoned:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), str(self.path))
        return self._open.get()

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Write ``data`` at byte ``offset`` of the tensor."""
        start, file = self._offsets[name] + offset, self._file()
        write_all(file.number, data, start)
        self._written[name] += data.nbytes
        self._unsynced += data.nbytes
        if self._unsynced >= WRITEBACK and hasattr(os, "posix_fadvise"):
            # Starts the disk working now, so that the sync at the end finds little left to do.
            self._unsynced = 0
            os.posix_fadvise(file.number, 0, 0, os.POSIX_FADV_DONTNEED)

    def has(self, name: str, offset: int, nbytes: int, digest: bytes) -> bool:
        """Whether the file holds bytes of that XXH3-128 at byte ``offset`` of the tensor."""
        if name not in self._offsets or self._offsets[name] + offset + nbytes > self.size:
            return False
        state, file, start = xxhash.xxh3_128(), self._file(), self._offsets[name] + offset
        for at in range(start, start + nbytes, _STEP):
            state.update(os.pread(file.number, min(_STEP, start + nbytes - at), at))
        return state.digest() == digest

    def seal(self, metadata: Mapping[str, str]) -> None:
        """Write the header anew, with metadata that was not known at the start and takes the same
        room."""
        assert self._is_owner
        header, offsets, _ = encode_header(self.specs, metadata)
        assert offsets == self._offsets, "the data lies where it lies"
        write_all(self._file().number, header, 0)
        self._metadata = metadata

    def write_last(self, name: str, data: bytes) -> None:
        """A tensor of bytes whose size is known only now: it was planned with the most it can have,
        as one of the last of the file. From any thread."""
        self._last[name] = data

    def hand_over(self) -> Written:
        """What was written here since the last call, for the owner to know of."""
        written = Written(dict(self._written), self._last)
        self._written, self._last = Counter(), {}
        return written

    def credit(self, written: Written) -> None:
        """Take what another writer of this file has done for done."""
        self._written.update(written.nbytes)
        self._last |= written.last

    def _settle(self) -> None:
        """Write what came by ``write_last`` at its true size, and the header anew, in the room it
        has: smaller numbers are no longer than those planned."""
        kept = len(self.specs) - len(self._last)
        assert {spec.name for spec in self.specs[kept:]} == set(self._last), "they are not last"
        self.specs[kept:] = [
            dataclasses.replace(spec, shape=(len(self._last[spec.name]),))
            for spec in self.specs[kept:]
        ]
        header, _, _ = encode_header(self.specs, self._metadata)
        body = header[8:] + b" " * (self._header_size - len(header))
        header, offsets, self.size = encode_header(self.specs, self._metadata, body)
        assert len(header) == self._header_size
        file = self._file()
        for name, data in self._last.items():
            write_all(file.number, data, offsets[name])
        write_all(file.number, header, 0)
        os.ftruncate(file.number, self.size)

    def close(self) -> None:
        """Sync and close. Raises OutputError naming a tensor that was not written whole."""
        assert self._is_owner, "who reopened a file does not know of all that is in it"
        try:
            for spec in self.specs:
                if self._written[spec.name] != spec.nbytes and spec.name not in self._last:
                    raise OutputError(f"{self.path}: tensor {spec.name!r} was not written whole")
            if self._last:
                self._settle()
            os.fsync(self._file().number)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close without a check: for a file that is about to be deleted."""
        self._abandoned = True
        self._open.let_go()
        if (held := self._open.there()) is not None:
            held.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _opened(path: Path, flags: int) -> Descriptor:
    return Descriptor(os.open(path, flags, 0o666))


def reserve(fd: int, size: int, path: Path) -> None:
    """Reserve ``size`` bytes for an open file. Raises OSError on a full disk."""
    try:
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            return  # a file system without it: the check of free space has to do
        raise OSError(
            error.errno, f"there is no space for {size:,} bytes ({error.strerror})", path
        ) from None


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file. Raises OSError."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
