"""One module of ``convert``: its factors as another format has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError, UnsupportedAdapter
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.linalg.layouts import Layout, of_form
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.scaling import scaling
from lora_tools.records import ModuleResult

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.adapters.writer import Factors
    from lora_tools.linalg.factors import Resized


@dataclasses.dataclass(frozen=True)
class Conversion:
    """How to convert. ``alpha`` and ``pad_to``: of formats with one alpha, and one rank: chosen
    before any factor is read. ``blocks``: of modules that are loralib's MergedLinears. ``weight``:
    what the effect is multiplied by."""

    to: Format
    dropped: frozenset[str]
    rule: RankRule | None
    dtype: str | None
    alpha: float | None
    pad_to: int | None
    blocks: Mapping[str, tuple[bool, ...]]
    weight: float = 1.0


def strength_of(module: LoraModule, given: Adapter) -> float:
    """The factor on B·A."""
    return scaling(module.alpha, module.r, given.use_rslora)


def _alpha(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """lora_alpha as the format will have it; 0, for no effect, in PEFT only: other readers take it
    for the rank, or for a scaling of 1."""
    if options.to.alpha == "folded":
        return float(r)
    if options.alpha is not None:
        return options.alpha
    kept = r == module.r and (module.alpha or (options.to.name == "peft" and options.rule is None))
    if not kept:
        return float(r)
    if given.use_rslora and options.to.name != "peft":
        return strength_of(module, given) * r
    return module.alpha


def fold_of(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """What lora_B is multiplied by, its rank becoming ``r``."""
    strength, scale = strength_of(module, given), _scale(module, r, given, options)
    if not scale:  # as the strength is: PEFT's alpha of 0 stays
        return options.weight
    return options.weight * strength / scale


def _scale(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """The scaling that readers of the format will apply."""
    rank = options.pad_to or r
    return scaling(_alpha(module, r, given, options), rank, writes_rslora(given, options))


def writes_rslora(given: Adapter, options: Conversion) -> bool:
    """Whether the scaling that is written is rsLoRA's, which PEFT alone has a place for."""
    return given.use_rslora and options.to.name == "peft"


def convert_module(
    module: LoraModule, given: Adapter, options: Conversion
) -> tuple[Factors, ModuleResult | None]:
    """One module's factors as the format has them."""
    from lora_tools.formats.adapters.writer import Factors
    from lora_tools.linalg import factors as algebra

    A, B = given.tensor(module.A), given.tensor(module.B)
    has_bias = "bias" not in options.dropped
    bias = given.tensor(module.bias) if module.bias and has_bias else None
    magnitude = (
        given.tensor(module.magnitude)
        if module.magnitude and "dora" not in options.dropped
        else None
    )
    written = torch_dtype(options.dtype) if options.dtype else None
    result, rank = None, module.r
    if options.rule is not None:
        strength = strength_of(module, given) * options.weight
        cut, result = cut_module(
            module,
            (A, B),
            strength,
            options.rule,
            written or B.dtype,
            lambda r: _scale(module, r, given, options),
        )
        A, B, rank = cut.lora_A, cut.lora_B, cut.r
        bias = algebra.scaled(bias, strength / _scale(module, rank, given, options), written)
    else:
        fold = fold_of(module, rank, given, options)
        A, B = algebra.scaled(A, 1.0, written), algebra.scaled(B, fold, written)
        bias = algebra.scaled(bias, fold, written)
    difference = given.differences.get(f"{module.module}.bias", "")
    if difference and has_bias:
        factor = options.weight / _nonzero(module, _scale(module, rank, given, options))
        bias = algebra.scaled(given.tensor(difference), factor, written)
    if options.pad_to is not None:
        A, B = algebra.padded(A, B, options.pad_to)
    check_finite(module, A, B, bias, magnitude)
    factors = Factors(
        module.module,
        A,
        B,
        _alpha(module, rank, given, options),
        _scale(module, rank, given, options),
        options.pad_to or rank,
        form=module.form,
        parameter=module.parameter,
        bias=bias,
        magnitude=magnitude,
        on_inputs=module.on_inputs,
    )
    return _reformed(factors, options), result


