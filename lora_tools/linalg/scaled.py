"""Codes times the scales of the blocks that they lie in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_tools.linalg.eight_bits import widen
from lora_tools.linalg.runs import row_runs

_NARROW = 32  # blocks of fewer columns are reduced slowly where they lie


def times_scales(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    out: torch.Tensor,
    first: int = 0,
    zeros: torch.Tensor | None = None,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """W[i, j] = (code[i, j] − zero[i', j']) · scale[i', j'] + bias[i', j'], with i' = i // block[0]
    and j' = j // block[1], computed in float32 and rounded once into ``out``.

    Args:
        codes: (n, cols) of any dtype that float32 holds: rows [first, first + n) of the weight.
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉) of the whole weight; the last blocks of a row
            and of a column may be ragged.
        zeros, biases: as ``scales``; 0 where they are not given.
        out: (n, cols) of any float dtype.
    """
    for start, stop in row_runs(*codes.shape):
        direct = out.dtype == torch.float32
        x = out[start:stop] if direct else torch.empty(stop - start, codes.shape[1])
        widen(codes[start:stop], x)
        if zeros is not None:
            by_blocks(torch.sub, x, zeros, block, first + start)
        by_blocks(torch.mul, x, scales, block, first + start)
        if biases is not None:
            by_blocks(torch.add, x, biases, block, first + start)
        if not direct:
            out[start:stop] = x
    return out


def by_blocks(
    operate: Callable[..., torch.Tensor],
    x: torch.Tensor,
    table: torch.Tensor,
    block: tuple[int, int],
    first: int = 0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``operate`` (``torch.mul``, ``div``, ``add`` or ``sub``) on each number of x and that of its
    block in the table, into ``out``: x itself, if it is not given.

    Args:
        x: (n, cols) float32, contiguous in its rows: rows [first, first + n) of the weight.
        table: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉), one of each block of the whole weight.
        out: as x.
    """
    out = x if out is None else out
    (n, cols), (high, wide) = x.shape, block
    low, top = first // high, -((first + n) // -high)
    each = table[low:top].float()  # (n, blocks across), where a block is of one row
    if top - low > 1 and high > 1:
        each = each[torch.arange(first, first + n) // high - low]
    whole = cols - cols % wide
    if whole:
        given, made = (side[:, :whole].view(n, whole // wide, wide) for side in (x, out))
        operate(given, each[:, : whole // wide, None], out=made)
    if whole < cols:
        operate(x[:, whole:], each[:, -1:], out=out[:, whole:])
    return out


def times_indexed_scales(
    codes: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor,
    out: torch.Tensor,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """As ``times_scales`` for groups of columns that need not lie side by side (``g_idx``).

    Args:
        codes: (n, cols).
        scales: (n, groups), of the same rows.
        groups: (cols,) the group of each column.
    """
    at = groups.int()
    for start, stop in row_runs(*codes.shape):
        x = codes[start:stop].to(torch.float32, copy=True)
        if zeros is not None:
            x.sub_(zeros[start:stop].float().index_select(1, at))
        out[start:stop] = x.mul_(scales[start:stop].float().index_select(1, at))
    return out


def extremes(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number of each block, or 0 where that is beyond them.

    Args:
        x: (rows, cols) float32, the last blocks of a row and of a column may be ragged.

    Returns:
        Two of (⌈rows / block[0]⌉, ⌈cols / block[1]⌉).
    """
    cols, (high, wide) = x.shape[1], block
    low = most = x
    if high > 1:  # the long way first, in which numbers lie side by side
        low = torch.stack([lines.amin(0) for lines in torch.split(x, high)])
        most = torch.stack([lines.amax(0) for lines in torch.split(x, high)])
    ends = torch.empty(2, len(low), -(cols // -wide))
    for start, stop in row_runs(len(low), cols):
        for end, side, reduce in ((ends[0], low, torch.amin), (ends[1], most, torch.amax)):
            _reduce_blocks(reduce, side[start:stop], wide, end[start:stop])
    return ends[0].clamp_(max=0), ends[1].clamp_(min=0)


def _reduce_blocks(
    reduce: Callable[[torch.Tensor, int], torch.Tensor],
    rows: torch.Tensor,
    wide: int,
    out: torch.Tensor,
) -> None:
    """Each row's blocks of so many columns, of which the last may be ragged, reduced to one."""
    cols = rows.shape[1]
    whole = cols - cols % wide
    if whole:
        blocks = rows[:, :whole].view(len(rows), whole // wide, wide).transpose(1, 2)
        if wide < _NARROW:
            blocks = blocks.contiguous()
        out[:, : whole // wide] = reduce(blocks, 1)
    if whole < cols:
        out[:, -1] = reduce(rows[:, whole:], 1)


def absmax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of each block, as ``extremes`` takes them."""
    high, wide = block
    if high > 1:  # the long way first, in which numbers lie side by side
        x = torch.stack([_largest_down(lines) for lines in torch.split(x, high)])
    largest = torch.empty(len(x), -(x.shape[1] // -wide))
    for start, stop in row_runs(*x.shape):
        _reduce_blocks(torch.amax, x[start:stop].abs(), wide, largest[start:stop])
    return largest


def _largest_down(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column, (cols,)."""
    runs = [x[start:stop].abs().amax(0) for start, stop in row_runs(*x.shape)]
    return runs[0] if len(runs) == 1 else torch.stack(runs).amax(0)


def block_sizes(shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """How many numbers each block holds, as ``extremes``."""
    sides = zip(shape, block, strict=True)
    down, across = (torch.arange(0, n, side).neg_().add_(n).clamp_(max=side) for n, side in sides)
    return torch.outer(down, across)


def over_scales(
    x: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    zeros: torch.Tensor | None = None,
    first: int = 0,
) -> torch.Tensor:
    """X[i, j] / scale[i', j'] + zero[i', j'], in float32 and not yet rounded: what ``times_scales``
    undoes.

    Args:
        x: (n, cols) float32: rows [first, first + n) of the weight.
    """
    result = torch.empty_like(x, memory_format=torch.contiguous_format)
    by_blocks(torch.div, x, scales, block, first, result)
    if zeros is not None:
        by_blocks(torch.add, result, zeros, block, first)
    return result


def still_fit(
    low: torch.Tensor,
    high: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    ends: tuple[float, float],
    anew: torch.Tensor,
) -> torch.Tensor:
    """For each block whether numbers from low to high (see ``extremes``) are well stored with these
    scales: none is cut off by more than half a step, and steps of scales made ``anew`` for them
    would be no finer than three quarters of these. Whole numbers that lie on these scales lie on
    none made anew: their largest code is less than half the distance of the ends.

    Args:
        scales, zeros, anew: as ``low``, float32.
        ends: the least and the largest code.
    """
    least, most = ends
    offset = 0.0 if zeros is None else zeros
    fit = (low / scales + offset >= least - 0.5) & (high / scales + offset <= most + 0.5)
    return fit & (scales > 0) & ((anew >= 0.75 * scales) | (low == high))


def linear_scales(
    low: torch.Tensor, high: torch.Tensor, ends: tuple[float, float], symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and zero points of whole numbers, with which codes between ``ends`` reach from low to
    high (see ``extremes``); a scale is 0 where both of these are.

    As compressed-tensors' ``calculate_qparams`` has it: symmetric ones divide by half the distance
    of the ends, which is half a step more than the largest code of whole numbers.
    """
    least, most = ends
    if symmetric:
        return torch.maximum(-low, high) / ((most - least) / 2), None
    scales = (high - low) / (most - least)
    zeros = torch.where(scales == 0, 0.0, least - low / scales)
    return scales, zeros.clamp_(least, most).round_()
