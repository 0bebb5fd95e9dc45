"""The difference of two stored tensors, formed in runs of rows that stay in cache."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch

from lora_tools.linalg import noise
from lora_tools.linalg.ranks import Rounding
from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs, rows_per_run
from lora_tools.linalg.truncation import EPS, sum_of_squares


@dataclasses.dataclass(frozen=True)
class Energies:
    """‖Δ‖²_F and ‖W_base‖²_F, and what rounding may have put into Δ: ``rounding``, where it was
    asked for.

    ``noise`` estimates the largest singular value that rounding the tuned weight to its stored
    dtype can have caused: element errors of variance ulp²/12 give a random matrix whose norm is
    about σ(√rows + √cols). Only for float32 and wider: in half precision a change is often smaller
    than an ulp and this edge would hide real directions, so there it is 0.
    """

    delta: float
    base: float
    noise: float
    rounding: Rounding | None = None


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
        for start, stop in row_runs(rows, cols, RUN_ELEMENTS):
            run, base = out[: stop - start], wide[: stop - start]
            run.copy_(self._tuned[start:stop])
            base.copy_(self._base[start:stop])
            self.base_energy += sum_of_squares(base)
            run.sub_(base)
            yield start, stop, run
            self._done(start, stop)

    def fill(
        self, out: torch.Tensor, rounding: bool = False, quantization: float = 0.0
    ) -> Energies:
        """Write Δ into ``out`` (rows, cols), rounded to its dtype, and measure it unrounded; with
        ``rounding`` also what rounding can have put into it, to the dtypes of both sides and, with
        the energy ``quantization``, to codes that were decoded into them."""
        energy = 0.0
        seen = _RoundingSums(self.shape) if rounding else None
        for start, stop, run in self.runs():
            energy += sum_of_squares(run)
            out[start:stop] = run
            if seen is not None:
                seen.add(start, stop, run, self._tuned[start:stop], self._base[start:stop])
        return Energies(
            energy,
            self.base_energy,
            self._noise(energy),
            seen.result(quantization)
            if seen is not None and energy and math.isfinite(energy)
            else None,
        )

    def measure(self) -> Energies:
        """What ``fill`` measures, without keeping Δ."""
        energy = sum(sum_of_squares(run) for _, _, run in self.runs())
        return Energies(energy, self.base_energy, self._noise(energy))

    def _noise(self, energy: float) -> float:
        stored = (self._tuned.dtype, self._base.dtype)
        if any(d not in (torch.float32, torch.float64) for d in stored):
            return 0.0
        rows, cols = self.shape
        unit = EPS if torch.float32 in stored else torch.finfo(torch.float64).eps
        rms = (math.sqrt(self.base_energy) + math.sqrt(energy)) / math.sqrt(max(rows * cols, 1))
        return unit * rms / math.sqrt(12) * (math.sqrt(rows) + math.sqrt(cols))


class _RoundingSums:
    """What rounding can have put into Δ, with its row and column variances, summed run by run.

    An element that moved by more than an ulp has an error of variance ulp²/12. Where nothing moves
    by so much and the base lies on the grid of the tuned dtype, most elements are not moved at all,
    and errors are as rare as moves are: then a row's noise is bounded by what is seen of it, Σ Δ².
    So is each column's.
    """

    def __init__(self, shape: tuple[int, int]) -> None:
        rows, cols = shape
        self._up_rows, self._seen_rows = torch.zeros(2, rows, dtype=torch.float64)
        self._up_cols, self._seen_cols = torch.zeros(2, cols, dtype=torch.float64)
        self._space: torch.Tensor | None = None

    def add(
        self, start: int, stop: int, run: torch.Tensor, tuned: torch.Tensor, base: torch.Tensor
    ) -> None:
        """Rows [start, stop) of Δ, and of both sides as they are stored."""
        if self._space is None:
            self._space = torch.empty(2, *run.shape, dtype=run.dtype)
        ulps, other = self._space[:, : stop - start]
        one, two = torch.finfo(tuned.dtype), torch.finfo(base.dtype)
        noise.magnitude_(ulps.copy_(tuned), one.tiny).square_()
        noise.magnitude_(other.copy_(base), two.tiny)
        ulps.addcmul_(other, other, value=(two.eps / one.eps) ** 2)
        seen = torch.mul(run, run, out=other)
        unit = one.eps**2
        self._up_rows[start:stop] = ulps.sum(1).double() * unit
        self._up_cols += ulps.sum(0).double() * unit
        self._seen_rows[start:stop] = seen.sum(1)
        self._seen_cols += seen.sum(0)

    def result(self, quantization: float) -> Rounding:
        """Of all rows together. How the noise of codes lies over rows and columns is not known:
        then it is taken to lie as Δ does, most of which it is where it matters."""
        rows, cols = self._seen_rows, self._seen_cols
        if not quantization:
            rows = torch.minimum(self._up_rows / 12, rows)
            cols = torch.minimum(self._up_cols / 12, cols)
        energy = float(self._up_rows.sum()) / 12 + quantization
        return Rounding(energy, noise.edge(rows, cols))
