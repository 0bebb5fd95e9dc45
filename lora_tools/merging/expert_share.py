"""What a tensor of a base and factors of an adapter have in common, where one of them holds experts
one by one and the other in one tensor, or in other parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_tools.formats.expert_names import ExpertName

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.layouts import Block
    from lora_tools.linalg.merge import Replaced


@dataclasses.dataclass(frozen=True)
class Share:
    """The projections that both hold, of the experts that both hold.

    Attributes:
        own: what the adapter acts on; stored: the base's tensor.
        count: experts of the layer.
        interleaved: gate and up alternate where one tensor holds both.
        swapped: the adapter's matrices are (in, out); transposed: the base's are.
    """

    own: ExpertName
    stored: ExpertName
    count: int
    interleaved: bool
    swapped: bool = False
    transposed: bool = False

    def halves(self, own_rows: int, stored_rows: int) -> Iterator[tuple[slice, slice]]:
        """Outputs of the adapter's matrix (own_rows, in), and those that they are in the base's
        (stored_rows, in)."""
        from lora_tools.linalg.experts import rows_of_half

        mine, theirs = self.own.projections, self.stored.projections
        if mine == theirs:
            yield slice(0, own_rows), slice(0, stored_rows)
            return
        for half in (p for p in mine if p in theirs):
            yield (
                rows_of_half(mine.index(half), len(mine), own_rows, self.interleaved),
                rows_of_half(theirs.index(half), len(theirs), stored_rows, self.interleaved),
            )

    def blocks(
        self, lora_A: torch.Tensor, lora_B: torch.Tensor, shape: tuple[int, ...]
    ) -> list[Block]:
        """The change of the base's tensor of this shape, up to its scaling."""
        from lora_tools.linalg.experts import placed

        _, rows, cols = (1, *shape)[-3:]
        size = cols if self.transposed else rows
        return [
            placed(left[mine], right, theirs, size, self._row(number, rows), self.transposed)
            for number, left, right in self._products(lora_A, lora_B)
            for mine, theirs in self.halves(left.shape[0], size)
        ]

    def _row(self, number: int, rows: int) -> int:
        """The first row of an expert's matrix in the stored tensor."""
        return number * rows if self.stored.number is None else 0

    def _numbers(self) -> list[int]:
        """The experts."""
        one = self.own.number if self.own.number is not None else self.stored.number
        return list(range(self.count)) if one is None else [one]

    def _products(
        self, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Experts, and left (out, r) and right (r, in) of each."""
        from lora_tools.linalg.experts import one_of_A, one_of_B

        if self.own.number is not None:
            yield self.own.number, lora_B, lora_A
            return
        for number in self._numbers():
            right = one_of_A((lora_A,), (self.count, number, 0, lora_A.shape[1], 1, self.swapped))
            left = one_of_B((lora_B,), (self.count, number, 0, lora_B.shape[0], 1, self.swapped))
            yield (number, right, left) if self.swapped else (number, left, right)

    def replaced(
        self, saved: torch.Tensor, shape: tuple[int, ...], weight: float
    ) -> list[Replaced]:
        """The effect of a tensor saved whole, (out, in) or all experts', on one of this shape. Its
        rows are one run (``halves``)."""
        from lora_tools.linalg.merge import Replaced

        _, rows, cols = (1, *shape)[-3:]
        effects = []
        for number in self._numbers():
            matrix = saved if self.own.number is not None else saved[number]
            matrix = matrix.T if self.swapped else matrix
            for mine, theirs in self.halves(matrix.shape[0], cols if self.transposed else rows):
                values, row = matrix[mine], self._row(number, rows)
                if self.transposed:
                    effects.append(Replaced(values.T, weight, row, theirs.start))
                else:
                    effects.append(Replaced(values, weight, row + theirs.start))
        return effects
