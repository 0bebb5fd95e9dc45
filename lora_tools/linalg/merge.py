"""Adding updates to one stored tensor, run of rows by run of rows, and taking them out again.

With W the base, D_u = s_u · left_u @ right_u the plain updates and m_d, D_d the DoRA ones, each
with its weight w, the merged tensor is

    W' = W + Σ_u w_u D_u + Σ_d w_d (f_d ∘ (W + D_d) − W),    f_d = m_d / ‖W + D_d‖,

and (∏_l (1 + w_l (l − 1)) − 1) ∘ W of IA³'s vectors l, so effects do not depend on their order. One
adapter of weight 1, or several of IA³, give what PEFT's ``merge_and_unload`` gives. The sum is
formed in float32 for numbers in half precision, in float64 for others, and rounded once by the
caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from lora_tools.linalg.layouts import Block, Layout, Region
from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs
from lora_tools.linalg.truncation import sum_of_squares

# Reads rows [start, stop) of the base, in the working dtype.
RowReader = Callable[[int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """weight · scale · the product of each block, with DoRA's magnitude where it has one."""

    layout: Layout
    blocks: Sequence[Block]
    scale: float
    weight: float
    magnitude: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Added:
    """weight · values, added elementwise: a bias, or any other change. ``values`` has the stored
    shape; ``of_base``: they are made of the base itself, so that without it they are not known."""

    values: torch.Tensor
    weight: float
    of_base: bool = False


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The tensor moves by ``weight`` of the way to ``values``, which lie at (row, col) of it and
    most often are all of it: modules_to_save."""

    values: torch.Tensor
    weight: float
    row: int = 0
    col: int = 0


@dataclasses.dataclass(frozen=True)
class RowsReplaced:
    """Rows at ``indices`` move by ``weight`` of the way to ``values``: trainable tokens."""

    indices: torch.Tensor
    values: torch.Tensor
    weight: float


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """The tensor moves by ``weight`` of the way to ``factor`` ∘ W: IA³ (arXiv 2205.05638). Of
    several each multiplies what the others leave.

    ``factor``: (rows, 1) or (1, cols).
    """

    factor: torch.Tensor
    weight: float


@dataclasses.dataclass
class Survival:
    """How much of a change Δ = exact − base is left in what was written, summed run by run.

    Attributes:
        wanted: ‖Δ‖².
        moved: ⟨written − base, Δ⟩; moved / wanted is the share of Δ that was kept.
        error: ‖written − exact‖².
    """

    wanted: float = 0.0
    moved: float = 0.0
    error: float = 0.0

    def add(self, base: torch.Tensor, exact: torch.Tensor, written: torch.Tensor) -> None:
        """One run of rows of each, base and exact in the working dtype. May reuse ``base``."""
        off = written.to(exact.dtype) - exact
        self.sum(torch.sub(exact, base, out=base), off)

    def sum(self, delta: torch.Tensor, off: torch.Tensor) -> None:
        """One run of Δ, and of written − exact."""
        energy = sum_of_squares(delta)
        self.wanted += energy
        self.moved += energy + float(torch.dot(delta.reshape(-1), off.reshape(-1)))
        self.error += sum_of_squares(off)

    def less(self, other: Survival, times: float) -> Survival:
        """The sums less so many times another's."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Survival(*(a - times * b for a, b in pairs))


# Where a product lies, its left (rows, r) with all scales, its right (r, cols).
_Product = tuple[Region, torch.Tensor, torch.Tensor]
_Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Effect = LowRank | Added | Multiplied | Replaced | RowsReplaced


