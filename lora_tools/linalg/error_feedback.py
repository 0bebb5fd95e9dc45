"""Codes on a stored grid whose errors make up for one another in a layer's outputs: GPTQ (arXiv
2210.17323), for scales that are there already.

A weight W (m, n) that is read back as W − E costs E‖Ex‖² = tr(E R Eᵀ) of the layer's outputs, with
R = E[xxᵀ] of its inputs. Let R + λI = U Uᵀ, U upper triangular. Column j of E U is then made of the
columns up to j of E alone, and is least where w_j + Σ_{i<j} e_i U_ij / U_jj is rounded to the
nearest value: the columns are rounded one after the other, each with what those before it left.
That is GPTQ, said as Babai's nearest plane (arXiv 2507.18553), without GPTQ's inverse; ‖E U‖² is
known on the way. The damping λ is a share of R's mean diagonal, and the columns are taken from the
largest of that diagonal on, since what comes last cannot be made up for ("act order").

Any order will do, and blocks may lie however they like, since scales do not depend on the codes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from lora_tools.linalg.codebooks import Array, Codebook
from lora_tools.linalg.nf4 import TINY, dequantize_stored, packed_size
from lora_tools.linalg.truncation import sum_of_squares

DAMPING = 0.01  # GPTQ's
ROWS = 2048  # at a time, even: rows do not depend on one another
_COLUMNS = 64  # whose errors are fed one by one; on those after them all at once
_TRIES = 4  # dampings, each ten times the one before
BYTES_EACH = 24  # working memory for each element of R: it, in order and twice in float64


@dataclasses.dataclass(frozen=True)
class Factor:
    """U Uᵀ = R + damping·I, its rows and columns in ``order``.

    It weighs the columns of a matrix as ``weighting.Weighting`` does (``lora.Weighs``): what R^½ is
    good for, any S with S Sᵀ = R is, and this one is there.

    Attributes:
        order: (n,) the columns in the order that they are rounded in.
        U: (n, n) float32, each column divided by its diagonal element.
        diagonal: (n,) those elements, float64.
    """

    order: torch.Tensor
    U: torch.Tensor
    diagonal: torch.Tensor
    damping: float

    def error(self, E: torch.Tensor) -> float:
        """tr(E R Eᵀ) of E (n, m), its rows in ``order``."""
        total = 0.0
        for block, product in self._products(E):
            total += float(self.diagonal[block].square() @ product.square().sum(1).double())
        return max(total - self.damping * sum_of_squares(E), 0.0)

    def _products(self, E: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Uᵀ E of E (n, m), its rows in ``order``, in runs of rows, U's zeros left out."""
        for start in range(0, len(E), 4 * _COLUMNS):
            block = slice(start, min(start + 4 * _COLUMNS, len(E)))
            yield block, self.U[: block.stop, block].T @ E[: block.stop]

    def apply(self, A: torch.Tensor) -> torch.Tensor:
        """A (m, n) float32 becomes, in its own place, A·S with S Sᵀ = R + damping·I."""
        for block, product in self._products(A.T[self.order]):
            A[:, block] = product.mul_(self.diagonal[block].float()[:, None]).T
        return A

    def undo(self, A: torch.Tensor) -> torch.Tensor:
        """A (r, n) float64 → A·S⁻¹."""
        given = A / self.diagonal
        wide = self.U.double()
        return self._back(
            torch.linalg.solve_triangular(wide, given, upper=True, left=False, unitriangular=True)
        )

    def moment(self, A: torch.Tensor) -> torch.Tensor:
        """A (r, n) float64 → A·(R + damping·I)."""
        wide = self.U.double()
        return self._back(((A[:, self.order] @ wide) * self.diagonal.square()) @ wide.T)

    def _back(self, A: torch.Tensor) -> torch.Tensor:
        """Columns in ``order`` → as they lie."""
        out = torch.empty_like(A)
        out[:, self.order] = A
        return out


def factor(moment: torch.Tensor) -> Factor | None:
    """The factor of R (n, n) float32; None where it is no second moment, or of nothing but zeros.

    What has no inverse, such as the moment of fewer inputs than it has rows, gets one by the
    damping; where rounding has made it indefinite beyond that, more of it is tried.
    """
    diagonal = moment.diagonal()
    mean = float(diagonal.double().mean())
    if not mean > 0 or bool((diagonal < 0).any()):
        return None
    order = torch.argsort(diagonal, descending=True, stable=True)
    last = order.flip(0)  # the factor of the reverse, reversed, is upper triangular
    wide = moment[last][:, last].double()
    for i in range(_TRIES):
        damping = DAMPING * 10**i * mean
        wide.diagonal().copy_(diagonal[last].double() + damping)
        L, info = torch.linalg.cholesky_ex(wide)
        if not info:
            del wide
            scale = L.diagonal().clone()
            L /= scale
            return Factor(order, L.float().flip(0, 1), scale.flip(0), damping)
    return None


@dataclasses.dataclass(frozen=True)
class Errors:
    """tr(E R Eᵀ) of codes rounded by themselves and of fed ones, and tr(W R Wᵀ)."""

    plain: float
    fed: float
    energy: float

    def unfed(self) -> Errors:
        """Where the codes rounded by themselves stay."""
        return dataclasses.replace(self, fed=self.plain)

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.plain + other.plain, self.fed + other.fed, self.energy + other.energy)


