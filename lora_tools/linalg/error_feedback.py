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
import functools
from collections.abc import Iterator

import numpy as np
import torch

from lora_tools.linalg.codebooks import Array, Codebook
from lora_tools.linalg.nf4 import TINY, dequantize_stored, packed_size
from lora_tools.linalg.runs import FED_ROWS
from lora_tools.linalg.truncation import sum_of_squares

DAMPING = 0.01  # GPTQ's
_COLUMNS = 64  # whose errors are fed one by one; on those after them all at once
_PANEL = 128  # columns of a factor at a time
_TRIES = 4  # dampings, each ten times the one before


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
        for start in range(0, len(E), _PANEL):
            block = slice(start, min(start + _PANEL, len(E)))
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


def order_of(diagonal: torch.Tensor) -> torch.Tensor:
    """The columns in the order that they are rounded in ("act order")."""
    return torch.argsort(diagonal, descending=True, stable=True)


def factor(moment: torch.Tensor) -> Factor | None:
    """The factor of R (n, n) float32; None where it is no second moment, or of nothing but zeros.

    What has no inverse, such as the moment of fewer inputs than it has rows, gets one by the
    damping; where rounding has made it indefinite beyond that, more of it is tried.
    """
    diagonal = moment.diagonal()
    mean = float(diagonal.double().mean())
    if not mean > 0 or bool((diagonal < 0).any()):
        return None
    order = order_of(diagonal)
    last = order.flip(0)  # the factor of the reverse, reversed, is upper triangular
    for i in range(_TRIES):
        damping = DAMPING * 10**i * mean
        L = moment.index_select(0, last).index_select(1, last).double()
        L.diagonal().copy_(diagonal[last].double() + damping)
        if _cholesky(L):
            scale = L.diagonal().clone()
            U = L.div_(scale).float()
            del L
            return Factor(order, U.tril_().flip(0, 1), scale.flip(0), damping)
    return None


def _cholesky(A: torch.Tensor) -> bool:
    """The lower triangle of A (n, n) becomes that of its Cholesky factor; False where it has none.

    By panels, each less the product of those before it: most of the work is then a matrix product,
    which LAPACK as it comes with torch leaves to half its speed at a width of 1536.
    """
    for start in range(0, len(A), _PANEL):
        panel = slice(start, start + _PANEL)
        if start:
            A[start:, panel].addmm_(A[start:, :start], A[panel, :start].T, alpha=-1)
        L, info = torch.linalg.cholesky_ex(A[panel, panel])
        if info:
            return False
        A[panel, panel] = L
        below = A[start + _PANEL :, panel]
        below.copy_(torch.linalg.solve_triangular(L.T, below, upper=True, left=False))
    return True


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
    table, back_in_place = torch.from_numpy(codebook.table), torch.argsort(by.order)
    for first in range(0, len(x), FED_ROWS):
        rows = x[first : first + FED_ROWS]
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
        lies = torch.from_numpy(ranks).index_select(0, back_in_place).T.contiguous()
        codebook.order.take(lies.view(-1).numpy(), out=codes[: rows.numel()], mode="clip")
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
    inverse = 1 / np.where(np.abs(scales) < TINY, TINY, scales)
    ranks = np.empty((n, m), np.uint8)
    costs = torch.empty(n, dtype=torch.float64)
    T = torch.empty(_COLUMNS, m)
    for start in range(0, n, _COLUMNS):
        stop = min(start + _COLUMNS, n)
        block, errors = T[: stop - start].copy_(A[start:stop]), A[start:stop]
        if start:
            block.addmm_(by.U[:start, start:stop].T, A[:start])
        before, weights = errors.T, by.U[start:stop, start:stop].T.contiguous().unbind()
        rows = zip(block.unbind(), block.numpy(), errors.numpy(), strict=True)
        for k, (row, target, error) in enumerate(rows):
            if k:
                row.addmv_(before.narrow(1, 0, k), weights[k].narrow(0, 0, k))
            at = of_column[start + k]
            zero = None if zeros is None else zeros[at]
            back = column.round(target, scales[at], inverse[at], ranks[start + k], zero)
            np.subtract(error, back, out=error)
            np.subtract(target, back, out=target)
        costs[start:stop] = block.square().sum(1)
    cost = float(by.diagonal.square() @ costs)
    return ranks, max(cost - by.damping * sum_of_squares(A), 0.0)


@functools.lru_cache
def _cells(midpoints: bytes) -> tuple[Array, Array]:
    """For each upper half of a float32: how many midpoints (k,) float32 are below all numbers that
    have it, (65536,) uint8; and those among them, (j, 65536) float32, inf where there are fewer."""
    middle = np.frombuffer(midpoints, np.float32)
    own = (middle.view(np.uint32) >> 16).astype(np.int64)
    first = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    below = np.searchsorted(middle, first)
    np.subtract.at(below, own, middle < first[own])
    among = np.full((np.bincount(own).max(initial=0), 1 << 16), np.inf, np.float32)
    for cell in set(own.tolist()):
        mine = middle[own == cell]
        among[: len(mine), cell] = mine
    return below.astype(np.uint8), among


class Column:
    """Rounds m numbers to the nearest of ascending values (k,) times their scales, as ``nf4`` does;
    what a reader has of them it rounds to ``dtype``.

    A number's upper half tells all midpoints that it is above but for the few (mostly one, or none)
    that share it, and is looked up: several times as fast as a search, and as exact. In numpy,
    which takes less time than torch before it begins: there are but some hundred numbers.
    """

    def __init__(self, values: Array, midpoints: Array, m: int, dtype: torch.dtype) -> None:
        self._values = values
        self._below, self._among = _cells(midpoints.tobytes())
        self._scaled, self._middle = np.empty(m, np.float32), np.empty(m, np.float32)
        self._upper = self._scaled.view(np.uint16)[1::2]
        self._above = np.empty(m, np.bool_)
        self._back, self._narrow = torch.empty(m), torch.empty(m, dtype=dtype)
        self._into = self._back.numpy()

    def round(
        self, x: Array, scales: Array, inverse: Array, ranks: Array, zeros: Array | None = None
    ) -> Array:
        """What x (m,) comes to, as a reader has it; ranks (m,) takes the values' ranks."""
        np.multiply(x, inverse, out=self._scaled)
        if zeros is not None:
            np.add(self._scaled, zeros, out=self._scaled)
        self._below.take(self._upper, out=ranks, mode="wrap")
        for middle in self._among:
            middle.take(self._upper, out=self._middle, mode="wrap")
            np.greater(self._scaled, self._middle, out=self._above)
            np.add(ranks, self._above.view(np.uint8), out=ranks)
        self._values.take(ranks, out=self._into, mode="clip")
        if zeros is not None:
            np.subtract(self._into, zeros, out=self._into)
        np.multiply(self._into, scales, out=self._into)
        if self._narrow.dtype != torch.float32:
            self._back.copy_(self._narrow.copy_(self._back))
        return self._into
