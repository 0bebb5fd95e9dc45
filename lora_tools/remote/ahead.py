"""Tensors of a file that lies elsewhere, fetched when they are asked for, and the next ones before.

What comes next in the file is fetched while the last is worked on, small tensors several at a time
and large ones in pieces side by side, so that the network is what is waited for. What is fetched
and was not asked for yet takes no more memory than the largest tensor does, or 64 MiB. What was
asked for is kept in twice as much: some work reads a tensor more than once.
"""

from __future__ import annotations

import functools
import mmap
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from lora_tools.remote.source import Source

_PIECE = 4 << 20  # bytes of one request
_LEAST = 64 << 20  # bytes ahead
_REQUESTS = 16  # at a time, of the process


@functools.cache
def pool() -> ThreadPoolExecutor:
    """Threads that wait for answers."""
    return ThreadPoolExecutor(_REQUESTS, thread_name_prefix="loratools-fetch")


class _Stretch:
    """A file's bytes from ``begin`` on, on their way into memory, or here as long as somebody has
    that."""

    def __init__(self, source: Source, begin: int, memory: mmap.mmap) -> None:
        self.begin, self._known, end = begin, weakref.ref(memory), begin + len(memory)
        self._pieces = [
            pool().submit(_fill, source, memory, begin, at, min(at + _PIECE, end))
            for at in range(begin, end, _PIECE)
        ]

    def memory(self) -> mmap.mmap | None:
        """Where the bytes come to lie; None where nobody had it any more."""
        return self._known()

    def wait(self) -> None:
        """Raises CheckpointError where they cannot be had."""
        for piece in self._pieces:
            piece.result()

    def drop(self) -> None:
        """Fetch no more of it."""
        for piece in self._pieces:
            piece.cancel()


def _fill(source: Source, memory: mmap.mmap, origin: int, begin: int, end: int) -> None:
    memory[begin - origin : end - origin] = source.read(begin, end)


class Room:
    """The memory that is taken for what is fetched, of all files of a call together.

    Attributes:
        most: bytes of the largest tensor, or more.
        unasked: bytes that were fetched, or are on their way, and not asked for yet.
    """

    def __init__(self, is_ahead: bool = True) -> None:
        self.most, self.unasked = _LEAST, 0
        self._is_ahead = is_ahead
        self._kept: dict[tuple[Ahead, str], int] = {}  # bytes of what was asked for, the last last
        self._bytes = 0

    def has_for(self, nbytes: int) -> bool:
        """Whether so many may be fetched before they are asked for."""
        return self._is_ahead and self.unasked + nbytes <= self.most

    def keep(self, file: Ahead, name: str, nbytes: int) -> None:
        """Keep what is asked for, and let the oldest go. Whoever still has that keeps it."""
        before = self._kept.pop((file, name), None)
        self._kept[file, name] = nbytes
        if before is None:
            self._bytes += nbytes
            self.unasked -= nbytes
        while self._bytes > 2 * self.most and len(self._kept) > 1:
            oldest, other = next(iter(self._kept))
            self._bytes -= self._kept.pop((oldest, other))
            oldest.let_go(other)


class Ahead:
    """The tensors of one file. From any thread.

    Args:
        extents: of each tensor, where in the file its bytes begin and end, in the file's order.
        room: what several files have in common.
    """

    _lock = threading.Lock()  # of all files: nothing waits within

    def __init__(
        self, source: Source, extents: Mapping[str, tuple[int, int]], room: Room | None = None
    ) -> None:
        self._source, self._extents, self._room = source, extents, room or Room()
        self._names = [name for name, (begin, end) in extents.items() if end > begin]
        self._place = {name: i for i, name in enumerate(self._names)}
        largest = max((end - begin for begin, end in extents.values()), default=0)
        self._room.most = max(self._room.most, largest)
        self._stretches: dict[str, _Stretch] = {}  # the last one that a tensor was fetched in
        self._held: dict[str, mmap.mmap] = {}  # its memory, until it is let go
        self._next = 0

    def get(self, name: str) -> memoryview:
        """The tensor's bytes. Raises CheckpointError where they cannot be had."""
        begin, end = self._extents[name]
        if begin == end:
            return memoryview(bytearray())
        with self._lock:
            stretch = self._stretches.get(name)
            memory = stretch.memory() if stretch is not None else None
            if stretch is None or memory is None:
                self._next = self._place[name] + 1
                stretch, memory = self._fetch([name])
            if name in self._held:
                self._room.keep(self, name, end - begin)
            self._go_ahead()
        stretch.wait()
        return memoryview(memory)[begin - stretch.begin : end - stretch.begin]

    def let_go(self, name: str) -> None:
        """Hold a tensor no longer than whoever has it does."""
        self._held.pop(name, None)

    def close(self) -> None:
        """Fetch no more."""
        with self._lock:
            for name in self._held:
                self._stretches[name].drop()

    def _fetch(self, names: list[str]) -> tuple[_Stretch, mmap.mmap]:
        """Have tensors that follow upon each other in the file fetched."""
        begin, end = self._extents[names[0]][0], self._extents[names[-1]][1]
        memory = mmap.mmap(-1, end - begin)  # given back to the system once nobody has it
        stretch = _Stretch(self._source, begin, memory)
        for name in names:
            self._held[name], self._stretches[name] = memory, stretch
        self._room.unasked += end - begin
        return stretch, memory

    def _go_ahead(self) -> None:
        """Have what comes next in the file fetched, as far as there is room, but what was fetched
        before: few are read twice."""
        run: list[str] = []
        nbytes = 0
        while self._next < len(self._names):
            name = self._names[self._next]
            size = self._extents[name][1] - self._extents[name][0]
            if not self._room.has_for(nbytes + size):
                break
            self._next += 1
            is_known = name in self._stretches
            if run and (is_known or nbytes + size > _PIECE):
                self._fetch(run)
                run, nbytes = [], 0
            if not is_known:
                run.append(name)
                nbytes += size
        if run:
            self._fetch(run)
