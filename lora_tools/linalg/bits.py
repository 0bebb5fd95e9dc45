"""Whole numbers of few bits, out of the bytes and words that they are packed in."""

from __future__ import annotations

import torch


def unpack(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The numbers of ``bits`` bits each that follow each other in each row, lowest bits first.

    A number may lie across two bytes, as those of 3, 5 and 6 bits do in GPTQ, MLX and
    compressed-tensors.

    Args:
        packed: (rows, at least ⌈count · bits / 8⌉) uint8.
        bits: 1 to 8.
        count: numbers in a row.

    Returns:
        (rows, count) uint8.
    """
    rows, mask = packed.shape[0], (1 << bits) - 1
    if bits == 8:
        return packed[:, :count]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        spread = (packed[:, :, None] >> shifts) & mask
        return spread.reshape(rows, packed.shape[1] * (8 // bits))[:, :count]
    at = torch.arange(count) * bits
    low, high = at // 8, torch.clamp(at // 8 + 1, max=packed.shape[1] - 1)
    pairs = packed[:, low].to(torch.int16) | (packed[:, high].to(torch.int16) << 8)
    shifted = (pairs.to(torch.int32) & 0xFFFF) >> (at % 8).to(torch.int32)
    return (shifted & mask).to(torch.uint8)
