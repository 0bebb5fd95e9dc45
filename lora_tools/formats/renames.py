"""Renames that take no other's place unasked: ``put_new``, and ``exchange`` for what was asked.

Linux does both in one step, ``renameat2(2)``. Where the system or the file system cannot, a file is
put by a hard link, which is as good; a folder by a plain rename, which replaces an empty folder at
most; and where there are no hard links either, the folder around is locked, which keeps the
commands of this package apart from each other.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

_NOREPLACE, _EXCHANGE = 1, 2  # linux/fs.h
_HERE = -100  # AT_FDCWD: paths are relative to the working folder
_LACKING = {
    errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM, errno.EXDEV,
}  # fmt: skip


def put_new(source: Path, target: Path) -> None:
    """Rename where nothing is. Raises FileExistsError where something is, be it a dangling link."""
    if _rename(source, target, _NOREPLACE):
        return
    if stat.S_ISDIR(os.lstat(source).st_mode):
        _put_folder(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        _put_locked(source, target)
    else:
        source.unlink()


def exchange(source: Path, target: Path) -> bool:
    """Have two take each other's place in one step. False where that is not to be had here; raises
    FileNotFoundError where one is not there."""
    return _rename(source, target, _EXCHANGE)


def _rename(source: Path, target: Path, flags: int) -> bool:
    function = _renameat2()
    if function is None:
        return False
    sys.audit("os.rename", str(source), str(target), -1, -1)  # as os.rename does
    code = function(os.fsencode(source), os.fsencode(target), flags)
    if not code:
        return True
    if code in _LACKING:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


@functools.cache
def _renameat2() -> Callable[[bytes, bytes, int], int] | None:
    """The C library's, which returns the error's number; None where it has none."""
    import ctypes

    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # glibc before 2.28, another system
        return None
    path, number = ctypes.c_char_p, ctypes.c_int
    function.argtypes = (number, path, number, path, ctypes.c_uint)

    def call(source: bytes, target: bytes, flags: int) -> int:
        failed = function(_HERE, source, _HERE, target, flags)
        return ctypes.get_errno() if failed else 0

    return call


def _put_folder(source: Path, target: Path) -> None:
    _refuse(target)
    try:
        os.rename(source, target)  # noqa: PTH104 - of a folder: it replaces an empty one at most
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            raise _there(target) from None
        raise


def _put_locked(source: Path, target: Path) -> None:
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # no locks either: then what is left is to look first
            fcntl.flock(folder, fcntl.LOCK_EX)
        _refuse(target)
        source.rename(target)
    finally:
        os.close(folder)


def _refuse(target: Path) -> None:
    if os.path.lexists(target):
        raise _there(target)


def _there(target: Path) -> FileExistsError:
    return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
