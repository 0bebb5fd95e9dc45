"""A file mapped into memory, whose pages can be given back to the system once they were read."""

from __future__ import annotations

import mmap
import os
from typing import BinaryIO

_PAGE = mmap.PAGESIZE


class MappedFile:
    """An open file's bytes, as ``view``, of ``size``. It may be closed afterwards, and not empty.

    Private and never written to: torch warns of read-only buffers. NORESERVE keeps a checkpoint
    larger than memory from counting as memory promised.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = os.fstat(file.fileno()).st_size
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        self._map = mmap.mmap(
            file.fileno(), self.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self.view = memoryview(self._map)

    def release(self, begin: int, end: int) -> None:
        """Give the pages of the bytes [begin, end) back. Reading them again is still possible."""
        begin = begin // _PAGE * _PAGE
        if end - begin >= _PAGE and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, (end - begin) // _PAGE * _PAGE)
