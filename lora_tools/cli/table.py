"""Tables that fit where they are printed: a number is never cut, a name only in its middle, and
what had to stay away is said."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence

from lora_tools.printable import printable, shortened

_GAP = "  "
_NAME = 28  # letters of a name that are worth more than another column
_LEAST = 8
_COMPARED = 1000  # names, among which it is looked for where to cut
_TEXT = 24  # letters of a line of text, below which it stays away


@dataclasses.dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        cells: one for each row.
        rank: those of the highest go first where there is no room for all; of 0 never.
        kind: "name": on the left, shortened in the middle; "number": on the right; "word": on the
            left; "text": on the left, in several lines.
    """

    title: str
    cells: Sequence[str]
    rank: int = 0
    kind: str = "number"

    @property
    def width(self) -> int:
        """Letters of its widest cell."""
        return max(map(len, (self.title, *self.cells)))


def lines(columns: Iterable[Column], width: int | None) -> Iterator[str]:
    """The table, its head first, and a last line on what is not shown.

    Args:
        width: letters of a line; None: as long as they are.
    """
    given = [dataclasses.replace(c, cells=[printable(cell) for cell in c.cells]) for c in columns]
    if width is None or _needed(given) <= width:
        yield from _drawn(given, None)
        return
    name, prefix = _without_prefix(given[0])
    shown = [name, *given[1:]]
    while _least(shown) > width and any(column.rank for column in shown):
        worst = max(range(len(shown)), key=lambda i: (shown[i].rank, i))
        del shown[worst]
    if prefix:
        yield f"all names begin with {prefix}"
    yield from _drawn(_fitted(shown, width), width)
    kept = {column.title for column in shown}
    away = [column.title for column in given if column.title not in kept]
    if away:
        yield f"(no room for: {', '.join(away)}; {_needed(given)} columns show all)"


def _needed(columns: Sequence[Column]) -> int:
    return sum(c.width for c in columns) + len(_GAP) * (len(columns) - 1)


def _least(columns: Sequence[Column]) -> int:
    """How narrow they can be."""
    least = {"name": _NAME, "text": _TEXT}
    widths = [min(c.width, least.get(c.kind, c.width)) for c in columns]
    return sum(widths) + len(_GAP) * (len(columns) - 1)


def _without_prefix(column: Column) -> tuple[Column, str]:
    """The column without what all its names begin with, up to a dot, where that is much."""
    cells = list(column.cells)
    parts = [cell.split(".") for cell in cells]
    same = 0
    for each in zip(*(p[:-1] for p in parts), strict=False):
        if len(set(each)) > 1:
            break
        same += 1
    prefix = ".".join(parts[0][:same]) + "." if parts and same else ""
    if len(cells) < 2 or len(prefix) < _LEAST:
        return column, ""
    return dataclasses.replace(column, cells=[cell[len(prefix) :] for cell in cells]), prefix


def _fitted(columns: Sequence[Column], width: int) -> list[Column]:
    """Names shortened so that all fits, as far as that goes; text is wrapped later."""
    name = columns[0]
    others = sum(min(c.width, _TEXT) if c.kind == "text" else c.width for c in columns[1:])
    room = width - others - len(_GAP) * (len(columns) - 1)
    cells = short_names(name.cells, max(room, _LEAST))
    return [dataclasses.replace(name, cells=cells), *columns[1:]]


def short_names(names: Sequence[str], width: int) -> list[str]:
    """Names in so many letters, without that part of their middles by which most stay apart: those
    of two layers can differ near the beginning only."""
    usual = min(6, width // 4)
    long = [name for name in names[:_COMPARED] if len(name) > width]
    different = len(set(long))

    def alike(head: int) -> int:
        return different - len({shortened(name, width, head) for name in long})

    heads = (usual, *range(usual + 1, width - 1))
    head = next((h for h in heads if not alike(h)), None)
    head = min(heads, key=alike) if head is None else head
    return [shortened(name, width, head) for name in names]


def short_name(name: str, width: int) -> str:
    """A name in so many letters."""
    return short_names([name], width)[0]


def _drawn(columns: Sequence[Column], width: int | None) -> Iterator[str]:
    widths = [column.width for column in columns]
    if width is not None and columns[-1].kind == "text":
        widths[-1] = max(width - sum(widths[:-1]) - len(_GAP) * (len(columns) - 1), _TEXT)
    yield _row([c.title for c in columns], columns, widths)
    for cells in zip(*(c.cells for c in columns), strict=True):
        wrapped = textwrap.wrap(cells[-1], widths[-1]) if columns[-1].kind == "text" else []
        yield _row([*cells[:-1], wrapped[0]] if wrapped else cells, columns, widths)
        for more in wrapped[1:]:
            yield _row([*[""] * (len(columns) - 1), more], columns, widths)


def _row(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    placed = [
        cell.rjust(n) if column.kind == "number" else cell.ljust(n)
        for cell, column, n in zip(cells, columns, widths, strict=True)
    ]
    return _GAP.join(placed).rstrip()
