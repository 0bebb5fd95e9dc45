"""Files that stay open while there is room for them, and are opened again when asked for.

A checkpoint may have more shards than a process may have files open (``ulimit -n``; 256 on some
systems), and Python's ``mmap`` (3.11) keeps a descriptor for each file that it maps.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_SHARE = 3  # a third of the descriptors that the process may have; libraries take others
_FEW, _MANY = 16, 1024

# What is open, the last used at the end. Each of its methods is one step for all threads.
_kept: OrderedDict[int, object] = OrderedDict()


@functools.cache
def most() -> int:
    """How many are kept open at most, of all files of the process together."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = allowed == resource.RLIM_INFINITY
    return _MANY if unlimited else max(_FEW, min(_MANY, allowed // _SHARE))


class OpenFile(Generic[T]):
    """Something that holds a file open, such as a map. ``get`` gives it; whoever has it keeps it
    open by that. Where too many are, the one that was not asked for the longest is let go.

    From any thread.

    Args:
        first: it, just opened.
        again: opens it once more. What it raises comes out of ``get``.
    """

    def __init__(self, first: T, again: Callable[[], T]) -> None:
        self._again, self._known = again, weakref.ref(first)
        self._keep(first)

    def __del__(self) -> None:
        self.let_go()

    def _keep(self, held: T) -> None:
        _kept.pop(id(self), None)
        _kept[id(self)] = held
        with contextlib.suppress(KeyError):  # another thread was faster
            while len(_kept) > most():
                _kept.popitem(last=False)

    def there(self) -> T | None:
        """It, or None where it is not open."""
        return self._known()

    def get(self) -> T:
        """It, opened where it is not."""
        held = self._known()
        if held is None:  # of two threads that find it so, each has its own: that is as good
            held = self._again()
            self._known = weakref.ref(held)
        self._keep(held)
        return held

    def let_go(self) -> None:
        """Keep it open no longer than whoever has it does."""
        _kept.pop(id(self), None)


class Descriptor:
    """A file descriptor that is closed when nobody has it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Close it now. It may be called twice."""
        number, self.number = self.number, -1
        if number >= 0:
            os.close(number)

    def __del__(self) -> None:
        self.close()
