"""Rank policies: how many singular directions to keep, one function each in one table.

A policy sees the leading squared singular values known so far and the whole energy ‖Δ‖²_F, which
is known exactly before any factorisation. It answers with a rank, or None where the values known
so far do not decide it yet and the decomposition must look deeper.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Leading squared singular values, descending (float64), of a matrix.

    ``total`` is ‖Δ‖²_F; ``complete`` says that no further value stands above rounding.
    """

    squared: torch.Tensor
    total: float
    complete: bool


Policy = Callable[[Spectrum, float], "int | None"]


def fixed(spectrum: Spectrum, rank: float) -> int | None:
    """``rank`` directions, fewer where the matrix has fewer."""
    known = len(spectrum.squared)
    if known >= rank or spectrum.complete:
        return min(known, int(rank))
    return None


def energy(spectrum: Spectrum, share: float) -> int | None:
    """The smallest r with Σ_{i≤r} σ_i² ≥ share · ‖Δ‖²_F."""
    captured = spectrum.squared.cumsum(0)
    # A share of 1 is met at rounding level: the energy of a complete spectrum is all there is.
    rank = int((captured < share * spectrum.total).sum()) + 1
    known = len(spectrum.squared)
    if rank <= known:
        return rank
    return known if spectrum.complete else None


POLICIES: dict[str, Policy] = {"rank": fixed, "energy": energy}


@dataclasses.dataclass(frozen=True)
class RankRule:
    """A policy by name, its one number, and a cap that holds whatever the policy says."""

    policy: str
    value: float
    max_rank: int | None = None

    def __call__(self, spectrum: Spectrum) -> int | None:
        """The rank, or None where more of the spectrum must be known."""
        if self.max_rank is not None and len(spectrum.squared) > self.max_rank:
            spectrum = dataclasses.replace(
                spectrum, squared=spectrum.squared[: self.max_rank], complete=True
            )
        return POLICIES[self.policy](spectrum, self.value)

    def ceiling(self, rows: int, cols: int) -> int:
        """The largest rank this rule can choose for a matrix of that shape."""
        limits = [rows, cols]
        if self.policy == "rank":
            limits.append(int(self.value))
        if self.max_rank is not None:
            limits.append(self.max_rank)
        return min(limits)
