"""What must be remembered to undo a merge bit for bit: what subtraction leaves open.

Let W be the base, W' the merged tensor as stored and p = inverse(W') the estimate of W in float64.
Merging lost what is less than half a unit in the last place of W'. Where that unit is no larger
than W's own, rounding p gives W; where the exponent grew by k, W is one of about 2ᵏ numbers around
p, all as likely, so that k bits of it must be remembered and no more.

Numbers are counted by their *rank*: how many representable ones lie nearer to the rounded p, with
the one on p's side of it first: 0, 1, 2, … are +0, +1, −1, +2, … units from it, or −1 first. The
low k bits of the rank are kept for each element (k of the exponents of W' and of the rounded p,
which whoever restores has, too), and its *excess* rank >> k, which is 0 nearly everywhere: it is
not where W' was not rounded from the exact sum, as it is not in float32. Both are planes of bits;
those of the excess compress.

Another machine's p may differ by a slack. An element whose code would not mean W for every p within
the slack is *listed*, as is one with a large excess: it keeps the distance from W' to W in units of
the last place (the count of representable numbers between them), which is exact whatever p is.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_EXCESS_BITS = 4  # of the excess, at most; an element with more is listed
_RARE = 4096


class Rows(NamedTuple):
    """Some rows of a run: of the base, of what was merged, and in float64 the estimate of the base
    and the slack."""

    base: torch.Tensor
    merged: torch.Tensor
    estimate: torch.Tensor
    slack: torch.Tensor


class Coded(NamedTuple):
    """One run of elements.

    Attributes:
        gaps: between listed positions, in bytes; 255 means 255 more.
        distances: of the listed ones, split into byte planes, which compress well.
        excess: bit planes, least significant first, of all elements; those after the last that
            has a bit are left out. Listed ones have none.
        within: bit planes of the ranks' low bits, plane b of the elements whose k is above b.
    """

    gaps: bytes
    distances: bytes
    excess: bytes = b""
    within: bytes = b""


def _bits(x: torch.Tensor) -> Array:
    """Flat. In numpy, which compares and gathers several times as fast as torch does."""
    return x.contiguous().view(_INT[x.element_size()]).view(-1).numpy()


def turned(bits: Array) -> Array:
    """Bits of floats → integers in their order, of which neighbours differ by one; and back: it is
    its own inverse."""
    result: Array = bits ^ ((bits >> (8 * bits.itemsize - 1)) & np.iinfo(bits.dtype).max)
    return result


def encode(rows: Iterable[Rows]) -> Coded:
    """What gives one run of the base, of which these are the rows in their order, back out of any
    estimate within the slack of this one."""
    found = [_Open.of(some) for some in rows]
    count = sum(len(each.listed) for each in found)
    worth = _planes_worth([each.rank >> each.k for each in found], count)
    for each in found:
        each.listed[each.at] |= each.rank >> each.k >> worth != 0
    listed = np.concatenate([each.listed for each in found])
    distances = [turned(e.wanted[e.listed]) - turned(e.is_now[e.listed]) for e in found]
    return Coded(
        _encode_gaps(np.flatnonzero(listed)),
        _split_planes(np.concatenate(distances)),  # which wrap around, as decode
        _excess_planes(np.concatenate([each.excess() for each in found])),
        _within_planes([each.coded() for each in found]),
    )


class _Open(NamedTuple):
    """Some elements of a run, and what the rounded estimate leaves open of them.

    Attributes:
        wanted, is_now: bits of the base and of what was merged.
        listed: whether an element is.
        at: those of which something is open, and
        rank, k: of each of them.
    """

    wanted: Array
    is_now: Array
    listed: Array
    at: Array
    rank: Array
    k: Array

    @classmethod
    def of(cls, rows: Rows) -> _Open:
        """Listed are those that are whatever their ranks may be."""
        base, merged, estimate, slack = (x.contiguous().view(-1) for x in rows)
        low = _rounded(estimate - slack, base.dtype)
        wanted, is_now, nearest = _bits(base), _bits(merged), _bits(low)
        listed = nearest != _bits(_rounded(estimate + slack, base.dtype))
        k = _open_bits(nearest, is_now, base.dtype)
        at = np.flatnonzero((nearest != wanted) | (k > 0))
        k, off = k[at], _ranked(wanted[at]) - _ranked(nearest[at])
        value = low[torch.from_numpy(at)].double().numpy()
        p, margin = estimate.numpy()[at], slack.numpy()[at]
        up, still_up = p - margin > value, p + margin > value
        # A rank of 0 is the nearest number, whichever side of it the estimate lies on.
        listed[at] |= (up != still_up) & (off != 0)
        return cls(wanted, is_now, listed, at, _rank(off, up), k)

    def coded(self) -> tuple[Array, Array]:
        """Rank and k of those that are not listed."""
        left = ~self.listed[self.at]
        return self.rank[left], self.k[left]

    def excess(self) -> Array:
        """Of all elements; 0 of those that are listed."""
        dense = np.zeros(len(self.listed), np.uint8)
        dense[self.at] = self.rank >> self.k
        dense[self.listed] = 0
        return dense


def decode(estimates: Iterable[torch.Tensor], merged: torch.Tensor, coded: Coded) -> torch.Tensor:
    """The base's run, exactly, in the dtype and shape of ``merged``.

    Args:
        estimates: of its rows in their order, a few rows at a time.

    Raises:
        ValueError: what was coded is not of such a run.
    """
    result = torch.empty(merged.shape, dtype=merged.dtype)
    nearest, is_now = _bits(result), _bits(merged)  # one that changes with the result
    listed = _decode_gaps(coded.gaps)
    if (
        len(coded.distances) != nearest.itemsize * len(listed)
        or (listed[-1:] >= len(nearest)).any()
    ):
        raise ValueError(f"a listing that is not of {len(nearest)} elements")
    excess = _join_excess(coded.excess, len(nearest)) if coded.excess else None
    left, start = [], 0
    for estimate in estimates:
        here = slice(start, start + estimate.numel())
        start = here.stop
        value = result.view(-1)[here].copy_(_rounded(estimate.view(-1), merged.dtype))
        if coded.excess or coded.within:
            k = _open_bits(nearest[here], is_now[here], merged.dtype)
            first, last = np.searchsorted(listed, (here.start, here.stop))
            k[listed[first:last] - here.start] = 0
            at = np.flatnonzero((k if excess is None else k | excess[here]) != 0)
            up = estimate.view(-1).numpy()[at] > value[torch.from_numpy(at)].double().numpy()
            left.append((at + here.start, k[at], up))
    if left:
        at, k, up = (np.concatenate(parts) for parts in zip(*left, strict=True))
        n = _ranked(nearest[at])
        rank = _join_within(coded.within, k, n.dtype)
        if excess is not None:
            rank += excess[at].astype(n.dtype) << k
        nearest[at] = turned((n + _off(rank, up)).astype(nearest.dtype))
    distance = _join_planes(coded.distances, nearest.itemsize)
    nearest[listed] = turned(turned(is_now[listed]) + distance)
    return result


def _rounded(p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By way of float32 to the halves, wherever it is done."""
    return (p.float() if dtype.itemsize < 4 else p).to(dtype)


