"""Whole numbers of few bits, out of the bytes and words that they are packed in."""

from __future__ import annotations

import math

import torch

from lora_tools.linalg.runs import row_runs

_ALIGNED = 32  # so many numbers end with a word, of whatever bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
    if 8 % bits == 0:
        return _halved(packed, bits)[:, :count]
    each, width = _cycle(bits)
    groups = -(count // -each)
    lacking = groups * width - packed.shape[1]
    if lacking > 0:
        packed = torch.nn.functional.pad(packed, (0, lacking))
    cycles = packed[:, : groups * width].view(len(packed), groups, width)
    numbers = torch.empty(len(packed), groups, each, dtype=torch.uint8)
    for start, stop in row_runs(len(packed), count):
        run, out = cycles[start:stop], numbers[start:stop]
        for i in range(each):
            byte, shift = divmod(i * bits, 8)
            number = run[:, :, byte] >> shift
            if shift + bits > 8:
                number |= run[:, :, byte + 1] << (8 - shift)
            out[:, :, i] = number.bitwise_and_((1 << bits) - 1)
    return numbers.flatten(1)[:, :count]


def _halved(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """``unpack`` of all numbers of 1, 2, 4 or 8 bits: each byte becomes two of half its bits, until
    they are of so many."""
    half = 8
    while half > bits:
        half //= 2
        pairs = packed.to(torch.int16)
        pairs = (pairs << (8 - half)).bitwise_or_(pairs).bitwise_and_(((1 << half) - 1) * 0x0101)
        packed = pairs.view(torch.uint8)
    return packed


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack``.

    Args:
        codes: (rows, count) uint8, each below 2^bits.

    Returns:
        (rows, ⌈count · bits / 8⌉) uint8; bits beyond the last number are 0.
    """
    rows, count = codes.shape
    each, width = _cycle(bits)
    packed = torch.zeros(rows, -(count // -each) * width, dtype=torch.uint8)
    for i in range(each):
        mine = codes[:, i::each]
        byte, shift = divmod(i * bits, 8)
        packed[:, byte::width][:, : mine.shape[1]] |= mine << shift
        if shift + bits > 8:
            packed[:, byte + 1 :: width][:, : mine.shape[1]] |= mine >> (8 - shift)
    return packed[:, : -(count * bits // -8)]


def _cycle(bits: int) -> tuple[int, int]:
    """After how many numbers, and bytes, a number starts with a byte again."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def stream(words: torch.Tensor, bits: int, start: int, stop: int) -> torch.Tensor:
    """Numbers [start, stop) of the stream of bits that each row is, lowest bits first.

    Args:
        words: (rows, at least ⌈stop · bits / 32⌉) int32 or uint32.

    Returns:
        (rows, stop − start) uint8.
    """
    low = start - start % _ALIGNED
    cut = words[:, low * bits // 32 : -(stop * bits // -32)]
    # A single column counts as contiguous whatever its stride, and no view of it is bytes.
    as_bytes = cut.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return unpack(as_bytes, bits, stop - low)[:, start - low :]


def to_stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``stream`` from 0 on: (rows, count) uint8 → (rows, ⌈count · bits / 32⌉)
    int32."""
    packed = pack(codes, bits)
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4))
    return words.view(torch.int32)


def awq_stream(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Numbers [start, stop) of four bits of each row, turned: a word holds eight in AWQ's order.

    Args:
        words: (rows, at least ⌈stop / 8⌉) int32.

    Returns:
        (stop − start, rows) uint8.
    """
    turned = words[:, start // 8 : -(stop // -8)].T.contiguous()
    numbers = torch.empty(len(turned), 8, turned.shape[1], dtype=torch.uint8)
    for low, high in row_runs(*turned.shape):
        for i, place in enumerate(_AWQ_ORDER):
            numbers[low:high, place] = (turned[low:high] >> (4 * i)).bitwise_and_(15)
    return numbers.flatten(0, 1)[start % 8 : start % 8 + stop - start]


def unpack_words(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """As ``unpack``, where no number lies in two words of 32 bits: each holds 32 // bits of them.

    Args:
        packed: (rows, ⌈count / (32 // bits)⌉) int32.
    """
    each = 32 // bits
    numbers = torch.empty(*packed.shape, each, dtype=torch.uint8)
    for i in range(each):
        numbers[:, :, i] = (packed >> (i * bits)).bitwise_and_((1 << bits) - 1)
    return numbers.flatten(1)[:, :count]


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of ``unpack_words``: (rows, count) uint8 → int32."""
    rows, count = codes.shape
    each = 32 // bits
    spread = torch.nn.functional.pad(codes, (0, -count % each)).view(rows, -(count // -each), each)
    words = torch.zeros(spread.shape[:2], dtype=torch.int32)
    for i in range(each):
        words |= spread[:, :, i].to(torch.int32) << (i * bits)
    return words
