"""Floats of four bits, E2M1: one sign, two of exponent, one of mantissa (OCP Microscaling Formats
1.0), in which MXFP4 and NVFP4 keep their numbers."""

from __future__ import annotations

import torch

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = MAGNITUDES[-1]


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
    return pairs[packed.long()].flatten(-2)
