"""What a layer kind is: how a layer's stored weight relates to its low-rank factors.

A stored weight is looked at as a matrix (rows, cols): a view of its row-major elements. A kind says
which regions of that matrix are a low-rank product each (the whole of it for most; a block of a
MergedLinear, a group of a convolution, an expert of a fused weight), and how the pair lora_A and
lora_B that adapters store is cut into those products. All else (merging, fitting, resizing, DoRA's
norms) is then the same for every kind.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Product = tuple[torch.Tensor, torch.Tensor]

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Region:
    """A rectangle of a stored weight's matrix; or one in stripes: ``run`` rows at a time, each
    ``every`` rows after the one before."""

    row: int
    col: int
    rows: int
    cols: int
    run: int = 0
    every: int = 0

    @property
    def stripes(self) -> list[tuple[int, int]]:
        """First row, and the one after the last, of each of its stripes in the matrix."""
        run = self.run or self.rows
        starts = (self.row + i * self.every for i in range(self.rows // max(run, 1)))
        return [(start, start + run) for start in starts]


@dataclasses.dataclass(frozen=True)
class Block:
    """left (rows, r) @ right (r, cols), at (row, col) of a stored weight's matrix."""

    row: int
    col: int
    left: torch.Tensor
    right: torch.Tensor

    @property
    def region(self) -> Region:
        return Region(self.row, self.col, self.left.shape[0], self.right.shape[1])


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layer kind whose weight is one product; other kinds override what differs.

    Attributes:
        name: the key in ``layouts.LAYOUTS``.
        form: how adapters hold its factors: "matrix" (lora_A (r, in), lora_B (out, r)),
            "embedding", "conv", "merged" or "experts"; see the kinds. PEFT holds a "merged" one as
            "matrix".
        transposed: the weight is stored as (in, out), so that delta = lora_A.T @ lora_B.T.
        magnitude_dim: the dimension of the matrix that DoRA's norm runs over. PEFT 0.21: one
            magnitude for each output of a Linear, Conv1D or convolution, for each column of an
            Embedding.
    """

    name: str
    form: str = "matrix"
    transposed: bool = False
    magnitude_dim: int = 1

    @property
    def written(self) -> str:
        """The form of what ``factors`` gives."""
        return self.form

    def matrix(self, weight: Shape) -> tuple[int, int]:
        """(rows, cols) that a stored weight of this shape is looked at as."""
        return weight[0], math.prod(weight[1:])

    def having(self, **parameters: Any) -> Layout:
        """This kind with its parameters set."""
        return dataclasses.replace(self, **parameters)

    def of_factors(self, a: Shape, b: Shape) -> Layout:
        """This kind with what the shapes of the factors tell, where no weight is at hand."""
        return self

    def suits(self, weight: Shape) -> bool:
        """Whether a weight of this shape can be of this kind."""
        return len(weight) == 2

    def regions(self, weight: Shape) -> tuple[Region, ...]:
        """The regions that are a product each, in the order of ``split``."""
        return (Region(0, 0, *self.matrix(weight)),)

    def fits(self, weight: Shape, a: Shape, b: Shape) -> Layout | None:
        """This kind, its parameters set, if factors of these shapes are for such a weight."""
        if not len(weight) == len(a) == len(b) == 2 or a[0] != b[1]:
            return None
        out_in = (b[0], a[1])
        return self if weight == (out_in[::-1] if self.transposed else out_in) else None

    def shapes(self, weight: Shape, r: int) -> tuple[Shape, Shape]:
        """Shapes of what ``factors`` gives for products of rank r each."""
        rows, cols = self.matrix(weight)
        out, inside = (cols, rows) if self.transposed else (rows, cols)
        return (r, inside), (out, r)

    def split(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> list[Product]:
        """The products lora_B_i (out_i, r) @ lora_A_i (r, in_i) that the factors hold."""
        return [(lora_B, lora_A)]

    def join(self, parts: Sequence[Product], a: Shape, b: Shape) -> Product:
        """The inverse of ``split`` → lora_A, lora_B, for products of one rank each. ``a`` and ``b``
        are shapes of the factors at any rank."""
        ((lora_B, lora_A),) = parts
        return lora_A.contiguous(), lora_B.contiguous()

    def blocks(self, lora_A: torch.Tensor, lora_B: torch.Tensor, weight: Shape) -> list[Block]:
        """The stored delta of a weight of this shape, up to its scaling."""
        blocks = []
        for at, (B, A) in zip(self.regions(weight), self.split(lora_A, lora_B), strict=True):
            left, right = (A.T, B.T) if self.transposed else (B, A)
            size = left.shape[0] // len(at.stripes)
            blocks += [
                Block(row, at.col, left[i * size : (i + 1) * size], right)
                for i, (row, _) in enumerate(at.stripes)
            ]
        return blocks

    def r(self, ranks: Sequence[int]) -> int:
        """What adapters divide lora_alpha by, for ``factors`` of products of these ranks."""
        return max(ranks)

    def rest(self, weight: Shape) -> tuple[Region, ...]:
        """What no region covers: it cannot change."""
        return ()

    def factors(self, products: Sequence[Product], weight: Shape) -> Product:
        """(left (rows, r), right (r, cols)) of every region → lora_A, lora_B as PEFT holds them;
        lower ranks are padded with zeros to the highest."""
        r = max(left.shape[1] for left, _ in products)
        parts = [pad_rank(left, right, r) for left, right in products]
        if self.transposed:
            parts = [(right.T, left.T) for left, right in parts]
        return self.join(parts, *self.shapes(weight, r))

    def magnitudes(self, weight: Shape) -> int:
        """How many magnitudes DoRA has for a weight of this shape."""
        return self.matrix(weight)[1 - self.magnitude_dim]

    def per_output(self, magnitude: torch.Tensor) -> torch.Tensor:
        """DoRA's magnitudes, or numbers to go with them, shaped to scale the matrix."""
        return magnitude.reshape(-1, 1) if self.magnitude_dim == 1 else magnitude.reshape(1, -1)


def clip(blocks: Sequence[Block], start: int, stop: int) -> list[Block]:
    """The part of a delta in rows [start, stop), as one of its own."""
    cut = []
    for block in blocks:
        first, last = max(start - block.row, 0), min(stop - block.row, block.left.shape[0])
        if first < last:
            row = max(block.row - start, 0)
            cut.append(Block(row, block.col, block.left[first:last], block.right))
    return cut


def pad_rank(left: torch.Tensor, right: torch.Tensor, r: int) -> Product:
    """Zero columns and rows up to rank r: the product stays."""
    from torch.nn.functional import pad

    missing = r - left.shape[1]
    return pad(left, (0, missing)), pad(right, (0, 0, 0, missing))
