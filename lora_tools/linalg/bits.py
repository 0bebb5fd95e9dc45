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


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack``.

    Args:
        codes: (rows, count) uint8, each below 2^bits.

    Returns:
        (rows, ⌈count · bits / 8⌉) uint8; bits beyond the last number are 0.
    """
    rows, count = codes.shape
    packed = torch.zeros(
        rows, -(count // -8) * bits, dtype=torch.uint8
    )  # eight numbers: bits bytes
    for i in range(8):
        mine = codes[:, i::8]
        byte, shift = divmod(i * bits, 8)
        packed[:, byte::bits][:, : mine.shape[1]] |= mine << shift
        if shift + bits > 8:
            packed[:, byte + 1 :: bits][:, : mine.shape[1]] |= mine >> (8 - shift)
    return packed[:, : -(count * bits // -8)]


def unpack_words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """As ``unpack``, where no number lies in two words of 32 bits: each holds 32 // bits of them.

    Args:
        packed: (rows, ⌈count / (32 // bits)⌉) int32.
    """
    each = 32 // bits
    shifts = torch.arange(each, dtype=torch.int32) * bits
    spread = (packed[:, :, None] >> shifts) & ((1 << bits) - 1)
    return spread.to(torch.uint8).reshape(packed.shape[0], -1)[:, :count]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack_words``: (rows, count) uint8 → int32."""
    rows, count = codes.shape
    each = 32 // bits
    spread = torch.nn.functional.pad(codes, (0, -count % each)).view(rows, -(count // -each), each)
    words = torch.zeros(spread.shape[:2], dtype=torch.int32)
    for i in range(each):
        words |= spread[:, :, i].to(torch.int32) << (i * bits)
    return words