def _nonzero(module: LoraModule, scale: float) -> float:
    """The scaling, by which a difference of a bias is divided. Raises UnsupportedAdapter."""
    if not scale:
        raise UnsupportedAdapter(
            f"{module.module}: lora_alpha is 0, so the change of its bias would have no effect in "
            "this format; leave it out with --drop bias, or merge the adapter into the base to "
            "keep it"
        )
    return scale


def _reformed(factors: Factors, options: Conversion) -> Factors:
    """In loralib's own form, where it has one for such a module."""
    from lora_tools.linalg import loralib

    blocks = options.blocks.get(factors.module, ())
    if not options.to.own_forms or not (blocks or factors.form == "conv"):
        return factors
    try:
        if blocks:
            new = loralib.merged(factors.lora_A, factors.lora_B, blocks)
        else:
            new = loralib.reshaped(factors.lora_A, factors.lora_B)
    except UnsupportedAdapter as error:
        raise UnsupportedAdapter(f"{factors.module}: {error}") from None
    alpha = factors.alpha * new.r / factors.r  # the scaling stays
    return dataclasses.replace(
        factors,
        lora_A=new.lora_A,
        lora_B=new.lora_B,
        r=new.r,
        alpha=alpha,
        blocks=blocks,
        spread=new.rank,
    )


def module_layout(module: LoraModule, A: torch.Tensor, B: torch.Tensor) -> Layout:
    """The kind of layer, as far as the factors tell it."""
    layout = of_form(module.form, **module.parameters)[0]
    return layout.of_factors(tuple(A.shape), tuple(B.shape))


def rank_ceiling(module: LoraModule, given: Adapter, rule: RankRule | None) -> int:
    """The largest rank that its factors can come to have."""
    if rule is None:
        return module.r
    rows, cols = given.shape(module.B)[0], math.prod(given.shape(module.A)[1:])
    return min(rule.ceiling(rows, cols), module.r)


def factor_bytes(module: LoraModule, given: Adapter) -> int:
    """Memory for its factors in float64, once."""
    return 8 * (math.prod(given.shape(module.A)) + math.prod(given.shape(module.B)))


def cut_module(
    module: LoraModule,
    factors: tuple[torch.Tensor, torch.Tensor],
    strength: float,
    rule: RankRule,
    dtype: torch.dtype,
    scaling: Callable[[int], float],
) -> tuple[Resized, ModuleResult]:
    """The best lora_A and lora_B, in ``dtype``, of the rank that the rule chooses, for the change
    strength · B·A at the ``scaling`` that a rank will have; and their figures.

    Raises:
        NonFiniteError: the factors given hold an inf or a NaN, or those made overflow.
    """
    from lora_tools.linalg.factors import cut_factors

    A, B = factors
    layout = module_layout(module, A, B)
    shapes = tuple(A.shape), tuple(B.shape)
    cut = cut_factors(layout, layout.split(A, B), shapes, strength, rule, dtype, scaling)
    check_finite(module, cut.lora_A, cut.lora_B)
    return cut, resized(module, layout, cut)


def resized(module: LoraModule, layout: Layout, new: Resized) -> ModuleResult:
    """The figures of one module whose rank was chosen anew."""
    lost = new.error / new.total if new.total else 0.0
    experts = (module.experts,) if module.experts else ()
    return ModuleResult(
        module=module.name,
        layout=layout.name,
        shape=(*experts, new.lora_B.shape[0], *new.lora_A.shape[1:]),
        rank=new.r,
        relative_error=math.sqrt(max(lost, 0.0)),
        energy=1 - lost,
        gain_bound=0.0,
        delta_norm=math.sqrt(new.total),
        relative_change=math.nan,
        method="resize",
    )


def product_energy(module: LoraModule, given: Adapter) -> float:
    """‖s·B·A‖²_F, without forming it. Raises NonFiniteError."""
    from lora_tools.linalg import lora

    A, B = given.tensor(module.A), given.tensor(module.B)
    check_finite(module, A, B)
    scale = strength_of(module, given)
    return math.fsum(
        float((lora.resize(*product)[1] * scale).square().sum())
        for product in module_layout(module, A, B).split(A, B)
    )


def check_finite(module: LoraModule, *tensors: torch.Tensor | None) -> None:
    """Raises NonFiniteError for an inf or a NaN."""
    if not all(x.isfinite().all() for x in tensors if x is not None):
        raise NonFiniteError(
            f"{module.module}: the factors hold an inf or a NaN; if the input does not, choose a "
            "wider --dtype"
        )
