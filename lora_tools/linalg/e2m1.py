"""Floats of four bits, E2M1: one sign, two of exponent, one of mantissa (OCP Microscaling Formats
1.0), in which MXFP4 and NVFP4 keep their numbers; those of six, E2M3; and scales that are powers of
two, E8M0."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]
_LARGEST_E4M3 = 448.0
_EIGHTHS = tuple(i / 8 for i in range(8))
SIX_BITS = (*_EIGHTHS, *((1 + each) * 2**e for e in range(3) for each in _EIGHTHS))  # of E2M3


def values() -> torch.Tensor:
    """(16,) float32, what each code stands for: bit 3 is the sign."""
    return torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])


def unpack_e2m1(packed: torch.Tensor, table: torch.Tensor | None = None) -> torch.Tensor:
    """Two numbers a byte, the lower four bits first.

    Args:
        packed: (..., n) uint8.
        table: (16,) what each code stands for; ``values()`` where it is not given.

    Returns:
        (..., 2 n) float32.
    """
    table = values() if table is None else table
    pairs = torch.cartesian_prod(table, table).flip(1)  # by byte: (low, high)
    return pairs[packed.long()].flatten(-2)


def nearest(sizes: torch.Tensor, magnitudes: Sequence[float]) -> torch.Tensor:
    """Which of the magnitudes, ascending, each size is nearest to, uint8; of two that are as near
    the one of even place, as IEEE rounds. What is beyond the largest becomes that."""
    places = torch.zeros(sizes.shape, dtype=torch.uint8)
    for i, (low, high) in enumerate(itertools.pairwise(magnitudes)):
        middle = (low + high) / 2
        places += sizes > middle if i % 2 == 0 else sizes >= middle
    return places


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest values, uint8, in the shape of x: what rounds to 0 keeps its sign,
    but -0 is 0."""
    return nearest(x.abs(), MAGNITUDES) | (x < 0).to(torch.uint8) << 3


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of ``unpack_e2m1`` of codes: (..., 2 n) → (..., n) uint8."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def powers(exponents: torch.Tensor) -> torch.Tensor:
    """What E8M0 stands for, in float32: 2^(e − 127), of uint8. 255 is its NaN; here it is an inf,
    so that no number times it is finite."""
    wide = exponents.to(torch.int32)
    return torch.where(wide == 0, 1 << 22, wide << 23).view(torch.float32)


def shared_exponents(largest: torch.Tensor, above: int = 2, mantissa: int = 1) -> torch.Tensor:
    """E8M0 (uint8) for blocks of numbers whose largest magnitudes these are, float32.

    The largest's power of two, or the next where a float of so many bits of mantissa would round up
    to it, over that of the largest float of the blocks: compressed-tensors' ``generate_mx_scales``.
    (OCP Microscaling Formats 1.0, section 6.3, does not round up.)

    Args:
        above: the exponent of the largest float: 2 of E2M1 and of E2M3, 8 of E4M3.
    """
    bits = largest.contiguous().view(torch.int32) + (1 << (22 - mantissa))
    return (((bits >> 23) & 0xFF) - above).clamp_(min=0).to(torch.uint8)


def six_bit_values() -> torch.Tensor:
    """(64,) float32, what each code of E2M3 stands for: bit 5 is the sign."""
    sizes = torch.tensor(SIX_BITS)
    return torch.cat([sizes, -sizes])


def nearest_e2m3(x: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest values, uint8, in the shape of x."""
    return nearest(x.abs(), SIX_BITS) | torch.signbit(x).to(torch.uint8) << 5


def global_scale(largest: torch.Tensor) -> torch.Tensor:
    """(1,) float32: by what NVFP4's scales of groups are larger than they stand for, so that the
    largest of them is the largest of E4M3. ``largest`` is the largest magnitude of the weight;
    compressed-tensors' ``generate_gparam``."""
    tiny = torch.finfo(torch.float32).tiny
    scale = _LARGEST_E4M3 * LARGEST / largest.clamp(min=tiny)
    return torch.where(torch.isfinite(scale), scale, 1.0).reshape(1)


def group_scales(largest: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """NVFP4's scales of groups of these largest magnitudes, E4M3, times the global scale ``whole``;
    an eighth where that is 0, as compressed-tensors has it."""
    scales = (whole * (largest / LARGEST)).clamp(max=_LARGEST_E4M3).to(torch.float8_e4m3fn)
    return torch.where(scales.float() == 0, 0.125, scales.float()).to(torch.float8_e4m3fn)


def whole_scale(largest: torch.Tensor) -> torch.Tensor:
    """ModelOpt's ``weight_scale_2`` for this largest magnitude, float32; of zeros 1."""
    whole = largest / (LARGEST * _LARGEST_E4M3)
    return torch.where(whole == 0, 1.0, whole)


def two_scales(
    largest: torch.Tensor, whole: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """NVFP4's scales of groups of these largest magnitudes, E4M3, and the one that all of them are
    multiplied by, () float32, if it is not given: ModelOpt's ``get_weights_scaling_factor``."""
    whole = whole_scale(largest.amax()) if whole is None else whole
    scales = largest / (LARGEST * whole)
    scales = torch.where(scales == 0, 1.0, scales)
    return scales.clamp_(2**-9, _LARGEST_E4M3).to(torch.float8_e4m3fn), whole
