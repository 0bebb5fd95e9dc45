"""A matrix in runs of rows that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Iterator

_RUN = 1 << 16  # numbers


def row_runs(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """(start, stop) over all rows, a few of them at a time."""
    step = max(_RUN // max(cols, 1), 1)
    for start in range(0, rows, step):
        yield start, min(start + step, rows)
