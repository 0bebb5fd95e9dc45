"""Codes times the scales of the blocks that they lie in."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_tools.linalg.eight_bits import widen

_RUN = 1 << 16  # elements that are worked on at a time, and stay in cache


def times_scales(
    codes: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    out: torch.Tensor,
    first: int = 0,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """W[i, j] = (code[i, j] − zero[i', j']) · scale[i', j'], with i' = i // block[0] and
    j' = j // block[1], computed in float32 and rounded once into ``out``.

    Args:
        codes: (n, cols) of any dtype that float32 holds: rows [first, first + n) of the weight.
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉) of the whole weight; the last blocks of a row
            and of a column may be ragged.
        zeros: as ``scales``; 0 where it is not given.
        out: (n, cols) of any float dtype.
    """
    n, cols = codes.shape
    step = max(_RUN // max(cols, 1), 1)
    direct = out.dtype == torch.float32
    room = torch.empty(0 if direct else min(step, n), cols)
    for start in range(0, n, step):
        stop = min(start + step, n)
        x = out[start:stop] if direct else room[: stop - start]
        widen(codes[start:stop], x)
        if zeros is not None:
            by_blocks(torch.Tensor.sub_, x, zeros, block, first + start)
        by_blocks(torch.Tensor.mul_, x, scales, block, first + start)
        if not direct:
            out[start:stop] = x
    return out


def by_blocks(
    operate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    table: torch.Tensor,
    block: tuple[int, int],
    first: int = 0,
) -> None:
    """``operate`` in place on each number of x with that of its block in the table.

    Args:
        x: (n, cols) float32, contiguous in its rows: rows [first, first + n) of the weight.
        table: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉), one of each block of the whole weight.
    """
    (n, cols), (high, wide) = x.shape, block
    lines = torch.arange(first, first + n) // high
    each = table.float()[lines]  # (n, blocks across)
    whole = cols - cols % wide
    if whole:
        operate(x[:, :whole].view(n, whole // wide, wide), each[:, : whole // wide, None])
    if whole < cols:
        operate(x[:, whole:], each[:, -1:])


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
    at = groups.long()
    x = codes.float()
    if zeros is not None:
        x.sub_(zeros.float()[:, at])
    return out.copy_(x.mul_(scales.float()[:, at]))
