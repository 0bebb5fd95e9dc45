"""What a field of a record of options says of itself: the one place where an option is described.

The command line's options, their defaults, ``docs/cli.md``, the keywords of the public functions
and the command that artifacts record are all made from it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any, Literal

KEY = "option"  # of a field's metadata


@dataclasses.dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        help: what ``--help`` says; a function where a table has to be read for it.
        group: the heading that it stands under.
        flags: its spellings; by default its name with hyphens.
        metavar: what stands for its value; the choices where there is none.
        choices: the values there are, out of a table, which is not read before it is needed; of
            a field whose type is a ``Literal``, those are.
        unset: what holds where it is not given, if its default does not say that.
        allowed: whether a number will do, and which ones do, in words.
        parse: raises UsageError for a text that means nothing.
        recorded: whether it is part of the command that artifacts record. What does not decide
            what is written is not, nor is a path, so that the same input gives the same bytes
            wherever it lies.
        path: what lies there: something read, something read as tensors (then callers from Python
            may give the tensors), or something written.
    """

    help: str | Callable[[], str]
    group: str
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    choices: Callable[[], Iterable[Any]] | None = None
    unset: str = ""
    allowed: tuple[Callable[[float], bool], str] | None = None
    parse: Callable[[str], object] | None = None
    recorded: bool = True
    path: Literal["", "input", "tensors", "output"] = ""

    @property
    def text(self) -> str:
        """The help, with what holds where it is not given."""
        said = self.help if isinstance(self.help, str) else self.help()
        return f"{said}  [default: {self.unset}]" if self.unset else said


def option(default: Any, help: str | Callable[[], str], group: str, **said: Any) -> Any:
    """A field of a record: an option with that default (``dataclasses.MISSING``: none)."""
    return dataclasses.field(default=default, metadata={KEY: Option(help, group, **said)})


def one_of(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def nearest(wrong: Any, names: Iterable[Any]) -> str:
    """``Did you mean 'NAME'?``, or "" where none is like it."""
    close = difflib.get_close_matches(str(wrong), [str(name) for name in names], 1)
    return f"Did you mean {close[0]!r}?" if close else ""
