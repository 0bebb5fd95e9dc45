"""Codes times the scales of the blocks that they lie in."""

from __future__ import annotations

from collections.abc import Callable

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
        if table is not None:
            _across(operate, x, table.float()[lines], wide)
    return out if x is out else out.copy_(x)


def _across(
    operate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    each: torch.Tensor,
    wide: int,
) -> None:
    """``operate`` on x (n, cols) in its place, each number with that of its row and its ``wide``
    columns: ``each`` is (n, ⌈cols / wide⌉)."""
    n, cols = x.shape
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
    x = codes.to(torch.float32, copy=True)
    if zeros is not None:
        x.sub_(zeros.float()[:, at])
    return out.copy_(x.mul_(scales.float()[:, at]))


def extremes(x: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest number of each block, or 0 where that is beyond them.

    Args:
        x: (rows, cols) float32, the last blocks of a row and of a column may be ragged.

    Returns:
        Two of (⌈rows / block[0]⌉, ⌈cols / block[1]⌉).
    """
    high, wide = block
    rows, cols = x.shape
    if rows % high or cols % wide:
        x = torch.nn.functional.pad(x, (0, -cols % wide, 0, -rows % high))
    blocks = x.view(-(rows // -high), high, -(cols // -wide), wide)
    return blocks.amin((1, 3)).clamp_(max=0), blocks.amax((1, 3)).clamp_(min=0)


def over_scales(
    x: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """X[i, j] / scale[i', j'] + zero[i', j'], in float32 and not yet rounded: what ``times_scales``
    undoes.

    Args:
        x: (rows, cols) float32, the whole weight.
    """
    high, wide = block
    result, lines = x.clone(), torch.arange(len(x)) // high
    _across(torch.Tensor.div_, result, scales.float()[lines], wide)
    if zeros is not None:
        _across(torch.Tensor.add_, result, zeros.float()[lines], wide)
    return result


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
