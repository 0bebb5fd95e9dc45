"""Two small factors of a product: in another rank, another scale, another shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import overload

import torch

from lora_tools.linalg.layout import Layout, Shape, pad_rank
from lora_tools.linalg.lora import difference_energy, resize
from lora_tools.linalg.ranks import RankRule, Spectrum
from lora_tools.linalg.svd import top_directions
from lora_tools.linalg.truncation import Wanted

_EXACT = "resize"  # the method: QR of both factors and an SVD of the small core


@overload
def scaled(
    tensor: torch.Tensor, factor: float, dtype: torch.dtype | None = ...
) -> torch.Tensor: ...
@overload
def scaled(tensor: None, factor: float, dtype: torch.dtype | None = ...) -> None: ...
def scaled(
    tensor: torch.Tensor | None, factor: float, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """tensor · factor, rounded once to ``dtype``, by default the tensor's; of None, None."""
    if tensor is None:
        return None
    wide = tensor if factor == 1.0 else tensor.double() * factor
    return wide.to(dtype or tensor.dtype)


def padded(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (r', …) and lora_B (out, r', …) with zeros up to rank r: the product stays."""
    missing = r - A.shape[0]
    if not missing:
        return A, B
    above = A.new_zeros(missing, *A.shape[1:])
    beside = B.new_zeros(B.shape[0], missing, *B.shape[2:])
    return torch.cat((A, above)), torch.cat((B, beside), 1)


@dataclasses.dataclass(frozen=True)
class Resized:
    """lora_A and lora_B in a rank chosen anew: ``r`` is what lora_alpha is divided by."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    r: int
    total: float
    error: float


@dataclasses.dataclass(frozen=True)
class BestProduct:
    """The best product left (m, r) @ right (r, n) for a matrix Δ, in the dtype it is written in.

    Attributes:
        total: ‖Δ‖²_F.
        error: ‖Δ − left @ right‖²_F, as written.
        gain: how much more of ``total`` a better decomposition could hold.
        method: of the decomposition.
    """

    left: torch.Tensor
    right: torch.Tensor
    total: float
    error: float
    gain: float
    method: str

    @classmethod
    def nothing(
        cls, shape: Sequence[int], dtype: torch.dtype, total: float, method: str
    ) -> BestProduct:
        """Zeros of rank 1, which readers need."""
        left, right = torch.zeros(shape[0], 1, dtype=dtype), torch.zeros(1, shape[1], dtype=dtype)
        return cls(left, right, total, total, 0.0, method)


def best_of_product(
    left: torch.Tensor, right: torch.Tensor, rule: RankRule, dtype: torch.dtype
) -> BestProduct:
    """The best approximation of left (m, k) @ right (k, n), which is never formed, at the rank
    that the rule chooses: as ``lora.balanced_factors``, after an exact SVD."""
    U, S, Vh = resize(left, right)
    squared = S.square()
    total = float(squared.sum())
    shape = (left.shape[0], right.shape[1])
    wanted = Wanted(rule, Spectrum(squared[:0], total, True, shape))
    r = wanted.decide(wanted.spectrum(squared, complete=True)) if total else 0
    if not r:
        return BestProduct.nothing(shape, dtype, total, _EXACT)
    lora_A = (S[:r].sqrt()[:, None] * Vh[:r]).to(dtype)
    wide = lora_A.double()
    P = (U * S) @ (Vh @ wide.T)
    best: torch.Tensor = torch.linalg.solve(wide @ wide.T, P, left=False)
    lora_B = best.to(dtype)
    error = difference_energy((U * S, Vh, 1.0), (lora_B, lora_A, 1.0))
    gain = max(float(squared[:r].sum()) - float((best * P).sum()), 0.0)
    return BestProduct(lora_B, lora_A, total, error, gain, _EXACT)


def cut_factors(
    layout: Layout,
    products: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shapes: tuple[Shape, Shape],
    factor: float,
    rule: RankRule,
    dtype: torch.dtype,
    scaling: Callable[[int], float] = lambda r: 1.0,
) -> Resized:
    """Every product left (m, r) @ right (r, n) of a layer (``layout.split``), times ``factor``,
    with the rank that the rule chooses, and joined again, in ``dtype``.

    Exact: QR of both factors and an SVD of the small core, in float64 (``lora.resize``); the square
    roots of the singular values go to both sides. ``total`` and ``error`` are those of all products
    and measured after rounding; not finite where a factor is not.

    Args:
        shapes: of lora_A and lora_B at any rank.
        scaling: that of the new factors at their r; lora_B makes up for it.
    """
    if not all(each.isfinite().all() for product in products for each in product):
        A, B = layout.join(products, *shapes)
        return Resized(A, B, layout.r([A.shape[0] for _, A in products]), math.nan, math.nan)
    exact = [resize(left, right) for left, right in products]
    values = [S * abs(factor) for _, S, _ in exact]
    ranks = [top_directions(S, rule) for S in values]
    r = layout.r(ranks)
    scale = scaling(r)
    parts, error = [], 0.0
    for before, (U, _, Vh), S, rank in zip(products, exact, values, ranks, strict=True):
        root = S[:rank].sqrt()
        right = (root[:, None] * Vh[:rank]).to(dtype)
        left = (U[:, :rank] * root * (math.copysign(1.0, factor) / scale)).to(dtype)
        error += difference_energy((*before, factor), (left, right, scale))
        parts.append(pad_rank(left, right, max(ranks)))
    total = math.fsum(float((S * S).sum()) for S in values)
    return Resized(*layout.join(parts, *shapes), r, total, error)
