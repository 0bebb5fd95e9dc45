"""Adding updates to one stored tensor, run of rows by run of rows, and taking them out again.

With W the base, D_u = s_u · left_u @ right_u the plain updates and m_d, D_d the DoRA ones, each
with its weight w, the merged tensor is

    W' = W + Σ_u w_u D_u + Σ_d w_d (f_d ∘ (W + D_d) − W),    f_d = m_d / ‖W + D_d‖,

so effects add up and do not depend on their order. One adapter of weight 1 gives what PEFT's
``merge_and_unload`` gives. The sum is formed in float32 (float64 for float64 tensors) and rounded
once by the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch

from lora_tools.linalg.layouts import Layout
from lora_tools.linalg.lora import rows_per_run
from lora_tools.linalg.svd import sum_of_squares

# Reads rows [start, stop) of the base, in the working dtype.
RowReader = Callable[[int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class LowRank:
    """weight · scale · left (rows, r) @ right (r, cols), with DoRA's magnitude where it has one."""

    layout: Layout
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    weight: float
    magnitude: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Added:
    """weight · values, added elementwise: a bias. ``values`` has the stored shape."""

    values: torch.Tensor
    weight: float


@dataclasses.dataclass(frozen=True)
class Replaced:
    """The tensor moves by ``weight`` of the way to ``values``: modules_to_save."""

    values: torch.Tensor
    weight: float


@dataclasses.dataclass(frozen=True)
class RowsReplaced:
    """Rows at ``indices`` move by ``weight`` of the way to ``values``: trainable tokens."""

    indices: torch.Tensor
    values: torch.Tensor
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
        delta = torch.sub(exact, base, out=base).reshape(-1)
        energy = sum_of_squares(delta)
        self.wanted += energy
        self.moved += energy + float(torch.dot(delta, off.reshape(-1)))
        self.error += sum_of_squares(off)


Effect = LowRank | Added | Replaced | RowsReplaced


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
        self._step = rows_per_run(shape)
        self._added = [e for e in effects if isinstance(e, Added)]
        self._replaced = [e for e in effects if isinstance(e, Replaced | RowsReplaced)]
        low_rank = [e for e in effects if isinstance(e, LowRank)]
        plain = [e for e in low_rank if e.magnitude is None]
        self._doras = [e for e in low_rank if e.magnitude is not None]
        self._keep = 1.0 - sum(e.weight for e in self._doras)
        self._left = _cat([e.left.to(dtype) * (e.weight * e.scale) for e in plain], 1)
        self._right = _cat([e.right.to(dtype) for e in plain], 0)
        if norms is not None:
            self.norms = [norm.to(dtype) for norm in norms]
        elif self._doras:
            assert read is not None
            self.norms = [self._norm(e, read) for e in self._doras]
        else:
            self.norms = []
        self._factors = [
            e.layout.per_output(e.magnitude.to(dtype) / norm) * e.weight
            for e, norm in zip(self._doras, self.norms, strict=True)
            if e.magnitude is not None
        ]
        self._dora_left = [e.left.to(dtype) * e.scale for e in self._doras]
        self._dora_right = [e.right.to(dtype) for e in self._doras]

    def _norm(self, effect: LowRank, read: RowReader) -> torch.Tensor:
        """‖W + D‖ along the layout's magnitude dimension."""
        left, right = effect.left.to(self.dtype) * effect.scale, effect.right.to(self.dtype)
        dim = effect.layout.magnitude_dim
        parts = []
        for start in range(0, self.shape[0], self._step):
            stop = min(start + self._step, self.shape[0])
            rows = read(start, stop)
            for replaced in self._replaced:
                rows = _move(rows, replaced, start, stop)
            merged = torch.addmm(rows, left[start:stop], right)
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
        if self._doras:
            result = rows * self._keep
            for factor, left, right in self._dora_rows(start, stop):
                moved = torch.addmm(rows, left, right)
                result.addcmul_(factor.expand_as(moved), moved)
        if self._left is not None and self._right is not None:
            result = result.addmm_(self._left[start:stop], self._right)
        for added in self._added:
            result = result.add_(added.values[start:stop].to(self.dtype), alpha=added.weight)
        return result

    def estimate(self, merged: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """The base's rows from the merged ones, up to rounding. May reuse ``merged``.

        Rows that were replaced are returned as they are.
        """
        if self._left is not None and self._right is not None:
            merged = merged.addmm_(self._left[start:stop], self._right, alpha=-1)
        for added in self._added:
            merged = merged.sub_(added.values[start:stop].to(self.dtype), alpha=added.weight)
        if self._doras:
            for here, left, right in self._dora_rows(start, stop):
                merged = merged.sub_(here * (left @ right))
            merged = merged.div_(self._divisor(start, stop))
        return merged

    def slack(self, merged: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """How far ``estimate`` on another machine, which sums products in another order, can lie
        from this one's: elementwise, generously."""
        unit = 4 * torch.finfo(self.dtype).eps
        result = merged.abs() * unit
        if self._left is not None and self._right is not None:
            result += _product_slack(self._left[start:stop], self._right, unit)
        for added in self._added:
            result += added.values[start:stop].to(self.dtype).abs() * (abs(added.weight) * unit)
        if self._doras:
            for here, left, right in self._dora_rows(start, stop):
                result += here.abs() * _product_slack(left, right, unit)
            result /= self._divisor(start, stop).abs()
        return result

    def _dora_rows(
        self, start: int, stop: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for factor, left, right in zip(
            self._factors, self._dora_left, self._dora_right, strict=True
        ):
            yield self._slice(factor, start, stop), left[start:stop], right

    def _divisor(self, start: int, stop: int) -> torch.Tensor:
        """What the base was multiplied by: 1 − Σ w_d + Σ w_d f_d."""
        return self._keep + sum(
            (here for here, _, _ in self._dora_rows(start, stop)), torch.zeros(1, dtype=self.dtype)
        )


def _product_slack(left: torch.Tensor, right: torch.Tensor, unit: float) -> torch.Tensor:
    """The error bound of a product of inner length r, γ_r ‖left_i‖ ‖right_j‖ (Higham, Accuracy and
    Stability, 3.5, with the Cauchy–Schwarz inequality)."""
    return torch.outer(left.norm(dim=1) * (left.shape[1] * unit), right.norm(dim=0))


def _cat(parts: list[torch.Tensor], dim: int) -> torch.Tensor | None:
    return torch.cat(parts, dim) if parts else None


def _move(
    rows: torch.Tensor, effect: Replaced | RowsReplaced, start: int, stop: int
) -> torch.Tensor:
    if isinstance(effect, Replaced):
        target = effect.values[start:stop].to(rows.dtype)
        return target.clone() if effect.weight == 1 else torch.lerp(rows, target, effect.weight)
    here = (effect.indices >= start) & (effect.indices < stop)
    at = effect.indices[here] - start
    target = effect.values[here].to(rows.dtype)
    rows[at] = target if effect.weight == 1 else torch.lerp(rows[at], target, effect.weight)
    return rows
