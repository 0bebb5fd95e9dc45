"""The difference of two stored tensors, formed in runs of rows that stay in cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from lora_tools.linalg import noise
from lora_tools.linalg.lora import rows_per_run
from lora_tools.linalg.ranks import Rounding
from lora_tools.linalg.svd import EPS, sum_of_squares


@dataclasses.dataclass(frozen=True)
class Energies:
    """‖Δ‖²_F and ‖W_base‖²_F, and what rounding may have put into Δ.

    ``noise`` estimates the largest singular value that rounding the tuned weight to its stored
    dtype can have caused: element errors of variance ulp²/12 give a random matrix whose norm is
    about σ(√rows + √cols). Only for float32 and wider: in half precision a change is often smaller
    than an ulp and this edge would hide real directions, so there it is 0.
    """

    delta: float
    base: float
    noise: float


class Delta:
    """tuned − base for two tensors of one shape (rows, cols), in float32 or better.

    Args:
        done: hears of rows [start, stop) each time they have been read.
    """

    def __init__(
        self,
        tuned: torch.Tensor,
        base: torch.Tensor,
        done: Callable[[int, int], None] = lambda start, stop: None,
    ) -> None:
        self._tuned, self._base, self._done = tuned, base, done
        wide = torch.float64 in (tuned.dtype, base.dtype)
        self.dtype = torch.float64 if wide else torch.float32
        self.shape = (tuned.shape[0], tuned.shape[1])
        self.base_energy = 0.0

    def runs(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) over all rows; each run's tensor is reused for the next."""
        rows, cols = self.shape
        step = min(rows_per_run(self.shape), rows)
        out, wide = torch.empty(2, step, cols, dtype=self.dtype)
        self.base_energy = 0.0
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            run, base = out[: stop - start], wide[: stop - start]
            run.copy_(self._tuned[start:stop])
            base.copy_(self._base[start:stop])
            self.base_energy += sum_of_squares(base)
            run.sub_(base)
            yield start, stop, run
            self._done(start, stop)

    def fill(self, out: torch.Tensor) -> Energies:
        """Write Δ into ``out`` (rows, cols), rounded to its dtype, and measure it unrounded."""
        energy = 0.0
        for start, stop, run in self.runs():
            energy += sum_of_squares(run)
            out[start:stop] = run
        return Energies(energy, self.base_energy, self._noise(energy))

    def measure(self) -> Energies:
        """What ``fill`` measures, without keeping Δ."""
        energy = sum(sum_of_squares(run) for _, _, run in self.runs())
        return Energies(energy, self.base_energy, self._noise(energy))

    def rounding(self) -> Rounding:
        """What rounding can have put into Δ, with its row and column variances.

        An element that moved by more than an ulp has an error of variance ulp²/12. Where nothing
        moves by so much and the base lies on the grid of the tuned dtype, most elements are not
        moved at all, and errors are as rare as moves are: then a row's noise is bounded by what is
        seen of it, Σ Δ². So is each column's.
        """
        rows, cols = self.shape
        up_rows, seen_rows = torch.zeros(2, rows, dtype=torch.float64)
        up_cols, seen_cols = torch.zeros(2, cols, dtype=torch.float64)
        for start, stop, run in self.runs():
            squared = noise.spacing(self._tuned[start:stop]).to(self.dtype).square_()
            squared += noise.spacing(self._base[start:stop]).to(self.dtype).square_()
            seen = run.square()
            up_rows[start:stop], seen_rows[start:stop] = squared.sum(1), seen.sum(1)
            up_cols += squared.sum(0)
            seen_cols += seen.sum(0)
        edge = noise.edge(
            torch.minimum(up_rows / 12, seen_rows), torch.minimum(up_cols / 12, seen_cols)
        )
        return Rounding(float(up_rows.sum()) / 12, edge)

    def _noise(self, energy: float) -> float:
        stored = (self._tuned.dtype, self._base.dtype)
        if any(d not in (torch.float32, torch.float64) for d in stored):
            return 0.0
        rows, cols = self.shape
        unit = EPS if torch.float32 in stored else torch.finfo(torch.float64).eps
        rms = (math.sqrt(self.base_energy) + math.sqrt(energy)) / math.sqrt(max(rows * cols, 1))
        return unit * rms / math.sqrt(12) * (math.sqrt(rows) + math.sqrt(cols))
