"""What one task has written, so that a later run can tell whether it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import xxhash

from lora_tools.formats import digest as hashing
from lora_tools.formats.digest import Hash


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a writer took of one task.

    Attributes:
        extents: (tensor, first byte, bytes, their XXH3-128).
        last: what came by ``write_last``.
    """

    extents: tuple[tuple[str, int, int, bytes], ...]
    last: Mapping[str, bytes]


class _Writer(Protocol):
    def write(self, name: str, data: memoryview, offset: int = 0) -> None: ...
    def write_last(self, name: str, data: bytes) -> None: ...


class _Sink(Protocol):
    def write(self, name: str, data: memoryview, offset: int = 0) -> None: ...


class HashedWrites:
    """One tensor, written to a sink from its first byte to its last; and its hash."""

    def __init__(self, sink: _Sink, name: str) -> None:
        self._sink, self._name, self._offset = sink, name, 0
        self._state = hashing.new_hash()
        self._is_told = isinstance(sink, Recording) and hashing.used() == "xxh3"

    def write(self, data: memoryview) -> None:
        """The bytes that follow."""
        self._state.update(data)
        if self._is_told:
            assert isinstance(self._sink, Recording)
            self._sink.write_hashed(self._name, data, self._offset, self._state)
        else:
            self._sink.write(self._name, data, self._offset)
        self._offset += data.nbytes

    def hexdigest(self) -> str:
        """``hashing.tensor_hash`` of what was written."""
        return self._state.hexdigest()


class Recording:
    """A writer's face to one task, which keeps account."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._done: list[tuple[str, int, int, bytes]] = []
        self._last: dict[str, bytes] = {}
        # What follows upon what was written is one extent with it.
        self._name, self._start, self._end = "", 0, 0
        self._state = xxhash.xxh3_128()
        self._given: Hash | None = None

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Bytes of one tensor from ``offset`` on."""
        if (name, offset) != (self._name, self._end) or self._given is not None:
            self._close()
            self._name, self._start, self._end = name, offset, offset
        self._state.update(data)
        self._end += data.nbytes
        self._writer.write(name, data, offset)

    def write_hashed(self, name: str, data: memoryview, offset: int, state: Hash) -> None:
        """The same, of a tensor that is written in order; the XXH3-128 of all so far is formed by
        whoever writes it."""
        if (name, offset) != (self._name, self._end) or self._given is not state:
            self._close()
            self._name, self._start, self._end, self._given = name, 0, offset, state
        self._end += data.nbytes
        self._writer.write(name, data, offset)

    def write_last(self, name: str, data: bytes) -> None:
        """A tensor of bytes whose size is known only now."""
        self._last[name] = data
        self._writer.write_last(name, data)

    def _close(self) -> None:
        if self._end > self._start:
            nbytes, state = self._end - self._start, self._state
            digest = bytes.fromhex((self._given or state).hexdigest())
            self._done.append((self._name, self._start, nbytes, digest))
        self._state.reset()
        self._given = None

    def taken(self) -> Taken:
        """All of it, once the task has ended."""
        self._close()
        self._start = self._end
        return Taken(tuple(self._done), dict(self._last))