def _open_bits(nearest: Array, merged: Array, dtype: torch.dtype) -> Array:
    """k ≥ 0 of each element: by how much the exponent grew."""
    k = _exponent(merged, dtype)
    k -= _exponent(nearest, dtype)
    return k.clip(0, 8 * k.itemsize - 1, out=k).astype(np.uint8)


def _exponent(bits: Array, dtype: torch.dtype) -> Array:
    """Biased; subnormal numbers have the unit of the smallest normal ones, and whole ones of the
    counters that batch norms keep the same everywhere."""
    if not dtype.is_floating_point:
        return np.zeros_like(bits)
    mantissa = -round(math.log2(torch.finfo(dtype).eps))
    exponent: Array = bits & np.iinfo(bits.dtype).max
    exponent >>= mantissa
    return np.maximum(exponent, 1, out=exponent)


def _ranked(bits: Array) -> Array:
    """In their order, as integers that hold a rank: of float64 as long as nothing wraps around."""
    return turned(bits).astype(np.int32 if bits.itemsize == 2 else np.int64)


def _rank(off: Array, up: Array) -> Array:
    """Units from the nearest number as ranks, of which those on the estimate's side are odd; what
    does not fit is negative."""
    towards = np.where(up, off, -off)
    far = np.abs(towards)
    rank: Array = ((far << 1) | (far & np.iinfo(far.dtype).min)) - (towards > 0)
    return rank


