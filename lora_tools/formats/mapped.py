"""A file mapped into memory, whose pages can be given back to the system once they were read."""

from __future__ import annotations

import functools
import mmap
from pathlib import Path
from typing import BinaryIO

from lora_tools.formats.open_files import OpenFile
from lora_tools.formats.regular_files import open_file
from lora_tools.formats.reopen import Stamp
from lora_tools.watch import faults
from lora_tools.watch.files import Watched, changed

_PAGE = mmap.PAGESIZE


class MappedFile:
    """An open file's bytes, as ``view``, of ``size``. It may be closed afterwards, and not empty.

    Among very many files it is let go, and mapped again when it is asked for: see ``OpenFile``.
    What was taken of ``view`` stays. What it says holds as long as the file stays what it is: see
    ``watch``.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        stamp = Stamp.of(file.fileno())
        self.size, self._watched = stamp.nbytes, Watched(path, file.fileno())
        # No method of this: a circle would keep the map until garbage is collected.
        again = functools.partial(_map_again, path.absolute(), stamp, self._watched)
        self._open = OpenFile(_mapped(file, self.size, self._watched), again)

    @property
    def view(self) -> memoryview:
        """All of its bytes."""
        self._watched.used()
        return memoryview(self._open.get())

    def release(self, begin: int, end: int) -> None:
        """Give the pages of the bytes [begin, end) back. Reading them again is still possible."""
        begin, held = begin // _PAGE * _PAGE, self._open.there()
        if held is not None and end - begin >= _PAGE and hasattr(mmap, "MADV_DONTNEED"):
            held.madvise(mmap.MADV_DONTNEED, begin, (end - begin) // _PAGE * _PAGE)


def _map_again(path: Path, stamp: Stamp, watched: Watched) -> mmap.mmap:
    """Raises CheckpointError where it is another file by now."""
    try:
        with open_file(path) as file:
            if Stamp.of(file.fileno()) != stamp:
                raise changed(path)
            return _mapped(file, stamp.nbytes, watched)
    except FileNotFoundError:
        raise changed(path) from None


def _mapped(file: BinaryIO, size: int, watched: Watched) -> mmap.mmap:
    """Private and never written to: torch warns of read-only buffers. NORESERVE keeps a checkpoint
    larger than memory from counting as memory promised."""
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    prot = mmap.PROT_READ | mmap.PROT_WRITE
    mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=prot)
    watched.guard(mapped, faults.address_of(mapped), size)
    return mapped
