"""One module of ``combine``: the changes that several adapters make to it, put into one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

from lora_tools.adapting.convert_module import resized, strength_of
from lora_tools.errors import NonFiniteError
from lora_tools.formats.adapters.peft import LoraModule
from lora_tools.formats.dtypes import dtype_name, torch_dtype, widest
from lora_tools.linalg.combine import LOW_RANK
from lora_tools.linalg.layouts import Layout, of_form
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import ModuleResult
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.combine import Sign


@dataclasses.dataclass(frozen=True)
class Combination:
    """How to combine, as the command line has it."""

    method: str
    rule: RankRule | None  # None: every direction
    density: float
    seed: int
    sign: Sign
    normalize: float | None  # the sum of all weights, to divide by
    dtype: str | None


@dataclasses.dataclass(frozen=True)
class Term:
    """What one adapter does to the module."""

    index: int
    weighted: Weighted
    module: LoraModule

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        adapter = self.weighted.adapter
        return adapter.shape(self.module.A), adapter.shape(self.module.B)

    @property
    def layout(self) -> Layout:
        layout = of_form(self.module.form, **self.module.parameters)[0]
        return layout.of_factors(*self.shapes)


@dataclasses.dataclass(frozen=True)
class Combined:
    """One module of the output; ``result`` where its rank was chosen."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    r: int
    bias: torch.Tensor | None
    result: ModuleResult | None


def combine_module(terms: Sequence[Term], options: Combination) -> Combined:
    """Σ or whatever the method makes of the terms. Raises NonFiniteError."""
    import torch

    factors = [
        (t.weighted.adapter.tensor(t.module.A), t.weighted.adapter.tensor(t.module.B))
        for t in terms
    ]
    for term, pair in zip(terms, factors, strict=True):
        if not all(x.isfinite().all() for x in pair):
            raise NonFiniteError(
                f"{term.module.name}: the factors in {term.weighted.path} hold an inf or a NaN"
            )
    strengths = [strength_of(t.module, t.weighted.adapter) for t in terms]
    weights = [t.weighted.weight for t in terms]
    names = [dtype_name(x.dtype) for pair in factors for x in pair]
    dtype = torch_dtype(options.dtype or widest(*names))
    if options.method in LOW_RANK:
        share = 1.0 if options.normalize is None else 1 / options.normalize
        factor = [w * s * share for w, s in zip(weights, strengths, strict=True)]
        combined = _sum(terms, factors, factor, dtype, options)
        biases = _add_biases(terms, factor)
    else:
        combined = _pruned(terms, factors, strengths, weights, dtype, options)
        biases = _prune_biases(terms, strengths, weights, options)
    bias = None if biases is None else biases.to(dtype)
    new = [x for x in (combined.lora_A, combined.lora_B, bias) if x is not None]
    if not all(torch.isfinite(x).all() for x in new):
        raise NonFiniteError(
            f"{terms[0].module.name}: the combined factors overflow {dtype}; choose a wider --dtype"
        )
    return dataclasses.replace(combined, bias=bias)


Factors = Sequence[tuple["torch.Tensor", "torch.Tensor"]]


def _sum(
    terms: Sequence[Term],
    factors: Factors,
    strengths: Sequence[float],
    dtype: torch.dtype,
    options: Combination,
) -> Combined:
    """Σ strength · B·A: the factors side by side, then cut if so asked."""
    import torch

    from lora_tools.linalg.factors import cut_factors

    layout, shapes = terms[0].layout, terms[0].shapes
    split = [layout.split(A, B) for A, B in factors]
    wide = torch.float64 if options.rule is not None or options.method == "linear" else dtype
    stacked = []
    for parts in zip(*split, strict=True):  # of one group, one expert, …
        left = torch.cat(
            [(B.double() * s).to(wide) for (B, _), s in zip(parts, strengths, strict=True)], 1
        )
        stacked.append((left, torch.cat([A.to(wide) for _, A in parts])))
    if wide is dtype and options.rule is None and options.method == "cat":
        lora_A, lora_B = layout.join(stacked, *shapes)
        r = layout.r([left.shape[1] for left, _ in stacked])
        return Combined(lora_A, lora_B, r, None, None)
    ceiling = max(left.shape[1] for left, _ in stacked)
    rule = options.rule or RankRule("rank", ceiling)
    new = cut_factors(layout, stacked, shapes, 1.0, rule, dtype)
    return Combined(new.lora_A, new.lora_B, new.r, None, _result(terms, layout, new))