def _off(rank: Array, up: Array) -> Array:
    """Inverse of ``_rank``."""
    far, back = (rank + 1) >> 1, -((rank & 1) ^ up)
    off: Array = (far ^ back) - back
    return off


def _planes_worth(excess: Sequence[Array], count: int) -> int:
    """How many bits of the excess are kept: a plane takes more than it saves where but a few of
    ``count`` elements need it."""
    return next(
        (
            b
            for b in range(_EXCESS_BITS)
            if sum(np.count_nonzero(e >> b) for e in excess) * _RARE <= count
        ),
        _EXCESS_BITS,
    )


def _excess_planes(excess: Array) -> bytes:
    most = int(excess.max(initial=0))
    return b"".join(np.packbits(excess & (1 << b)).tobytes() for b in range(most.bit_length()))


def _join_excess(data: bytes, count: int) -> Array:
    size = -(count // -8)
    planes, rest = divmod(len(data), max(size, 1))
    if rest or planes > _EXCESS_BITS:
        raise ValueError(f"{len(data)} bytes of excess for {count} elements")
    excess = np.zeros(count, np.uint8)
    for b in range(planes):
        excess |= _unpack(data[b * size : (b + 1) * size], count) << b
    return excess


def _within_planes(coded: Sequence[tuple[Array, Array]]) -> bytes:
    """Of (rank, k) of elements in their order."""
    planes: defaultdict[int, list[Array]] = defaultdict(list)
    for rank, k in coded:
        for b in range(int(k.max(initial=0))):
            left = k > b  # each plane has fewer
            rank, k = rank[left], k[left]
            planes[b].append((rank >> b) & 1 != 0)
    return b"".join(np.packbits(np.concatenate(planes[b])).tobytes() for b in range(len(planes)))


def _join_within(data: bytes, k: Array, dtype: npt.DTypeLike) -> Array:
    rank, start = np.zeros(len(k), dtype), 0
    left = np.flatnonzero(k != 0)
    for b in range(int(k.max(initial=0))):
        stop = start - (len(left) // -8)
        if stop <= len(data):
            rank[left] |= _unpack(data[start:stop], len(left)).astype(dtype) << b
        start = stop
        left = left[np.flatnonzero(k[left] > b + 1)]  # each plane has fewer
    if start != len(data):
        raise ValueError(f"{len(data)} bytes of ranks, and {start} are open")
    return rank


def _unpack(data: bytes, count: int) -> Array:
    return np.unpackbits(np.frombuffer(data, np.uint8), count=count)


def _encode_gaps(at: Array) -> bytes:
    gaps = np.diff(at, prepend=-1) - 1
    jumps = gaps // 255
    out = np.full(len(gaps) + int(jumps.sum()), 255, np.uint8)
    out[np.cumsum(jumps + 1) - 1] = gaps % 255
    return out.tobytes()


def _decode_gaps(data: bytes) -> Array:
    raw = np.frombuffer(data, np.uint8)
    ends = raw != 255
    at: Array = np.cumsum(raw, dtype=np.int64)[ends] + np.arange(int(ends.sum()))
    return at


def _split_planes(distance: Array) -> bytes:
    """Byte planes, least significant first. Zigzag keeps small distances of both signs small."""
    width = distance.dtype.itemsize
    zigzag = (distance << 1) ^ (distance >> (8 * width - 1))
    return np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, width).T).tobytes()


def _join_planes(data: bytes, width: int) -> Array:
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    signed = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1)
    one = signed.dtype.type(1)
    restored = (signed >> one) ^ (~(signed & one) + one)
    distance: Array = restored.view(f"<i{width}")
    return distance