class TensorMerge:
    """The effects on one tensor of shape (rows, cols), ready to be applied to runs of rows.

    Args:
        norms: ‖W + D‖ of each DoRA effect, if known from an earlier merge; else they are computed
            from ``read``, the base's rows.
    """

    def __init__(
        self,
        effects: Sequence[Effect],
        shape: tuple[int, int],
        read: RowReader | None,
        dtype: torch.dtype = torch.float32,
        norms: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.dtype, self.shape = dtype, shape
        self._added = [e for e in effects if isinstance(e, Added)]
        self._replaced = [e for e in effects if isinstance(e, Replaced | RowsReplaced)]
        low_rank = [e for e in effects if isinstance(e, LowRank)]
        plain = [e for e in low_rank if e.magnitude is None]
        self._doras = [e for e in low_rank if e.magnitude is not None]
        self._keep = 1.0 - sum(e.weight for e in self._doras)
        self._gains = [
            (e.factor.to(dtype) - 1) * e.weight for e in effects if isinstance(e, Multiplied)
        ]
        self._plain = _products(
            [(block, e.weight * e.scale) for e in plain for block in e.blocks], dtype
        )
        self._dora_products = [
            _products([(b, e.scale) for b in e.blocks], dtype) for e in self._doras
        ]
        if norms is not None:
            self.norms = [norm.to(dtype) for norm in norms]
        elif self._doras:
            assert read is not None
            self.norms = [
                self._norm(e, products, read)
                for e, products in zip(self._doras, self._dora_products, strict=True)
            ]
        else:
            self.norms = []
        self._factors = [
            e.layout.per_output(e.magnitude.flatten().to(dtype) / norm) * e.weight
            for e, norm in zip(self._doras, self.norms, strict=True)
            if e.magnitude is not None
        ]

    def _norm(self, effect: LowRank, products: Sequence[_Product], read: RowReader) -> torch.Tensor:
        """‖W + D‖ along the layout's magnitude dimension."""
        dim = effect.layout.magnitude_dim
        parts = []
        for start, stop in row_runs(*self.shape, RUN_ELEMENTS):
            rows = read(start, stop)
            for replaced in self._replaced:
                rows = _move(rows, replaced, start, stop)
            merged = _add_products(rows, products, start, stop)
            parts.append(merged.double().square_().sum(dim))
        total = torch.cat(parts) if dim == 1 else torch.stack(parts).sum(0)
        return total.sqrt().to(self.dtype)

    def _slice(self, vector: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return vector[start:stop] if vector.shape[0] == self.shape[0] != 1 else vector

    def forward(self, rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Merged rows [start, stop) from the base's, both (stop − start, cols). May reuse rows."""
        for effect in self._replaced:
            rows = _move(rows, effect, start, stop)
        result = rows
        if self._doras or self._gains:
            result = rows * self._kept(start, stop)
            for factor, products in self._dora_rows(start, stop):
                moved = _add_products(rows.clone(), products, start, stop)
                result.addcmul_(factor.expand_as(moved), moved)
        result = _add_products(result, self._plain, start, stop)
        for added in self._added:
            result = result.add_(added.values[start:stop].to(self.dtype), alpha=added.weight)
        return result

    def estimate(self, merged: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The base's rows from the merged ones, up to rounding. May reuse ``merged``.

        Rows that were replaced are returned as they are, and so is what was made of the base.
        """
        merged = _add_products(merged, self._plain, start, stop, -1)
        for added in self._known_added():
            merged = merged.sub_(added.values[start:stop].to(self.dtype), alpha=added.weight)
        if self._doras or self._gains:
            for here, products in self._dora_rows(start, stop):
                delta = _add_products(torch.zeros_like(merged), products, start, stop)
                merged = merged.sub_(here * delta)
            merged = merged.div_(self._divisor(start, stop))
        return merged

    def slack(
        self, merged: torch.Tensor, start: int, stop: int, formed: torch.dtype | None = None
    ) -> torch.Tensor:
        """How far ``estimate`` on another machine, which sums products in another order, can lie
        from this one's, or from one ``formed`` in another dtype: elementwise, generously."""
        unit = 4 * torch.finfo(formed or self.dtype).eps
        result = merged.abs() * unit
        for part, left, right in _within(result, self._plain, start, stop):
            part += _product_slack(left, right, unit)
        for added in self._known_added():
            result += added.values[start:stop].to(self.dtype).abs() * (abs(added.weight) * unit)
        if self._doras or self._gains:
            for here, products in self._dora_rows(start, stop):
                moved = torch.zeros_like(result)
                for part, left, right in _within(moved, products, start, stop):
                    part += _product_slack(left, right, unit)
                result += here.abs() * moved
            result /= self._divisor(start, stop).abs()
        return result

    def _known_added(self) -> list[Added]:
        return [added for added in self._added if not added.of_base]

    def _dora_rows(
        self, start: int, stop: int
    ) -> Iterator[tuple[torch.Tensor, Sequence[_Product]]]:
        for factor, products in zip(self._factors, self._dora_products, strict=True):
            yield self._slice(factor, start, stop), products

    def _kept(self, start: int, stop: int) -> torch.Tensor:
        """What the base alone is multiplied by: ∏ (1 + w_l (l − 1)) − Σ w_d."""
        total = torch.ones((1, 1), dtype=self.dtype)
        for gain in self._gains:
            total = total * (1 + self._slice(gain, start, stop))
        return total + (self._keep - 1)

    def _divisor(self, start: int, stop: int) -> torch.Tensor:
        """What the base was multiplied by in all: that, and Σ w_d f_d. 1 where that is 0."""
        total = self._kept(start, stop)
        for here, _ in self._dora_rows(start, stop):
            total = total + here
        return torch.where(total == 0, 1, total)


def working_dtype(stored: torch.dtype) -> torch.dtype:
    """What sums that are to be stored so are formed in: float32 for half precision, float64 for
    wider floats, whose rounding it leaves the only one, and for integers, which it holds up to
    2⁵³."""
    half = stored.is_floating_point and stored.itemsize < 4
    return torch.float32 if half else torch.float64


def others_dtype(stored: torch.dtype) -> torch.dtype:
    """What PEFT forms such sums in, as versions before this did: float32, but for float64."""
    single = stored.is_floating_point and stored.itemsize <= 4
    return torch.float32 if single else torch.float64


def merged_whole(
    weight: torch.Tensor, effects: Sequence[Effect], matrix: tuple[int, int]
) -> torch.Tensor:
    """A tensor in memory, seen as ``matrix`` (rows, cols), with the effects on it, in its own shape
    and dtype: summed in float32 or better and rounded once."""
    source = weight.detach().reshape(matrix)
    working = working_dtype(weight.dtype)

    def read(start: int, stop: int) -> torch.Tensor:
        return source[start:stop].to(working, copy=True)

    work = TensorMerge(effects, matrix, read, working)
    result = torch.empty_like(source)
    for start, stop in row_runs(*matrix, RUN_ELEMENTS):
        result[start:stop] = work.forward(read(start, stop), start, stop)
    return result.reshape(weight.shape)


def dense(blocks: Sequence[Block], shape: tuple[int, int]) -> torch.Tensor:
    """The sum of blocks as a matrix of this shape, in float64."""
    rows = torch.zeros(shape, dtype=torch.float64)
    products = _products([(block, 1.0) for block in blocks], torch.float64)
    return _add_products(rows, products, 0, shape[0])


def _products(blocks: Sequence[tuple[Block, float]], dtype: torch.dtype) -> list[_Product]:
    """Blocks with their scales, those on one region put together into one product."""
    regions: dict[Region, list[tuple[Block, float]]] = {}
    for block, scale in blocks:
        regions.setdefault(block.region, []).append((block, scale))
    return [
        (
            at,
            torch.cat([b.left.to(dtype) * scale for b, scale in here], 1),
            torch.cat([b.right.to(dtype) for b, _ in here], 0),
        )
        for at, here in regions.items()
    ]


def _within(
    rows: torch.Tensor, products: Sequence[_Product], start: int, stop: int
) -> Iterator[_Part]:
    """The part of rows [start, stop) that each product acts on, and the factors cut to it."""
    for at, left, right in products:
        first, last = max(start, at.row), min(stop, at.row + at.rows)
        if first < last:
            here = rows[first - start : last - start, at.col : at.col + at.cols]
            yield here, left[first - at.row : last - at.row], right


def _add_products(
    rows: torch.Tensor, products: Sequence[_Product], start: int, stop: int, sign: int = 1
) -> torch.Tensor:
    """Rows [start, stop) with every product added, in place."""
    for part, left, right in _within(rows, products, start, stop):
        part.addmm_(left, right, alpha=sign)
    return rows


def _product_slack(left: torch.Tensor, right: torch.Tensor, unit: float) -> torch.Tensor:
    """The error bound of a product of inner length r, γ_r ‖left_i‖ ‖right_j‖ (Higham, Accuracy and
    Stability, 3.5, with the Cauchy–Schwarz inequality)."""
    return torch.outer(left.norm(dim=1) * (left.shape[1] * unit), right.norm(dim=0))


def _move(
    rows: torch.Tensor, effect: Replaced | RowsReplaced, start: int, stop: int
) -> torch.Tensor:
    if isinstance(effect, Replaced):
        first, last = max(start, effect.row), min(stop, effect.row + effect.values.shape[0])
        if first < last:
            target = effect.values[first - effect.row : last - effect.row].to(rows.dtype)
            cols = slice(effect.col, effect.col + target.shape[1])
            moved = rows[first - start : last - start, cols]
            moved.copy_(target if effect.weight == 1 else torch.lerp(moved, target, effect.weight))
        return rows
    here = (effect.indices >= start) & (effect.indices < stop)
    at = effect.indices[here] - start
    target = effect.values[here].to(rows.dtype)
    rows[at] = target if effect.weight == 1 else torch.lerp(rows[at], target, effect.weight)
    return rows
