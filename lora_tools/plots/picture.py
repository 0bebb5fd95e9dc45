"""What is drawn, however it is drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from itertools import cycle, islice, product

from lora_tools.printable import printable, shortened

_WIDE = 5  # colours follow the logarithm of values that spread wider than this
_DEEP = 100  # a floor that lies this far below every value is not drawn
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8E6BBF", "#888888")
_DASHES = ("solid", "dash", "dashdot")  # dotted are noise floors
# More lines than this cannot be told apart.
MOST_LINES = len(_COLOURS) * len(_DASHES)


@dataclasses.dataclass(frozen=True)
class Line:
    """One module's singular values, its noise floor (or NaN) and its rank (or None)."""

    label: str
    values: Sequence[float]
    floor: float
    rank: int | None

    @property
    def ranked(self) -> bool:
        """Whether the value at its rank is known."""
        return self.rank is not None and 0 < self.rank <= len(self.values)


@dataclasses.dataclass(frozen=True)
class Picture:
    """What is drawn: a heat map of kinds × layers, spectra, and error against size by name.

    Attributes:
        lines: of each kind one, of many kinds those that changed most, ``MOST_LINES`` at most.
        marks: points of the curves with a name, at a size.
        note: what the title's figure and the map's colours are.
        details: for each cell of the map its module and figures, a line each.
    """

    title: str
    heat: Sequence[Sequence[float]]
    rows: Sequence[str]
    columns: Sequence[str]
    heat_label: str
    lines: Sequence[Line]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    marks: Sequence[tuple[str, float, float]]
    note: str = ""
    details: Sequence[Sequence[Sequence[str]]] = ()

    @property
    def values(self) -> list[float]:
        """Of the map, those that a colour stands for."""
        return [v for row in self.heat for v in row if math.isfinite(v) and v > 0]

    @property
    def wide(self) -> bool:
        """Whether colours follow the logarithm; else they start at zero."""
        return max(self.values, default=1) > _WIDE * min(self.values, default=1)

    @property
    def heat_title(self) -> str:
        """What the map shows."""
        return f"{self.heat_label.split(',')[0].capitalize()}, by layer and kind of module"

    @property
    def scale_label(self) -> str:
        """What its colours stand for, and how."""
        return f"{self.heat_label} (logarithmic)" if self.wide else self.heat_label

    @property
    def floors(self) -> list[float]:
        """The noise floors that are drawn."""
        lowest = min((min(line.values) for line in self.lines), default=1)
        return [x.floor for x in self.lines if math.isfinite(x.floor) and x.floor > lowest / _DEEP]

    @property
    def spectra_title(self) -> str:
        """Whose spectra there are, and what is drawn beside the lines."""
        some = len(self.lines) < len(self.rows)
        of = f", {len(self.lines)} of {len(self.rows)} kinds" if some else ""
        marks = ["dot: rank"] if any(line.ranked for line in self.lines) else []
        if any(math.isfinite(line.floor) for line in self.lines):
            marks.append("dotted: noise floor" if self.floors else "noise floor far below")
        return "Spectra" + of + (f" ({'; '.join(marks)})" if marks else "")

    @property
    def directions(self) -> list[int]:
        """Ticks of the spectra."""
        longest = max((len(line.values) for line in self.lines), default=0)
        return [t for t in (1, 2, 4, 8, 16, 32, 64) if t <= longest]


LINES_TITLE = "the module of each kind that changed most"
CURVES_TITLE = "Error against size: three ways to share ranks"
CURVE_DASHES = ("solid", "dash", "solid")  # the second often lies on the first
CURVES_AXES = ("numbers in the factors", "relative error over all modules")


def styles(count: int) -> list[tuple[str, str]]:
    """(dash, colour) of that many lines, no two of them alike up to ``MOST_LINES``."""
    return list(islice(cycle(product(_DASHES, _COLOURS)), count))


def label(name: str, most: int = 48) -> str:
    """A name as it is drawn, in that many letters at most."""
    return shortened(printable(name), most, most // 3)
