"""What one task has written, so that a later run can tell whether it is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import xxhash


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


class Recording:
    """A writer's face to one task, which keeps account."""

    def __init__(self, writer: _Writer) -> None:
        self._writer = writer
        self._done: list[tuple[str, int, int, bytes]] = []
        self._last: dict[str, bytes] = {}
        # What follows upon what was written is one extent with it.
        self._name, self._start, self._end = "", 0, 0
        self._state = xxhash.xxh3_128()

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Bytes of one tensor from ``offset`` on."""
        if (name, offset) != (self._name, self._end):
            self._close()
            self._name, self._start, self._end = name, offset, offset
        self._state.update(data)
        self._end += data.nbytes
        self._writer.write(name, data, offset)

    def write_last(self, name: str, data: bytes) -> None:
        """A tensor of bytes whose size is known only now."""
        self._last[name] = data
        self._writer.write_last(name, data)

    def _close(self) -> None:
        if self._end > self._start:
            nbytes = self._end - self._start
            self._done.append((self._name, self._start, nbytes, self._state.digest()))
        self._state.reset()

    def taken(self) -> Taken:
        """All of it, once the task has ended."""
        self._close()
        self._start = self._end
        return Taken(tuple(self._done), dict(self._last))
