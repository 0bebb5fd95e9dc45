"""Codes of few bits in words of 32, as GPTQ, AWQ and MLX pack them; only what is asked for."""

from __future__ import annotations

import torch

from lora_tools.linalg.bits import unpack

_ALIGNED = 32  # so many numbers end with a word, of whatever bits


def stream(words: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Numbers [start, stop) of the stream of bits that each row is, lowest bits first.

    Args:
        words: (rows, at least ⌈stop · bits / 32⌉) int32 or uint32.

    Returns:
        (rows, stop − start) uint8.
    """
    low = start - start % _ALIGNED
    cut = _bytes(words[:, low * bits // 32 : -(stop * bits // -32)])
    return unpack(cut, bits, stop - low)[:, start - low :]


def awq_stream(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """As ``stream`` of four bits, where an element holds its numbers in AWQ's order."""
    cut = _bytes(words[:, start // 8 : -(stop // -8)])
    nibbles = unpack(cut, 4, 2 * cut.shape[1])
    # Of eight numbers, the even ones come first.
    ordered = nibbles.view(len(words), -1, 2, 4).transpose(2, 3).flatten(1)
    return ordered[:, start % 8 : start % 8 + stop - start]


def _bytes(words: torch.Tensor) -> torch.Tensor:
    # A single column counts as contiguous whatever its stride, and no view of it is bytes.
    return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def uniform_noise(scales: torch.Tensor, counts: torch.Tensor | float) -> float:
    """Σ count · scale² / 12: the square of the Frobenius norm that rounding to steps of ``scales``
    is expected to have cost, ``counts`` numbers for each of them (broadcast)."""
    return float((scales.double().square() * counts).sum()) / 12
