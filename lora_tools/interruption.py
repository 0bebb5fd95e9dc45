"""What a signal finds: outputs that stand already, and what must not be left behind.

The command line ends a run by raising ``Stopped`` in the main thread, wherever that is. It may hit
anything: an import that makes an ImportError of it, a library that swallows it, the clearing up
after an earlier one. So what is to be undone and what stands is noted here, and read at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class Stopped(BaseException):
    """A signal ended the command."""


class Course:
    """How far one command came.

    Attributes:
        signal: the first one that came; 0: none.
        placed: outputs that stand in their places.
        kept: sentences on work that another run can go on with.
        ended: nothing is left to be stopped; a signal is ignored from then on.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.placed: list[str] = []
        self.kept: list[str] = []
        self.ended = False
        self._open: list[Callable[[], None]] = []

    def stop(self, number: int, _: object) -> None:
        """The handler of a signal. Raises Stopped."""
        if self.ended:
            return
        self.signal = self.signal or number
        raise Stopped

    def go_on(self) -> None:
        """Raises Stopped where a signal came whose exception something has swallowed."""
        if self.signal and not self.ended:
            raise Stopped

    def open(self, settle: Callable[[], None]) -> None:
        """Note what must be called before the process ends; it may be called twice."""
        self._open.append(settle)

    def close(self, settle: Callable[[], None]) -> None:
        """Call it, and forget it once it is done."""
        settle()
        self._open.remove(settle)

    def clear(self) -> None:
        """Call all that a signal kept from being called, the last first."""
        while self._open:
            self.close(self._open[-1])


_current: ContextVar[Course | None] = ContextVar("course", default=None)


def begin() -> Course:
    """The course of a command that begins here."""
    course = Course()
    _current.set(course)
    return course


def current() -> Course:
    """The command's; for a caller in Python, who is told by exceptions, one that nobody reads."""
    return _current.get() or Course()
