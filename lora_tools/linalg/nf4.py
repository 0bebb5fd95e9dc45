"""Four-bit block quantization as bitsandbytes 0.50.2 does it on a CPU, to the bit.

A tensor is taken as a flat row-major run of ``n`` numbers in blocks of ``blocksize`` (QLoRA,
arXiv 2305.14314). A block's ``absmax`` is its largest magnitude; each number, divided by it,
becomes the index of the nearest of the codebook's 16 values, two indices to a byte, the first in
the high half. Double quantization stores ``absmax`` itself in eight bits (the signed dynamic map of
arXiv 1511.04561), in blocks of 256, less its mean.

The arithmetic is numpy's over runs of a few megabytes: a compare and an add for each of the 15
midpoints is several times faster than a search. Nothing here depends on the processor's vector
width; torch must run on one thread, since its mean of more than 32,767 numbers depends on how many
there are. Callers make sure that all numbers are finite.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from lora_tools.linalg.codebooks import Array, Codebook, dynamic_codes, dynamic_map
from lora_tools.linalg.truncation import sum_of_squares

NESTED_BLOCKSIZE = 256
RUN = 1 << 19  # elements at a time, a multiple of every block size: smaller runs stay in a nearer
# cache, and lose more to two threads handing the interpreter to each other at every step
SCRATCH_BYTES = RUN * 10
TINY = np.float32(1e-38)
_SMALL = np.float32(2.0**-117)  # a scale from which on a value may be denormal


@dataclasses.dataclass(frozen=True)
class Nested:
    """``absmax`` (blocks,) in eight bits: map[codes] · absmax of 256 blocks + offset."""

    codes: Array
    absmax: Array
    offset: np.float32


def blocks_of(n: int, blocksize: int) -> int:
    """How many blocks ``n`` numbers fill, the last one perhaps in part."""
    return -(n // -blocksize)


def packed_size(n: int) -> int:
    """Bytes of ``n`` codes: an odd one has a byte to itself."""
    return -(n // -2)


class Scratch:
    """Room for one run of RUN elements. ``store`` lends SCRATCH_BYTES of warm memory."""

    def __init__(self, store: torch.Tensor | None = None) -> None:
        store = torch.empty(SCRATCH_BYTES, dtype=torch.uint8) if store is None else store
        self.wide = store[: 4 * RUN].view(torch.float32)
        self.other = store[4 * RUN : 8 * RUN].view(torch.float32)
        self.codes = store[8 * RUN : 9 * RUN].numpy()
        self.above = store[9 * RUN : 10 * RUN].numpy()


def quantize(
    x: torch.Tensor, codebook: Codebook, blocksize: int, scratch: Scratch | None = None
) -> tuple[Array, Array]:
    """The codes (⌈n/2⌉,) uint8 and the absmax (blocks,) float32 of ``x`` (n,), of any float dtype.

    What ``bitsandbytes.functional.quantize_4bit`` gives on a CPU.
    """
    n = x.numel()
    packed = np.empty(packed_size(n), np.uint8)
    absmax = np.empty(blocks_of(n, blocksize), np.float32)
    quantize_into(x, codebook, blocksize, packed, absmax, scratch or Scratch())
    return packed, absmax


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized tensor: codes as packed bytes and the scales of its blocks.

    Attributes:
        scales: (blocks,) float32 that a reader works with, decoded where they are nested.
        nested: the scales as stored in eight bits, or None where they are stored as they are.
    """

    packed: Array
    scales: Array
    nested: Nested | None

    @property
    def is_finite(self) -> bool:
        """False where the input, or with double quantization the mean of its scales, is not."""
        return bool(np.isfinite(self.scales).all())

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Scales as stored: (absmax,) or (absmax's codes, their absmax)."""
        if self.nested is None:
            return (torch.from_numpy(self.scales),)
        return torch.from_numpy(self.nested.codes), torch.from_numpy(self.nested.absmax)


def quantize_whole(
    x: torch.Tensor,
    codebook: Codebook,
    blocksize: int,
    double: bool,
    packed: torch.Tensor,
    scratch: Scratch,
) -> Quantized:
    """``x`` (n,) into ``packed`` (⌈n/2⌉,) uint8, its scales doubly quantized or not."""
    absmax = np.empty(blocks_of(x.numel(), blocksize), np.float32)
    room = packed.numpy()
    with np.errstate(all="ignore"):  # what is not finite is for the caller to refuse
        quantize_into(x, codebook, blocksize, room, absmax, scratch)
        return Quantized(room, *as_read(absmax, double))


def as_read(scales: Array, double: bool) -> tuple[Array, Nested | None]:
    """Scales (blocks,) as a reader works with them, and as they are stored where that is in eight
    bits."""
    if not double:
        return scales, None
    nested = double_quantize(scales)
    return restore_absmax(nested), nested


def quantize_into(
    x: torch.Tensor,
    codebook: Codebook,
    blocksize: int,
    packed: Array,
    absmax: Array,
    scratch: Scratch,
) -> None:
    """``quantize`` into arrays that are there already."""
    for start, stop in runs(x.numel()):
        quantize_run(
            x[start:stop],
            codebook,
            blocksize,
            packed[start // 2 : packed_size(stop)],
            absmax[start // blocksize : blocks_of(stop, blocksize)],
            scratch,
        )


def runs(n: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of the runs that ``n`` numbers are worked on in."""
    return ((start, min(start + RUN, n)) for start in range(0, n, RUN))


def quantize_run(
    x: torch.Tensor,
    codebook: Codebook,
    blocksize: int,
    packed: Array,
    absmax: Array,
    scratch: Scratch,
) -> None:
    """Up to RUN numbers that begin at the start of a block, into ``packed`` and ``absmax``.

    Only the last run of a tensor may end within a block: there bitsandbytes divides where else it
    multiplies by a reciprocal, and its absmax is never below 1e-38.
    """
    n, full = x.numel(), x.numel() // blocksize
    wide = scratch.wide[:n]
    wide.copy_(x)
    _absmax(wide, blocksize, absmax, scratch)
    scaled = scratch.other[: full * blocksize].view(full, blocksize)
    inverse = torch.from_numpy(np.float32(1) / np.maximum(absmax[:full], TINY))
    torch.mul(wide[: full * blocksize].view(full, blocksize), inverse[:, None], out=scaled)
    if full < len(absmax):
        absmax[full] = max(absmax[full], TINY)
        tail = scratch.other[full * blocksize : n]
        torch.div(wide[full * blocksize :], float(absmax[full]), out=tail)
    encode(scratch.other[:n].numpy(), codebook, packed, scratch)


def _absmax(wide: torch.Tensor, blocksize: int, absmax: Array, scratch: Scratch) -> None:
    n, full = wide.numel(), wide.numel() // blocksize
    magnitude = torch.abs(wide, out=scratch.other[:n])
    if full:
        into = torch.from_numpy(absmax[:full])
        torch.amax(magnitude[: full * blocksize].view(full, blocksize), 1, out=into)
    if full < len(absmax):
        absmax[full] = float(magnitude[full * blocksize :].max())


def encode(scaled: Array, codebook: Codebook, packed: Array, scratch: Scratch) -> None:
    """Codes of numbers from -1 to 1, two to a byte."""
    n = len(scaled)
    codes, above = scratch.codes[: 2 * len(packed)], scratch.above[:n]
    rank = codes[:n]
    rank.fill(0)
    for midpoint in codebook.midpoints:
        np.greater(scaled, midpoint, out=above.view(np.bool_))
        np.add(rank, above, out=rank)
    if codebook.order[7] != 7 or not np.array_equal(codebook.order, np.arange(16)):
        np.take(codebook.order, rank, out=rank, mode="clip")
    if n % 2:  # bitsandbytes pads with the number 0
        codes[n] = codebook.order[np.count_nonzero(codebook.midpoints < 0)]
    both = codes.view("<u2")
    low = scratch.above[: 2 * len(packed)].view("<u2")
    np.right_shift(both, 8, out=low)
    np.left_shift(both, 4, out=both)
    np.bitwise_or(both, low, out=packed, casting="unsafe")


def double_quantize(absmax: Array) -> Nested:
    """(blocks,) float32 in eight bits each, as ``quantize_blockwise`` encodes on a CPU."""
    offset = np.float32(torch.from_numpy(absmax).mean())
    padded = np.zeros((blocks_of(len(absmax), NESTED_BLOCKSIZE), NESTED_BLOCKSIZE), np.float32)
    padded.reshape(-1)[: len(absmax)] = absmax - offset
    codes, nested = _encode_nested(padded)
    return Nested(codes.reshape(-1)[: len(absmax)], nested, offset)


def _encode_nested(blocks: Array) -> tuple[Array, Array]:
    """(m, 256) float32 → codes (m, 256) uint8 and absmax (m,)."""
    absmax = np.abs(blocks).max(1, initial=0)
    with np.errstate(all="ignore"):  # the reciprocal of a denormal is infinite there, too
        scaled = blocks * (np.float32(1) / absmax)[:, None]
    scaled = np.clip(scaled, np.float32(-1), np.float32(1))
    scaled[np.isnan(scaled)] = -1  # 0 · inf, and a block of zeros: code 0
    # One rounding of a product and a sum: bitsandbytes' compiler fuses them.
    step = ((scaled + np.float32(1)).astype(np.float64) * 32767.5 + 0.5).astype(np.float32)
    return dynamic_codes()[step.astype(np.int32)], absmax


def restore_absmax(nested: Nested, table: Array | None = None) -> Array:
    """(blocks,) float32 that a reader of the double-quantized ``absmax`` works with; ``table``
    (256,) is the map that lies with it, where that may be another."""
    values: Array = (dynamic_map() if table is None else table)[nested.codes]
    values *= np.repeat(nested.absmax, NESTED_BLOCKSIZE)[: len(values)]
    values += nested.offset
    return values


def dequantize(
    packed: Array,
    absmax: Array,
    codebook: Codebook,
    blocksize: int,
    out: torch.Tensor,
    scratch: Scratch | None = None,
) -> torch.Tensor:
    """Fill ``out`` (n,), of any float dtype: value · absmax in float32, rounded once."""
    scratch = scratch or Scratch()
    for start, stop in runs(out.numel()):
        dequantize_run(
            packed[start // 2 : packed_size(stop)],
            absmax[start // blocksize : blocks_of(stop, blocksize)],
            codebook,
            blocksize,
            out[start:stop],
            scratch,
        )
    return out


def dequantize_stored(
    packed: torch.Tensor,
    scales: Array,
    quant_map: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
    first: int = 0,
) -> None:
    """``dequantize`` numbers [first, first + n) of tensors as a checkpoint holds them into ``out``
    (n,), by the map that lies with them."""
    book = Codebook("stored", tuple(quant_map.tolist()))
    lead = first % blocksize
    into = torch.empty(lead + out.numel(), dtype=out.dtype) if lead else out
    codes, blocks = packed.numpy()[(first - lead) // 2 :], scales[first // blocksize :]
    dequantize(codes, blocks, book, blocksize, into)
    if lead:
        out.copy_(into[lead:])


def stored_scales(
    absmax: torch.Tensor, nested: tuple[torch.Tensor, torch.Tensor, float] | None
) -> Array:
    """(blocks,) float32 out of tensors as a checkpoint holds them.

    Args:
        nested: the absmax of absmax, its map and its offset, where ``absmax`` is in eight bits.
    """
    scales: Array = absmax.numpy()
    if nested is None:
        return scales
    inner, table, offset = nested
    return restore_absmax(Nested(scales, inner.numpy(), np.float32(offset)), table.numpy())


def dequantize_run(
    packed: Array,
    absmax: Array,
    codebook: Codebook,
    blocksize: int,
    out: torch.Tensor,
    scratch: Scratch,
) -> None:
    """Up to RUN numbers that begin at the start of a block, into ``out``."""
    n, full = out.numel(), out.numel() // blocksize
    values = scratch.wide[: 2 * len(packed)]
    np.take(codebook.pairs, packed, out=values.numpy().view(np.complex64), mode="clip")
    blocks = values[: full * blocksize].view(full, blocksize)
    blocks.mul_(torch.from_numpy(absmax[:full])[:, None])
    if full * blocksize < n:
        values[full * blocksize :].mul_(float(absmax[full]))
    _round(values[:n], absmax, out)


def _round(values: torch.Tensor, absmax: Array, out: torch.Tensor) -> None:
    """Numbers of blocks of these scales in the dtype of ``out``."""
    if out.dtype == torch.bfloat16 and np.abs(absmax).min(initial=1) < _SMALL:
        _round_to_bfloat16(values, out)
    else:
        out.copy_(values)


def _round_to_bfloat16(values: torch.Tensor, out: torch.Tensor) -> None:
    """To the nearest, ties to even, by integers: the processor's own instruction, where it has one,
    turns denormal numbers into zeros."""
    bits = values.view(torch.int32)
    out.view(torch.int16).copy_((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def measure(
    x: torch.Tensor,
    packed: Array,
    absmax: Array,
    codebook: Codebook,
    blocksize: int,
    scratch: Scratch,
    done: Callable[[int, int], None] = lambda start, stop: None,
    read: Callable[[torch.Tensor], None] | None = None,
) -> tuple[float, float]:
    """‖x̂ − x‖² and ‖x‖² for ``x`` (n,), x̂ dequantized to its dtype.

    ``done`` hears of numbers [start, stop) once they will not be read again; ``read`` takes x̂ run
    after run before it is rounded.
    """
    errors, energies = [], []
    rounded = torch.empty(min(RUN, x.numel()), dtype=x.dtype)
    exact = torch.empty(len(rounded) if read is not None else 0)
    for start, stop in runs(x.numel()):
        back = rounded[: stop - start]
        codes = packed[start // 2 : packed_size(stop)]
        scales = absmax[start // blocksize : blocks_of(stop, blocksize)]
        if read is None:
            dequantize_run(codes, scales, codebook, blocksize, back, scratch)
        else:
            unrounded = exact[: stop - start]
            dequantize_run(codes, scales, codebook, blocksize, unrounded, scratch)
            _round(unrounded, scales, back)
            read(unrounded)
        wide, other = scratch.wide[: stop - start], scratch.other[: stop - start]
        wide.copy_(x[start:stop])
        energies.append(sum_of_squares(wide))
        wide -= other.copy_(back)
        errors.append(sum_of_squares(wide))
        done(start, stop)
    return math.fsum(errors), math.fsum(energies)
