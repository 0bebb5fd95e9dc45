"""Gate, up and down of experts: which rows of a matrix they are, and how they are put into one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tools.linalg.layout import Block

if TYPE_CHECKING:
    import torch


def rows_of_half(half: int, halves: int, rows: int, interleaved: bool) -> slice:
    """The rows of a matrix (rows, in) that its ``half`` is: all of them where it is one of one,
    every other one where two alternate."""
    if halves == 1:
        return slice(0, rows)
    if interleaved:
        return slice(half, rows, halves)
    size = rows // halves
    return slice(half * size, (half + 1) * size)


def placed(
    left: torch.Tensor, right: torch.Tensor, at: slice, rows: int, first: int, transposed: bool
) -> Block:
    """left (n, r) @ right (r, in) as the rows ``at`` of an expert's matrix (rows, in), which begins
    in row ``first`` of the stored one, there perhaps transposed. Rows between are zeros."""
    start = at.start
    if at.step is not None:
        wide = left.new_zeros(rows, left.shape[1])
        wide[at] = left
        left, start = wide, 0
    if transposed:
        return Block(first, start, right.T, left.T)
    return Block(first + start, 0, left, right)
