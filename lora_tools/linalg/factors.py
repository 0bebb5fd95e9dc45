"""Two small factors of a product: in another rank, another scale, another shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from lora_tools.linalg.layout import Layout, Shape, pad_rank
from lora_tools.linalg.lora import difference_energy, resize
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.svd import top_directions


@dataclasses.dataclass(frozen=True)
class Cut:
    """The best factors of a lower rank, as rounded.

    Attributes:
        total: ‖factor · left @ right‖²_F of what was given.
        error: ‖· − new‖²_F of what came out, measured after rounding.
    """

    left: torch.Tensor
    right: torch.Tensor
    total: float
    error: float

    @property
    def rank(self) -> int:
        return self.right.shape[0]


def cut(
    left: torch.Tensor,
    right: torch.Tensor,
    factor: float,
    rule: RankRule,
    dtype: torch.dtype,
) -> Cut:
    """factor · left (m, r) @ right (r, n) with the rank that the rule chooses, in ``dtype``.

    Exact: QR of both factors and an SVD of the small core, in float64 (``lora.resize``); the square
    roots of the singular values go to both sides. ``total`` is not finite where a factor is not.
    """
    if not (left.isfinite().all() and right.isfinite().all()):
        return Cut(left, right, math.nan, math.nan)
    U, S, Vh = resize(left, right)
    S = S * abs(factor)
    r = top_directions(S, rule)
    root = S[:r].sqrt()
    new_right = (root[:, None] * Vh[:r]).to(dtype)
    new_left = (U[:, :r] * root * math.copysign(1.0, factor)).to(dtype)
    error = difference_energy((left, right, factor), (new_left, new_right, 1.0))
    return Cut(new_left, new_right, float((S * S).sum()), error)


def scaled(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """tensor · factor, rounded once to the tensor's dtype."""
    return tensor if factor == 1.0 else (tensor.double() * factor).to(tensor.dtype)


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


def cut_factors(
    layout: Layout,
    products: Sequence[tuple[torch.Tensor, torch.Tensor]],
    shapes: tuple[Shape, Shape],
    factor: float,
    rule: RankRule,
    dtype: torch.dtype,
) -> Resized:
    """Every product of a layer (``layout.split``) cut, and joined again.

    Args:
        shapes: of lora_A and lora_B at any rank.
        factor: goes into the new factors, whose scaling is 1.
    """
    cuts = [cut(left, right, factor, rule, dtype) for left, right in products]
    ranks = [c.rank for c in cuts]
    parts = [pad_rank(c.left, c.right, max(ranks)) for c in cuts]
    lora_A, lora_B = layout.join(parts, *shapes)
    return Resized(
        lora_A, lora_B, layout.r(ranks),
        math.fsum(c.total for c in cuts), math.fsum(c.error for c in cuts),
    )  # fmt: skip
