"""What a process elsewhere does: the tasks that it is sent, as they would be done here.

What the tasks of a run share is sent as bytes, and kept open from one task to the next.
"""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lora_tools.engine import memo
from lora_tools.engine.buffers import Buffers
from lora_tools.engine.threads import one_torch_thread_here
from lora_tools.errors import named


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is said for a call, such as the kind of its digests, and holds elsewhere as well.

    Attributes:
        used: what is said.
        using: says it; it must have a name of its own.
    """

    used: Callable[[], Any]
    using: Callable[[Any], AbstractContextManager[None]]

    def taken_along(self) -> functools.partial[AbstractContextManager[None]]:
        """Says the same elsewhere, once it is called."""
        return functools.partial(self.using, self.used())


_lock = threading.Lock()  # of two threads that open the same files one waits for the other


@functools.lru_cache(maxsize=2)
def _opened(shared: bytes) -> tuple[Any, Any, Any, Buffers]:
    """What the tasks of a run share, and the work space of this process for that run."""
    sources, sink, setting = pickle.loads(shared)
    return sources, sink, setting, Buffers()


def do(shared: bytes, tasks: Sequence[bytes]) -> bytes:
    """Tasks, one after the other; what each came to is a ``memo.Done``. Raises what one raises,
    with its label."""
    found = []
    for each in tasks:
        work = pickle.loads(each)
        with named(work.label):
            with _lock:
                sources, sink, setting, buffers = _opened(shared)
            with one_torch_thread_here(), setting():
                found.append(memo.do(work, sources, sink, buffers))
    return pickle.dumps(found)


def pack(sources: Any, sink: Any, setting: Setting) -> bytes:
    """What tasks share, to be sent."""
    return pickle.dumps((sources, sink, setting.taken_along()))
