"""A matrix in runs of rows that stay in a core's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

RUN_ELEMENTS = 1 << 20  # numbers of a run that products are formed of
FED_ROWS = 2048  # of one whose errors are fed forward, even: rows do not depend on one another
FED_BYTES = 16  # then, for each element of R: it, in order, in order in float64
_STEPS = 1 << 18  # of one that many small steps are taken with: they want a cache of the core's own


def rows_per_run(shape: Sequence[int], numbers: int = RUN_ELEMENTS) -> int:
    """How many rows of a matrix make a run of about so many numbers."""
    return max(numbers // max(math.prod(shape[1:]), 1), 1)


def row_runs(rows: int, cols: int, numbers: int = _STEPS) -> Iterator[tuple[int, int]]:
    """(start, stop) over all rows, a run of them at a time."""
    step = rows_per_run((rows, cols), numbers)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
