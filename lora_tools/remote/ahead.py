"""Tensors of a file that lies elsewhere, fetched when they are asked for, and the next ones before.

What comes next in the file is fetched while the last is worked on, small tensors several at a time
and large ones in pieces side by side, so that the network is what is waited for. What is fetched
and was not asked for yet takes no more memory than the file's largest tensor does, or 64 MiB.
"""

from __future__ import annotations

import functools
import mmap
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

from lora_tools.remote.source import Source

_PIECE = 8 << 20  # bytes of one request
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


class Ahead:
    """The tensors of one file. From any thread.

    Args:
        extents: of each tensor, where in the file its bytes begin and end, in the file's order.
        budget: bytes that may be fetched before they are asked for; None: as the module says.
    """

    _lock = threading.Lock()  # of all files: nothing waits within

    def __init__(
        self, source: Source, extents: Mapping[str, tuple[int, int]], budget: int | None = None
    ) -> None:
        self._source, self._extents = source, extents
        self._names = [name for name, (begin, end) in extents.items() if end > begin]
        self._place = {name: i for i, name in enumerate(self._names)}
        largest = max((end - begin for begin, end in extents.values()), default=0)
        self._most = max(_LEAST, largest)
        self._budget = self._most if budget is None else budget
        self._stretches: dict[str, _Stretch] = {}  # the last one that a tensor was fetched in
        self._held: dict[str, mmap.mmap] = {}  # its memory, until it is released
        self._asked: dict[str, int] = {}  # bytes of those of them that were, in that order
        self._asked_bytes = self._unasked_bytes = 0
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
                self._note(name, end - begin)
            self._go_ahead()
        stretch.wait()
        return memoryview(memory)[begin - stretch.begin : end - stretch.begin]

    def release(self, name: str) -> None:
        """Hold the tensor no longer than whoever has it does."""
        with self._lock:
            self._let_go(name)

    def close(self) -> None:
        """Fetch no more."""
        with self._lock:
            for name in self._held:
                self._stretches[name].drop()

    def _note(self, name: str, nbytes: int) -> None:
        """It was asked for. What was asked for long ago, and is not released, is not held either:
        whoever still has it keeps it."""
        if name in self._asked:
            return
        self._asked[name] = nbytes
        self._asked_bytes += nbytes
        self._unasked_bytes -= nbytes
        while self._asked_bytes > 2 * self._most and len(self._asked) > 1:
            self._let_go(next(iter(self._asked)))

    def _let_go(self, name: str) -> None:
        if name in self._asked:
            self._asked_bytes -= self._asked.pop(name)
            del self._held[name]

    def _fetch(self, names: list[str]) -> tuple[_Stretch, mmap.mmap]:
        """Have tensors that follow upon each other in the file fetched."""
        begin, end = self._extents[names[0]][0], self._extents[names[-1]][1]
        memory = mmap.mmap(-1, end - begin)  # given back to the system once nobody has it
        stretch = _Stretch(self._source, begin, memory)
        for name in names:
            self._held[name], self._stretches[name] = memory, stretch
        self._unasked_bytes += end - begin
        return stretch, memory

    def _go_ahead(self) -> None:
        """Have what comes next in the file fetched, as far as there is room, but what was fetched
        before: few are read twice."""
        run: list[str] = []
        nbytes = 0
        while self._next < len(self._names):
            name = self._names[self._next]
            size = self._extents[name][1] - self._extents[name][0]
            if self._unasked_bytes + nbytes + size > self._budget:
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
