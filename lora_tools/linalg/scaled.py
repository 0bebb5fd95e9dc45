"""Codes times the scales of the blocks that they lie in."""

from __future__ import annotations

import torch


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
    high, wide = block
    lines = torch.arange(first, first + n) // high
    x = out if out.dtype == torch.float32 else torch.empty(n, cols)
    x.copy_(codes)
    for operate, table in ((torch.Tensor.sub_, zeros), (torch.Tensor.mul_, scales)):
        if table is None:
            continue
        each = table.float()[lines]  # (n, blocks across)
        whole = cols - cols % wide
        if whole:
            operate(x[:, :whole].view(n, whole // wide, wide), each[:, : whole // wide, None])
        if whole < cols:
            operate(x[:, whole:], each[:, -1:])
    return out if x is out else out.copy_(x)


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