def _result(terms: Sequence[Term], layout: Layout, new: Any, **more: Any) -> ModuleResult:
    return dataclasses.replace(resized(terms[0].module, layout, new), **more)


def _seeds(terms: Sequence[Term], part: str, seed: int) -> list[int]:
    """One for each adapter: of the run's seed, the module's name and the adapter's place."""
    name = terms[0].module.name
    return [xxhash.xxh64_intdigest(f"{seed} {t.index} {part} {name}".encode()) >> 1 for t in terms]


def _pruned(
    terms: Sequence[Term],
    factors: Factors,
    strengths: Sequence[float],
    weights: Sequence[float],
    dtype: torch.dtype,
    options: Combination,
) -> Combined:
    """By elements: form each product, combine, and decompose what came out."""
    import torch

    from lora_tools.linalg.combine import METHODS, combine_dense
    from lora_tools.linalg.factors import Resized
    from lora_tools.linalg.layout import pad_rank
    from lora_tools.linalg.lora import Whole, balanced_factors
    from lora_tools.linalg.svd import truncated
    from lora_tools.linalg.truncation import sum_of_squares

    assert options.rule is not None
    layout, shapes = terms[0].layout, terms[0].shapes
    split = [layout.split(A, B) for A, B in factors]
    work = torch.float64 if dtype == torch.float64 else torch.float32
    parts, total, error, gain = [], 0.0, 0.0, 0.0
    method = "none"
    for place in range(len(split[0])):

        def delta(i: int, place: int = place) -> torch.Tensor:
            B, A = split[i][place]
            return (B.to(work) @ A.to(work)).mul_(strengths[i])

        combined = combine_dense(
            METHODS[options.method],
            delta,
            weights,
            options.density,
            _seeds(terms, str(place), options.seed),
            options.sign,
            options.normalize,
        )
        energy = sum_of_squares(combined)
        if not math.isfinite(energy):
            raise NonFiniteError(f"{terms[0].module.name}: the combined change overflows {work}")
        svd = truncated(combined, options.rule, total=energy)
        if svd.rank:
            left, right, fit = balanced_factors(svd, Whole(combined), 1.0, dtype)
            error += max(fit.error, 0.0)
            gain += max(svd.captured + svd.gain - fit.captured, 0.0)
            method = svd.method
        else:
            left = torch.zeros(combined.shape[0], 1, dtype=dtype)
            right = torch.zeros(1, combined.shape[1], dtype=dtype)
        parts.append((left, right))
        total += energy
    ranks = [left.shape[1] for left, _ in parts]
    padded = [pad_rank(left, right, max(ranks)) for left, right in parts]
    lora_A, lora_B = layout.join(padded, *shapes)
    new = Resized(lora_A, lora_B, layout.r(ranks), total, error)
    result = _result(terms, layout, new, gain_bound=gain / total if total else 0.0, method=method)
    return Combined(lora_A, lora_B, new.r, None, result)


def _add_biases(terms: Sequence[Term], strengths: Sequence[float]) -> torch.Tensor | None:
    """Σ strength · bias, in float64."""
    total = None
    for term, strength in zip(terms, strengths, strict=True):
        if term.module.bias:
            mine = term.weighted.adapter.tensor(term.module.bias).double() * strength
            total = mine if total is None else total + mine
    return total


def _prune_biases(
    terms: Sequence[Term],
    strengths: Sequence[float],
    weights: Sequence[float],
    options: Combination,
) -> torch.Tensor | None:
    """Biases by the same method as the weights, in float64."""
    from lora_tools.linalg.combine import METHODS, combine_dense

    having = [(t, s, w) for t, s, w in zip(terms, strengths, weights, strict=True) if t.module.bias]
    if not having:
        return None

    def delta(i: int) -> torch.Tensor:
        term, strength, _ = having[i]
        assert term.module.bias is not None
        return term.weighted.adapter.tensor(term.module.bias).double() * strength

    return combine_dense(
        METHODS[options.method],
        delta,
        [w for _, _, w in having],
        options.density,
        _seeds([t for t, _, _ in having], "bias", options.seed),
        options.sign,
        options.normalize,
    )
