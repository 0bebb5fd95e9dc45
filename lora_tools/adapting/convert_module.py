"""One module of ``convert``: its factors as another format has them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError, UnsupportedAdapter
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.table import Format
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.linalg.layouts import Layout, of_form
from lora_tools.linalg.ranks import RankRule
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


def _alpha(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """lora_alpha as the format will have it."""
    if options.to.alpha == "folded":
        return float(r)
    if options.alpha is not None:
        return options.alpha
    if r != module.r:
        return float(r)
    if given.use_rslora and options.to.name != "peft":
        from lora_tools.linalg.lora import scaling

        return scaling(module.alpha, module.r, True) * r
    return module.alpha


def fold_of(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """What lora_B is multiplied by, its rank becoming ``r``."""
    from lora_tools.linalg.lora import scaling

    strength = options.weight * scaling(module.alpha, module.r, given.use_rslora)
    return strength / _scale(module, r, given, options)


def _scale(module: LoraModule, r: int, given: Adapter, options: Conversion) -> float:
    """The scaling that readers of the format will apply."""
    from lora_tools.linalg.lora import scaling

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
    from lora_tools.linalg.lora import scaling

    A, B = given.tensor(module.A), given.tensor(module.B)
    bias = given.tensor(module.bias) if module.bias and "bias" not in options.dropped else None
    magnitude = (
        given.tensor(module.magnitude)
        if module.magnitude and "dora" not in options.dropped
        else None
    )
    written = torch_dtype(options.dtype) if options.dtype else None
    result = None
    if options.rule is not None:
        strength = scaling(module.alpha, module.r, given.use_rslora)
        layout = module_layout(module, A, B)
        cut = algebra.cut_factors(
            layout,
            layout.split(A, B),
            (tuple(A.shape), tuple(B.shape)),
            strength,
            options.rule,
            written or B.dtype,
        )
        _check_finite(module, cut.lora_A, cut.lora_B)
        A, B, rank = cut.lora_A, cut.lora_B, cut.r
        fold = 1 / _scale(module, rank, given, options)
        bias = None if bias is None else algebra.scaled(bias, strength * fold)
        result = resized(module, layout, cut)
    else:
        rank, fold = module.r, fold_of(module, module.r, given, options)
        bias = None if bias is None else algebra.scaled(bias, fold)
        if written is not None:
            A, bias = A.to(written), None if bias is None else bias.to(written)
            B = B.to(written) if fold == 1 else (B.double() * fold).to(written)
            fold = 1.0
    B = algebra.scaled(B, fold)
    if options.pad_to is not None:
        A, B = algebra.padded(A, B, options.pad_to)
    _check_finite(module, A, B, *(x for x in (bias, magnitude) if x is not None))
    alpha = _alpha(module, rank, given, options)
    scale = scaling(alpha, options.pad_to or rank, writes_rslora(given, options))
    factors = Factors(
        module.module,
        A,
        B,
        alpha,
        scale,
        options.pad_to or rank,
        form=module.form,
        parameter=module.parameter,
        bias=bias,
        magnitude=magnitude,
    )
    return _reformed(factors, options), result


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
    _check_finite(module, A, B)
    scale = lora.scaling(module.alpha, module.r, given.use_rslora)
    return math.fsum(
        float((lora.resize(*product)[1] * scale).square().sum())
        for product in module_layout(module, A, B).split(A, B)
    )


def _check_finite(module: LoraModule, *tensors: torch.Tensor) -> None:
    if not all(x.isfinite().all() for x in tensors):
        raise NonFiniteError(
            f"{module.module}: the factors hold an inf or a NaN; were they so before? Otherwise "
            "choose a wider --dtype"
        )
