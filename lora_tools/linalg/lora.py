"""The algebra of low-rank updates: scaling, deltas, fitting, DoRA, merging.

Weights are handled as stored. ``left`` (rows, r) and ``right`` (r, cols) are the stored factors of
a delta (see ``layouts``), so one formula serves every layer kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs
from lora_tools.linalg.truncation import TruncatedSVD, sum_of_squares


@dataclasses.dataclass(frozen=True)
class Fit:
    """‖Δ − factors‖²_F of factors as rounded, and the energy of the fit before rounding.

    ``weighted`` is ‖(Δ − factors) R^½‖²_F of factors as rounded; it is ``error`` where R is I.
    """

    error: float
    captured: float
    weighted: float


class Rows(Protocol):
    """A matrix that is read in runs of rows, as often as needed."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def runs(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) over all rows."""


class Weighs(Protocol):
    """Products with R (n, n) and with the inverse of some S, S Sᵀ = R, by which the columns of a
    matrix are weighted."""

    def undo(self, A: torch.Tensor) -> torch.Tensor:
        """A (r, n) → A·S⁻¹."""

    def moment(self, A: torch.Tensor) -> torch.Tensor:
        """A (r, n) → A·R."""


@dataclasses.dataclass(frozen=True)
class Whole:
    """A matrix in memory, as ``Rows``."""

    matrix: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.shape[0], self.matrix.shape[1]

    def runs(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Slices, without a copy."""
        for start, stop in row_runs(*self.shape, RUN_ELEMENTS):
            yield start, stop, self.matrix[start:stop]


def balanced_factors(
    svd: TruncatedSVD,
    delta: Rows,
    scale: float,
    dtype: torch.dtype,
    weighting: Weighs | None = None,
    total: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Fit]:
    """left (rows, r), right (r, cols) in ``dtype`` with scale · left @ right ≈ delta.

    Each factor takes √S. ``right`` is rounded first; ``left`` is then the least-squares fit to it,
    which undoes what rounding ``right`` cost and, being one more product with ``delta``, improves
    on the decomposition. The error of the rounded factors comes with it: with P = delta·rightᵀ and
    G = right·rightᵀ it is ‖delta‖² − 2⟨left, P⟩ + ⟨leftᵀleft, G⟩, in float64; where that cancels to
    nothing the residual is formed and summed instead.

    Args:
        weighting: R; ``svd`` is then that of delta·S with S Sᵀ = R, such as R^½, right =
            √S·Vh·S⁻¹, and the fit is the least-squares one of (delta − left @ right)·S.
        total: ‖delta‖²_F, where ``svd.total`` is not it.
    """
    device = svd.Vh.device
    total = svd.total if total is None else total
    balanced = svd.S.sqrt().to(device)[:, None] * svd.Vh.double()
    right = (balanced if weighting is None else weighting.undo(balanced)).to(dtype)
    wide = right.double()
    target = wide if weighting is None else weighting.moment(wide)
    G = target @ wide.T
    P = torch.empty(delta.shape[0], svd.rank, dtype=torch.float64, device=device)
    plain = P if weighting is None else torch.empty_like(P)
    one = 2.0 ** -math.frexp(float(target.abs().max()))[1]  # of tiny factors the products vanish
    for start, stop, run in delta.runs():
        here = run.to(device)
        P[start:stop] = here @ (target * one).to(run.dtype).T
        if weighting is not None:
            plain[start:stop] = here @ (wide * one).to(run.dtype).T
    P /= one
    if weighting is not None:
        plain /= one
    best = torch.linalg.solve(G, P, left=False)
    left = (best / scale).to(dtype)
    written = left.double() * scale
    error = _error(total, written, plain, wide @ wide.T)
    weighted = error if weighting is None else max(_error(svd.total, written, P, G), 0.0)
    if error < 1e-4 * total:
        error = residual_energy(delta, left, right, scale)
    return (
        left,
        right,
        Fit(error, float((best * P).sum()), error if weighting is None else weighted),
    )


def measured(svd: TruncatedSVD, delta: Rows) -> TruncatedSVD:
    """The decomposition of a copy of delta, its values as delta itself has them in the span of Vh:
    each is at most delta's own (Cauchy's interlacing), and together they miss ``svd.gain`` at most,
    so that the leading ones of any number do. Vh stays; U is left out."""
    span = torch.linalg.qr(svd.Vh.T.double()).Q
    P = torch.empty(delta.shape[0], svd.rank, dtype=torch.float64, device=span.device)
    for start, stop, run in delta.runs():
        P[start:stop] = run.to(span.device) @ span.to(run.dtype)
    squared = torch.linalg.eigvalsh(P.T @ P).flip(0).clamp(min=0).cpu()
    return dataclasses.replace(
        svd,
        U=svd.U[:, :0],
        S=squared.sqrt(),
        captured=float(squared.sum()),
        known=dataclasses.replace(svd.known, squared=squared, complete=False),
    )


def _error(total: float, left: torch.Tensor, P: torch.Tensor, G: torch.Tensor) -> float:
    return total - 2 * float((left * P).sum()) + float(((left.T @ left) * G).sum())


def no_factors(shape: Sequence[int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """left (rows, 0), right (0, cols): the factors of no change."""
    return torch.zeros(shape[0], 0, dtype=dtype), torch.zeros(0, shape[1], dtype=dtype)


def residual_energy(delta: Rows, left: torch.Tensor, right: torch.Tensor, scale: float) -> float:
    """‖delta − scale · left @ right‖²_F, run by run."""
    return math.fsum(
        sum_of_squares(
            torch.addmm(
                run.to(left.device),
                left[start:stop].to(run.dtype),
                right.to(run.dtype),
                alpha=-scale,
            )
        )
        for start, stop, run in delta.runs()
    )


def resize(
    left: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Exact SVD (U, S, Vh) of ``left @ right`` without forming it, in float64.

    QR of left and of rightᵀ, then an SVD of the r x r core: O((rows + cols) r²). Rows and columns
    that are zero stay exactly so (the channels of other groups in a grouped convolution).
    """
    Ql, Rl = torch.linalg.qr(left.double())
    Qr, Rr = torch.linalg.qr(right.double().T)
    U, S, Vh = torch.linalg.svd(Rl @ Rr.T, full_matrices=False)
    return Ql @ U * left.any(1, keepdim=True), S, Vh @ Qr.T * right.any(0, keepdim=True)


def difference_energy(
    one: tuple[torch.Tensor, torch.Tensor, float], other: tuple[torch.Tensor, torch.Tensor, float]
) -> float:
    """‖s₁·L₁R₁ − s₂·L₂R₂‖²_F of two (left, right, scale) products, without forming them: they are
    one product of the stacked factors."""
    (L1, R1, s1), (L2, R2, s2) = one, other
    left = torch.cat((L1.double() * s1, L2.double() * -s2), 1)
    right = torch.cat((R1.double(), R2.double()), 0)
    core = torch.linalg.qr(left, mode="r").R @ torch.linalg.qr(right.T, mode="r").R.T
    return float(core.square().sum())