def feed(
    x: torch.Tensor,
    plain: Array,
    scales: Array,
    codebook: Codebook,
    blocksize: int,
    by: Factor,
    out: Array,
) -> Errors:
    """Codes of ``x`` (m, n), of any float dtype, that are fed with each other's errors, into
    ``out`` (⌈mn/2⌉,) uint8.

    Args:
        plain: (⌈mn/2⌉,) uint8, the codes that the errors are compared with.
        scales: (blocks,) float32 as a reader works with them, of blocks of ``x`` row by row.
    """
    total, n = Errors(0.0, 0.0, 0.0), x.shape[1]
    table = torch.from_numpy(codebook.table)
    for first in range(0, len(x), ROWS):
        rows = x[first : first + ROWS]
        A = rows.T[by.order].float()
        energy = by.error(A)
        back = torch.empty(rows.numel(), dtype=x.dtype)
        dequantize_stored(torch.from_numpy(plain), scales, table, blocksize, back, first * n)
        cost = by.error(A - back.view(rows.shape).T[by.order].float())
        grid = _grid(scales, first, rows.shape, blocksize, by.order)
        column = Column(codebook.table[codebook.order], codebook.midpoints, len(rows), x.dtype)
        ranks, fed = feed_columns(A, *grid, column, by)
        codes = np.empty(2 * packed_size(rows.numel()), np.uint8)
        codes[-1] = codebook.order[np.count_nonzero(codebook.midpoints < 0)]  # the number 0
        codes[: rows.numel()].reshape(rows.shape)[:, by.order.numpy()] = codebook.order[ranks].T
        start = first * n // 2
        out[start : start + len(codes) // 2] = codes[::2] << 4 | codes[1::2]
        total += Errors(cost, fed, energy)
    return total


def _grid(
    scales: Array, first: int, shape: torch.Size, blocksize: int, order: torch.Tensor
) -> tuple[Array, Array]:
    """Scales (k, rows), and which row of them each column, in order, goes by (n,)."""
    rows, n = shape
    if n % blocksize == 0:
        each = n // blocksize
        own = scales[first * each : (first + rows) * each].reshape(rows, each)
        return np.ascontiguousarray(own.T), order.numpy() // blocksize
    at = np.arange(first, first + rows)[None] * n + order.numpy()[:, None]
    return scales[at // blocksize], np.arange(n)


def feed_columns(
    A: torch.Tensor,
    scales: Array,
    of_column: Array,
    column: Column,
    by: Factor,
    zeros: Array | None = None,
) -> tuple[Array, float]:
    """Ranks (n, m) uint8 of the values that the columns, the rows of A (n, m), come to, and
    tr(E R Eᵀ); A becomes Eᵀ.

    Args:
        scales: (k, m) float32.
        of_column: (n,) which row of them each column goes by.
        zeros: (k, m) float32, the value that stands for 0; 0 itself where they are not given.
    """
    n, m = A.shape
    inverse = torch.from_numpy(1 / np.where(np.abs(scales) < TINY, TINY, scales))
    ranks = np.empty((n, m), np.uint8)
    costs = torch.empty(n, dtype=torch.float64)
    T = torch.empty(_COLUMNS, m)
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        block, errors = T[: stop - start].copy_(A[start:stop]), A[start:stop]
        if start:
            block.addmm_(by.U[:start, start:stop].T, A[:start])
        before, weights = errors.T, by.U[start:stop, start:stop].T.contiguous().unbind()
        for k, (target, error) in enumerate(zip(block.unbind(), errors.unbind(), strict=True)):
            if k:
                target.addmv_(before.narrow(1, 0, k), weights[k].narrow(0, 0, k))
            at = of_column[start + k]
            zero = None if zeros is None else zeros[at]
            back = column.round(target, scales[at], inverse[at], ranks[start + k], zero)
            error.sub_(back)
            target.sub_(back)
        costs[start:stop] = block.square().sum(1)
    cost = float(by.diagonal.square() @ costs)
    return ranks, max(cost - by.damping * sum_of_squares(A), 0.0)


class Column:
    """Rounds m numbers to the nearest of ascending values (k,) times their scales, as ``nf4`` does;
    what a reader has of them it rounds to ``dtype``."""

    def __init__(self, values: Array, midpoints: Array, m: int, dtype: torch.dtype) -> None:
        self._midpoints, self._values = torch.from_numpy(midpoints), values
        self._scaled, self._rank = torch.empty(m), torch.empty(m, dtype=torch.int64)
        self._back, self._narrow = torch.empty(m), torch.empty(m, dtype=dtype)
        self._into, self._ranks = self._back.numpy(), self._rank.numpy()
        self._scaled_array = self._scaled.numpy()

    def round(
        self,
        x: torch.Tensor,
        scales: Array,
        inverse: torch.Tensor,
        ranks: Array,
        zeros: Array | None = None,
    ) -> torch.Tensor:
        """What x (m,) comes to, as a reader has it; ranks (m,) takes the values' ranks."""
        torch.mul(x, inverse, out=self._scaled)
        if zeros is not None:
            np.add(self._scaled_array, zeros, out=self._scaled_array)
        torch.bucketize(self._scaled, self._midpoints, out=self._rank)
        np.copyto(ranks, self._ranks, casting="unsafe")
        self._values.take(self._ranks, out=self._into, mode="clip")
        if zeros is not None:
            np.subtract(self._into, zeros, out=self._into)
        np.multiply(self._into, scales, out=self._into)
        if self._narrow.dtype != torch.float32:
            self._back.copy_(self._narrow.copy_(self._back))
        return self._back
