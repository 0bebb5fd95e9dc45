"""What the values of some options stand for."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_tools.errors import UsageError
from lora_tools.formats.adapters.consumers import CONSUMERS, Consumer
from lora_tools.formats.regular_files import read_file
from lora_tools.linalg.layouts import Layout, named
from lora_tools.options.fields import nearest

_MOST_TEXT = 1 << 30
_SHOWN = 6  # ends of names
_HANDED_OVER = re.compile(r"/dev/stdin|(/dev|/proc/self)/fd/\d+")


def read_text(path: Path) -> str:
    """A UTF-8 file that an option names, or a pipe that is open already, as a shell hands it over.

    Raises:
        UsageError: it is none, or larger than 1 GiB.
    """
    try:
        if _HANDED_OVER.fullmatch(str(path)) and path.is_fifo():
            with path.open("rb") as file:
                data = file.read(_MOST_TEXT + 1)
            if len(data) > _MOST_TEXT:
                raise UsageError(f"{path}: more than {_MOST_TEXT:,} bytes")
        else:
            data = read_file(path, UsageError, _MOST_TEXT)
        return data.decode().replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8 text") from None


class NameFilter:
    """Whether a module name is chosen: some ``include`` is found in it and no ``exclude`` is."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        """
        Raises:
            UsageError: a pattern is not a regular expression.
        """
        try:
            self._include, self._exclude = (
                [re.compile(p) for p in given] for given in (include, exclude)
            )
        except re.error as error:
            raise UsageError(f"{error.pattern!r} is not a regular expression: {error}") from None

    def __call__(self, name: str) -> bool:
        if self._include and not any(p.search(name) for p in self._include):
            return False
        return not any(p.search(name) for p in self._exclude)

    def refuse_idle(self, names: Iterable[str]) -> None:
        """Raises UsageError for a pattern that is found in none of the names there are; where there
        is none, nobody is asked for them."""
        if not (self._include or self._exclude):
            return
        known = sorted(set(names))
        for flag, patterns in (("--include", self._include), ("--exclude", self._exclude)):
            for pattern in patterns:
                if not any(map(pattern.search, known)):
                    raise UsageError(
                        f"{flag} {pattern.pattern!r} matches no module name"
                        f"{_such(pattern.pattern, known)}"
                    )


def _such(wrong: str, names: Sequence[str]) -> str:
    """What was meant, else what there is."""
    if meant := nearest(wrong, sorted({part for name in names for part in name.split(".")})):
        return f"; d{meant[1:]}"
    if not names:
        return ""
    few = sorted({name.rpartition(".")[2] for name in names})[:_SHOWN]
    return f"; names end in {', '.join(few)}{', …' if len(few) == _SHOWN else ''}"


def layer_kinds(given: Sequence[str]) -> list[tuple[re.Pattern[str], Layout | None]]:
    """``REGEX=KIND`` → the pattern on module names, and the kind. Raises UsageError."""
    kinds = []
    for text in given:
        regex, equals, kind = text.rpartition("=")
        if not (equals and regex):
            raise UsageError(f"--layout {text!r}: REGEX=KIND is needed")
        try:
            kinds.append((re.compile(regex), named(kind)))
        except re.error as error:
            raise UsageError(f"{regex!r} is not a regular expression: {error}") from None
    return kinds


def consumer_named(name: str) -> Consumer:
    """A row of the table. Raises UsageError."""
    if name not in CONSUMERS:
        raise UsageError(f"--for {name!r}: one of {', '.join(CONSUMERS)} is needed")
    return CONSUMERS[name]


def enable_lora(text: str | None) -> tuple[bool, ...]:
    """``1,0,1`` → (True, False, True). Raises UsageError."""
    if not text:
        return ()
    words = [word.strip().lower() for word in text.split(",")]
    if not all(word in ("0", "1", "true", "false") for word in words):
        raise UsageError(f"--enable-lora {text!r}: such as 1,0,1 is needed, one for each block")
    return tuple(word in ("1", "true") for word in words)
