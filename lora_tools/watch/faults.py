"""Mapped files whose pages are gone: zeros instead of SIGBUS, and a note.

A file that is cut short while it is mapped, or whose disk fails, has the kernel end the process at
the next page that is read. Reading into buffers would tell that as a short read, at two to three
times the cost of the map (measured: 0.3 and 0.6 to 1.0 s of processor time a GiB) and with a copy
of each tensor in memory. So it is mapped, and a handler puts zeros where the file was: what is
computed of them is thrown away, since ``files.unchanged`` sees the note.

The handler is Python's, called by ctypes: a fault is raised by the very instruction that reads the
page, in the midst of a copy or of arithmetic and never within the interpreter's own state, and
ctypes takes the interpreter lock where the thread has not got it. Faults that are none of these
are left to whoever was to handle them before.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import platform
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_SA_SIGINFO = 4
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000
_FAILED = ctypes.c_void_p(-1).value
# The layouts below are those of glibc and musl on these.
_IS_KNOWN = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")

# Of each owner of mapped memory: where that begins and ends, and what notes that it is torn.
_ranges: dict[int, tuple[int, int, Callable[[], None]]] = {}
_lock = threading.Lock()
_depth = 0
_before: Any = None


class _Action(ctypes.Structure):
    """``struct sigaction`` (sigaction(2)) as the C library has it."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ulong * (1024 // 8 // ctypes.sizeof(ctypes.c_ulong))),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class _Info(ctypes.Structure):
    """The beginning of ``siginfo_t``, of a fault."""

    _fields_ = (
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("address", ctypes.c_void_p),
    )


_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.POINTER(_Info), ctypes.c_void_p)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    return libc


def address_of(mapped: mmap.mmap) -> int:
    """Where in memory a map begins, which is not empty and can be written to."""
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def guard(owner: object, start: int, nbytes: int, tear: Callable[[], None]) -> None:
    """Know memory as that of a mapped file, as long as its owner is there.

    Args:
        tear: called once a page of it is gone.
    """
    _ranges[id(owner)] = start, start + nbytes, tear
    weakref.finalize(owner, _ranges.pop, id(owner), None).atexit = False


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within, on any thread, pages of known memory that are gone are zeros."""
    _enter()
    try:
        yield
    finally:
        _leave()


def _enter() -> None:
    global _depth, _before
    with _lock:
        _depth += 1
        if _depth == 1 and _IS_KNOWN:
            with contextlib.suppress(OSError, AttributeError, MemoryError):  # it may be forbidden
                pointer = ctypes.cast(_handler(), ctypes.c_void_p)
                before, mine = _Action(), _Action(pointer, flags=_SA_SIGINFO)
                if not _libc().sigaction(signal.SIGBUS, ctypes.byref(mine), ctypes.byref(before)):
                    _before = before


def _leave() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            _restore()


def _restore() -> None:
    """Have faults handled as they were before."""
    global _before
    before, _before = _before, None
    if before is not None:
        _libc().sigaction(signal.SIGBUS, ctypes.byref(before), None)


@functools.cache
def _handler() -> Any:
    return _Handler(_handle)


def _handle(number: int, info: Any, context: int) -> None:
    """Raises nothing: a fault that is not mended is raised again as soon as this returns."""
    try:
        is_mended = _mend(info.contents.address or 0)
    except BaseException:
        is_mended = False
    if not is_mended:
        _restore()


def _mend(address: int) -> bool:
    """Put zeros from the page of a fault to the end of what is mapped there. False where it is not
    known."""
    for start, end, tear in tuple(_ranges.values()):
        if start <= address < end:
            tear()
            page = address // mmap.PAGESIZE * mmap.PAGESIZE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
            prot = mmap.PROT_READ | mmap.PROT_WRITE
            found = _libc().mmap(page, end - page, prot, flags, -1, 0)
            return bool(found != _FAILED)
    return False
