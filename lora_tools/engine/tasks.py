"""What is to be done on one tensor or module, as a record that can be sent to where it is done.

A task holds names and numbers, and nothing that is open. What the tasks of one run share comes to
``run`` with them: ``sources``, which are read and say how the work is to be done; ``sink``, which
takes bytes; and work space, which is the engine's own. All but that can be pickled: files are sent
as their paths and opened anew (``formats.reopen``, ``SafetensorsWriter``), so that a task gives the
same result, and writes the same bytes, in another process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from lora_tools.watch.files import unchanged

if TYPE_CHECKING:
    from lora_tools.engine.buffers import Buffers

S = TypeVar("S", contravariant=True)
K = TypeVar("K", contravariant=True)
R = TypeVar("R", covariant=True)
T = TypeVar("T")


class Task(Protocol[S, K, R]):
    """A frozen record; ``label`` is what progress calls it, ``nbytes`` its working memory."""

    @property
    def label(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    def run(self, sources: S, sink: K, buffers: Buffers, /) -> R: ...


def perform(task: Task[S, K, R], sources: S, sink: K, buffers: Buffers) -> R:
    """What a task comes to. Raises CheckpointError where a file that it read has changed, and else
    what the task does."""
    with unchanged():
        return task.run(sources, sink, buffers)


@dataclasses.dataclass(frozen=True)
class Call(Generic[T]):
    """A task that is a function of its own arguments and the sources, and writes nothing:
    ``work(*args, *sources)``. Only a function that a module has by name can be sent."""

    work: Callable[..., T]
    args: tuple[Any, ...]
    label: str
    nbytes: int = 0

    def run(self, sources: tuple[Any, ...], *_: object) -> T:
        """Do it."""
        return self.work(*self.args, *sources)
