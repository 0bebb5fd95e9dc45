"""Factors fitted to one pair's delta at the ranks that were chosen, and measured as they will be
written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError, NonFiniteError
from lora_tools.extracting.decompose import (
    Decomposition,
    Found,
    Sides,
    delta_of,
    find,
    may_sketch,
    regions_of,
    weighting_of,
)
from lora_tools.extracting.pairs import Pair
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.linalg.scaling import scaling
from lora_tools.records import ModuleResult

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.delta import Delta
    from lora_tools.linalg.weighting import Weighting


@dataclasses.dataclass(frozen=True)
class Fitted:
    """One module's factors as they will be written, and their measure; no factors at rank 0.
    ``r`` is what adapters divide lora_alpha by."""

    result: ModuleResult
    lora: tuple[torch.Tensor, torch.Tensor, float] | None
    r: int = 0


def find_and_fit(
    pair: Pair, sides: Sides, options: Decomposition, buffers: Buffers
) -> Fitted | None:
    """Decompose a delta and fit its factors, by way of half precision where that is faster and
    good enough. None where the values are the same."""
    if may_sketch(pair, options):
        found = find(pair, sides, options, buffers, options.half)
        if all(f.svd is not None or not f.total for f in found):
            fitted = fit(pair, sides, found, [f.rank for f in found], options, sketch=True)
            # Where what is left out is as small as the copy's rounding, half precision won't do.
            if fitted is not None:
                return fitted
    found = find(pair, sides, options, buffers)
    return fit(pair, sides, found, [f.rank for f in found], options)


def fit(
    pair: Pair,
    sides: Sides,
    found: Sequence[Found],
    ranks: Sequence[int],
    options: Decomposition,
    sketch: bool = False,
) -> Fitted | None:
    """Factors of these ranks, one a region, in the dtype they are written in, and their measured
    error. None where the values are the same, or where a sketch's own rounding is as large as what
    it leaves out.

    Raises:
        NonFiniteError: the factors overflow their dtype.
        MismatchError: the only change is where the layer kind has no factors.
    """
    from lora_tools.linalg import lora
    from lora_tools.linalg.svd import HALF_LOSS

    layout, shape = pair.layout, pair.spec.shape
    assert layout is not None
    assert pair.base is not None
    measure = _measure(pair, sides, found)
    if measure is None:
        return None
    weighting = weighting_of(pair, options)
    if not any(ranks):
        whole = math.nan if weighting is None else measure.searched
        return Fitted(measure.result(0, measure.total, whole, 0.0), None)
    r = layout.r(list(ranks))
    alpha = options.alpha if options.alpha is not None else float(r)
    scale = scaling(alpha, r, options.rslora)
    written = torch_dtype(options.dtype or pair.base.dtype)
    # Given its right factor, the best left one is the same whatever weighs the rows.
    columns = None if layout.transposed else weighting
    products, error, gain, weighted = [], measure.left_out, 0.0, math.nan
    for at, one, rank in zip(regions_of(pair), found, ranks, strict=True):
        delta = delta_of(pair, sides, at)
        if one.svd is None or not rank:
            products.append(lora.no_factors(delta.shape, written))
            error += one.total
            continue
        svd = one.svd.cut(rank)
        left, right, fitted = lora.balanced_factors(svd, delta, scale, written, columns, one.total)
        if not math.isfinite(fitted.error):
            raise NonFiniteError(
                f"{pair.name}: its factors overflow {written}; choose a wider one with --dtype"
            )
        if sketch and one.total - fitted.captured < 64 * HALF_LOSS * one.total:
            return None
        error += max(fitted.error, 0.0)
        if weighting is not None:
            weighted = fitted.weighted
            if layout.transposed:
                weighted = _row_weighted(delta, left, right, scale, weighting)
        # The fit holds what the decomposition found, and a little more or, from rounding, less.
        exact = not sketch and weighting is None
        gain += max(svd.captured + svd.gain - fitted.captured, 0.0) if exact else svd.gain
        products.append((left.cpu(), right.cpu()))
    lora_A, lora_B = layout.factors(products, shape)
    result = measure.result(r, error, weighted, gain)
    return Fitted(result, (lora_A, lora_B, alpha), r)


def _row_weighted(
    delta: Delta, left: torch.Tensor, right: torch.Tensor, scale: float, weighting: Weighting
) -> float:
    """‖R^½ (Δ − scale · left @ right)‖²_F."""
    import torch

    from lora_tools.linalg.truncation import sum_of_squares

    rest = torch.empty(delta.shape, dtype=delta.dtype, device=left.device)
    for start, stop, run in delta.runs():
        rest[start:stop] = run.to(left.device)
    rest.addmm_(left.to(rest.dtype), right.to(rest.dtype), alpha=-scale)
    return sum_of_squares(weighting.apply(rest.T))


@dataclasses.dataclass(frozen=True)
class _Measure:
    """What errors are relative to: ``base`` is ‖W_base‖²_F, ``left_out`` the part of ‖Δ‖²_F in the
    blocks that the layer kind has no factors for."""

    pair: Pair
    found: Sequence[Found]
    left_out: float
    base: float

    @property
    def total(self) -> float:
        """‖Δ‖²_F."""
        return self.left_out + math.fsum(f.total for f in self.found)

    @property
    def searched(self) -> float:
        """‖Δ‖²_F of what was decomposed, weighted where it was."""
        return math.fsum(f.svd.total for f in self.found if f.svd is not None)

    def result(self, rank: int, error: float, weighted: float, gain: float) -> ModuleResult:
        """The figures for factors of that rank."""
        assert self.pair.layout is not None
        methods = {f.svd.method for f in self.found if f.svd is not None}
        whole = self.total if math.isnan(weighted) else self.searched
        return ModuleResult(
            module=self.pair.target,
            layout=self.pair.layout.name,
            shape=self.pair.spec.shape,
            rank=rank,
            relative_error=math.sqrt(max(error, 0.0) / self.total),
            energy=1 - error / self.total,
            gain_bound=gain / whole,
            delta_norm=math.sqrt(self.total),
            relative_change=math.sqrt(self.total / self.base) if self.base else math.inf,
            method="+".join(sorted(methods)),
            weighted_error=math.sqrt(max(weighted, 0.0) / self.searched),
            quantization_noise=math.fsum(f.quantization for f in self.found) / self.total,
        )


def _measure(pair: Pair, sides: Sides, found: Sequence[Found]) -> _Measure | None:
    """None where the values are the same. Raises as ``fit`` does."""
    assert pair.layout is not None
    rest = [delta_of(pair, sides, at).measure() for at in pair.layout.rest(pair.spec.shape)]
    left_out = math.fsum(energies.delta for energies in rest)
    if not math.isfinite(left_out):
        raise NonFiniteError(f"{pair.name}: a block that --layout leaves out holds an inf or a NaN")
    if all(f.svd is None for f in found):
        if left_out:
            raise MismatchError(
                f"{pair.name}: changed only in blocks that --layout leaves out; name the blocks "
                "that changed"
            )
        return None
    base = math.fsum(f.base for f in found) + math.fsum(energies.base for energies in rest)
    return _Measure(pair, found, left_out, base)
