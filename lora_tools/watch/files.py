"""Files that must stay as they are while they are read: what was found in them is only then true.

Whoever opens one makes a ``Watched`` and tells it each use. ``unchanged`` looks at those that
were used within it once it ends: so a task answers for the files that it read, and a call for all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from lora_tools.errors import CheckpointError, reason
from lora_tools.watch import faults
from lora_tools.within import holding


class Checked(Protocol):
    """What is to be as it was found: ``check`` raises CheckpointError where it is not."""

    def check(self) -> None: ...


_used: ContextVar[set[Checked] | None] = ContextVar("used", default=None)
_own: ContextVar[Path | None] = ContextVar("own", default=None)


def own(folder: Path) -> AbstractContextManager[None]:
    """Files in that folder are this run's own, which replaces and moves them: nobody looks at
    those that are opened within."""
    return holding(_own, folder.absolute())


def note(file: Checked) -> None:
    """A file is read, for whoever looks at it in the end."""
    used = _used.get()
    if used is not None:
        used.add(file)


class Watched:
    """One open file, as it was found.

    Attributes:
        torn: whether a page of it could not be read any more.
    """

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.torn = path.absolute(), False
        self._found = os.fstat(number)
        self._is_own = _own.get() in self.path.parents

    def used(self) -> None:
        """Note that it is read, for whoever looks at it in the end."""
        if not self._is_own:
            note(self)

    def guard(self, owner: object, start: int, nbytes: int) -> None:
        """Have a page of its map that is gone raise no SIGBUS while a run watches its files."""
        faults.guard(owner, start, nbytes, self._tear)

    def _tear(self) -> None:
        self.torn = True

    def check(self) -> None:
        """Raises CheckpointError where another file lies at its path, or it was written to."""
        try:
            now, was = os.stat(self.path), self._found  # noqa: PTH116 - Path.stat says as much
        except FileNotFoundError:
            raise CheckpointError(
                f"{self.path}: was deleted since it was opened; put it back, and run the command "
                "again"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{self.path}: {reason(error)}") from None
        if os.path.samestat(now, was) and now.st_size < was.st_size:
            raise CheckpointError(
                f"{self.path}: became shorter while it was read ({was.st_size:,} bytes before, "
                f"{now.st_size:,} now); run the command again when the file is complete"
            )
        is_same = os.path.samestat(now, was) and now.st_size == was.st_size
        if not is_same or now.st_mtime_ns != was.st_mtime_ns:
            raise changed(self.path)
        if self.torn:
            raise CheckpointError(
                f"{self.path}: its disk, or the network to it, failed during reading; copy it to "
                "another disk, and give the copy"
            )


def changed(path: Path) -> CheckpointError:
    """The error that says that a file is not the one that was opened."""
    return CheckpointError(
        f"{path}: changed since it was opened; run the command again when nothing writes to it"
    )


def check() -> None:
    """Raises CheckpointError where a file that was used so far is not what it was. Files that are
    used from here on are looked at anew."""
    used = _used.get()
    if used is not None:
        for file in tuple(used):
            file.check()
        used.clear()


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Files that are used within are, at the end, what they were when they were opened.

    Raises:
        CheckpointError: one is not, whatever else was raised for it.
    """
    outer, mine = _used.get(), set[Checked]()
    with faults.guarded(), holding(_used, mine):
        try:
            yield
        except Exception as error:
            try:
                check()
            except CheckpointError as cause:
                raise cause from error
            raise
        if outer is not None:
            outer |= mine
        check()
