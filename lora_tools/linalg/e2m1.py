"""Floats of four bits, E2M1: one sign, two of exponent, one of mantissa (OCP Microscaling Formats
1.0), in which MXFP4 and NVFP4 keep their numbers; those of six, E2M3; and scales that are powers of
two, E8M0."""

from __future__ import annotations

import torch

from lora_tools.linalg.bits import unpack
from lora_tools.linalg.noise import codes_noise, errors_by_code

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]
_LARGEST_E4M3 = 448.0
_EIGHTHS = tuple(i / 8 for i in range(8))
SIX_BITS = (*_EIGHTHS, *((1 + each) * 2**e for e in range(3) for each in _EIGHTHS))  # of E2M3


def values() -> torch.Tensor:
    """(16,) float32, what each code stands for: bit 3 is the sign."""
    return torch.tensor([*MAGNITUDES, *(-m for m in MAGNITUDES)])


def unpack_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """Two numbers a byte, the lower four bits first.

    Args:
        packed: (..., n) uint8.

    Returns:
        (..., 2 n) float32.
    """
    pairs = torch.cartesian_prod(values(), values()).flip(1)  # by byte: (low, high)
    both = pairs.view(torch.int64).view(-1).index_select(0, packed.flatten().int())
    return both.view(torch.float32).view(*packed.shape[:-1], -1)


def e2m1_noise(packed: torch.Tensor, scales: torch.Tensor, group: int) -> float:
    """``noise.codes_noise`` of numbers as ``unpack_e2m1`` has them, (rows, n) uint8, of which
    ``group`` share one of the scales (rows, 2 n / group)."""
    codes = unpack(packed, 4, 2 * packed.shape[1])
    return codes_noise(codes, errors_by_code(values()), scales, (1, group))


def _nearest(sizes: torch.Tensor, mantissa: int) -> torch.Tensor:
    """The codes of the nearest floats of two bits of exponent and some of mantissa, as float32, to
    even ones where two are as near; what is beyond the largest becomes that.

    Codes rise with 2^mantissa to each power of two, and slower from one to the next: so the least
    of the lines is the right one.
    """
    steps = 1 << mantissa
    codes = (sizes * steps).round_()
    for above in (1, 2):
        line = (sizes * (steps / (1 << above))).round_().add_(above * steps)
        torch.minimum(codes, line, out=codes)
    return codes.clamp_(max=4 * steps - 1)


def nearest_e2m1(x: torch.Tensor) -> torch.Tensor:
    """The codes of the nearest values, uint8, in the shape of x: what rounds to 0 keeps its sign,
    but -0 is 0."""
    signs = torch.sign(x).clamp_(max=0)
    return _nearest(x.abs(), 1).sub_(signs, alpha=8).to(torch.uint8)


def pack_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """The inverse of ``unpack_e2m1`` of codes: (rows, 2 n) → (rows, n) uint8."""
    pairs = codes.view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


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
    return _nearest(x.abs(), 3).to(torch.uint8) | torch.signbit(x).to(torch.uint8) << 5


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
