"""Gate, up and down of experts: which rows of a matrix they are, and how they are put into one."""

from __future__ import annotations

from collections.abc import Sequence
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


def one_of_A(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """One expert's part of PEFT's lora_A (E · r, n) of all → (r, n), or turned (n, r).

    ``numbers``: E, the expert, first, after last and step of the n that are taken, whether turned.
    """
    count, number, start, stop, step, turned = numbers
    part = tensors[0].reshape(count, -1, tensors[0].shape[1])[number][:, start:stop:step]
    return part.T if turned else part


def one_of_B(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """One expert's part of PEFT's lora_B (n, r · E) of all → (n, r), or turned (r, n); ``numbers``
    as in ``one_of_A``."""
    count, number, start, stop, step, turned = numbers
    part = tensors[0].reshape(tensors[0].shape[0], -1, count)[start:stop:step, :, number]
    return part.T if turned else part


def turned_A(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """PEFT's lora_A (E · r, n) of all experts as the lora_B (n, r · E) of their transposes.
    ``numbers``: E."""
    n = tensors[0].shape[1]
    return tensors[0].reshape(numbers[0], -1, n).permute(2, 1, 0).reshape(n, -1)


def turned_B(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """PEFT's lora_B (n, r · E) of all experts as the lora_A (E · r, n) of their transposes.
    ``numbers``: E."""
    n = tensors[0].shape[0]
    return tensors[0].reshape(n, -1, numbers[0]).permute(2, 1, 0).reshape(-1, n)


def zeros(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """A factor of no change, of the shape ``numbers``."""
    return tensors[0].new_zeros(tuple(numbers))


def all_As(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """PEFT's lora_A (E · h · r, in) of all experts, out of h factors (r, in) of each, one above the
    other. ``numbers``: E, h, r, in, and of each factor whether it is there; zeros else."""
    import torch

    count, halves, r, inside, *there = numbers
    given, none = iter(tensors), tensors[0].new_zeros(r, inside)
    return torch.cat([next(given) if there[i] else none for i in range(count * halves)])


def all_Bs(tensors: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
    """PEFT's lora_B (out, h · r · E) of all experts, out of h factors (out / h, r) of each, each in
    its own rows and columns. ``numbers``: E, h, r, out, whether the rows of halves alternate, and
    of each factor whether it is there; zeros else."""
    count, halves, r, out, interleaved, *there = numbers
    given, whole = iter(tensors), tensors[0].new_zeros(out, halves * r, count)
    for i in range(count * halves):
        if there[i]:
            rows = rows_of_half(i % halves, halves, out, bool(interleaved))
            whole[rows, i % halves * r : (i % halves + 1) * r, i // halves] = next(given)
    return whole.reshape(out, -1)
