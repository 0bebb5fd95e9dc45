"""Work space that is used again, and what is found once for several tasks."""

from __future__ import annotations

import contextlib
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Buffers:
    """Memory that is lent to one task after another: fresh memory costs the system more time to
    hand out than it takes to fill. Holds no more buffers than were ever in use at once.

    And numbers that several tasks of a run want.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self._turns: defaultdict[Hashable, threading.Lock] = defaultdict(threading.Lock)
        self._found: dict[Hashable, float] = {}

    def once(self, key: Hashable, find: Callable[[], float]) -> float:
        """What the first task that asks for it finds; others wait for that."""
        with self._lock:
            turn = self._turns[key]
        with turn:
            if key not in self._found:
                self._found[key] = find()
            return self._found[key]

    @contextlib.contextmanager
    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor of that shape and dtype, its contents undefined."""
        import torch

        nbytes = math.prod(shape) * dtype.itemsize
        with self._lock:
            self._free.sort(key=torch.numel)
            fitting = [i for i, b in enumerate(self._free) if b.numel() >= nbytes]
            # The smallest that fits; else the largest is given up for a larger one.
            buffer = self._free.pop(fitting[0] if fitting else -1) if self._free else None
        if buffer is None or buffer.numel() < nbytes:
            buffer = None
            buffer = torch.empty(nbytes, dtype=torch.uint8)
        try:
            yield buffer[:nbytes].view(dtype).view(shape)
        finally:
            with self._lock:
                self._free.append(buffer)
