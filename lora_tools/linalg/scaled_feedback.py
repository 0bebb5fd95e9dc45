"""Rounding errors fed forward (``linalg.error_feedback``) onto numbers times the scales of the
blocks that they lie in (``linalg.scaled``)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from lora_tools.linalg.codebooks import Array
from lora_tools.linalg.error_feedback import Column, Errors, Factor, feed_columns
from lora_tools.linalg.runs import FED_ROWS


def finite(values: torch.Tensor) -> torch.Tensor:
    """What codes stand for, (k,) float32, as ``Grid`` has it: ascending, finite, each once."""
    return torch.tensor(sorted({value for value in values.tolist() if math.isfinite(value)}))


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the numbers of a matrix may be, its scales given.

    Attributes:
        values: (k,) float32, ascending, of at most 256: what codes stand for.
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉) float32, what they are multiplied by.
        zeros: as ``scales``, what is taken off them before; 0 where they are not given.
    """

    values: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int]
    zeros: torch.Tensor | None = None

    def of_rows(self, rows: slice) -> tuple[Array, Array | None]:
        """Scales and zeros of some rows, (across, rows)."""
        at = np.arange(rows.start, rows.stop) // self.block[0]
        scales, zeros = (
            None if table is None else np.ascontiguousarray(table.float().numpy()[at].T)
            for table in (self.scales, self.zeros)
        )
        assert scales is not None
        return scales, zeros


def feed(x: torch.Tensor, back: torch.Tensor, grid: Grid, by: Factor, out: torch.Tensor) -> Errors:
    """Round ``x`` (m, n), each column with what those before it left of it.

    Args:
        back: (m, n), of the dtype that a reader has numbers in: what it makes of x rounded by
            itself, which the errors are compared with.
        out: (m, n) float32, takes the values of the grid that are chosen, not yet scaled.
    """
    total = Errors(0.0, 0.0, 0.0)
    values = grid.values.numpy()
    midpoints = (values[:-1] + values[1:]) / np.float32(2)
    of_column = by.order.numpy() // grid.block[1]
    for first in range(0, len(x), FED_ROWS):
        rows = slice(first, min(first + FED_ROWS, len(x)))
        A = x[rows].T[by.order].float()
        energy = by.error(A)
        cost = by.error(A - back[rows].T[by.order].float())
        column = Column(values, midpoints, A.shape[1], back.dtype)
        scales, zeros = grid.of_rows(rows)
        ranks, fed = feed_columns(A, scales, of_column, column, by, zeros)
        out[rows][:, by.order] = torch.from_numpy(values.take(ranks)).T
        total += Errors(cost, fed, energy)
    return total
