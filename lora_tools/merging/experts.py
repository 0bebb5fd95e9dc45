"""Adapters that hold experts in another form than the base: one by one, in one tensor for all, gate
and up apart or together, by other names. Names say what each tensor holds, shapes which way it is
turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from lora_tools.errors import MismatchError, UnsupportedAdapter
from lora_tools.formats.adapters.peft import LoraModule
from lora_tools.formats.expert_names import (
    TRANSPOSED,
    ExpertName,
    Experts,
    expert_name,
    experts_by_layer,
    holds_transposed,
    interleaves,
    one_by_one,
    transposed_by_shapes,
)
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.merging.expert_share import Share
from lora_tools.merging.targets import BaseOutline, Part, key_of
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import loaded
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    from lora_tools.formats.checkpoint import Checkpoint

_Wanted = tuple[str, Part]


def as_base_holds(wanted: list[_Wanted], base: Checkpoint | BaseOutline) -> list[_Wanted]:
    """Parts of an adapter with the tensor names that it asks for, those of experts by the names
    that the base has for what they act on, whatever stands before them.

    One that several tensors hold becomes a part for each.

    Raises:
        UnsupportedAdapter: what cannot be brought into the base's form.
    """
    asked = {name: expert_name(name) for name, _ in wanted if name not in base.specs}
    layers = {own.layer for own in asked.values() if own is not None and own.layer}
    if not layers:
        return wanted
    found, specs = experts_of(base, layers)
    result: list[_Wanted] = []
    for name, part in wanted:
        own = asked.get(name)
        experts = found.get(own.layer) if own is not None else None
        if own is None or experts is None or not experts.names.keys() >= set(own.projections):
            result.append((name, part))
        else:
            result += _in_form(own, part, experts, base, specs)
    return result


def experts_of(
    base: Checkpoint | BaseOutline, layers: Collection[str]
) -> tuple[dict[str, Experts], Mapping[str, TensorSpec]]:
    """How the base holds the experts of these layers, and the tensors that tell: its own, or those
    that transformers makes of them where its own have other names."""
    found = experts_by_layer(base.specs)
    if set(layers) & found.keys() or getattr(base, "renamed", None) is not None:
        return found, base.specs
    how = loaded(base.config, base.specs)
    specs = {} if how is None else {name: t.spec for name, t in how.tensors.items()}
    return experts_by_layer(specs), specs


def _in_form(
    own: ExpertName,
    part: Part,
    experts: Experts,
    base: Checkpoint | BaseOutline,
    specs: Mapping[str, TensorSpec],
) -> list[_Wanted]:
    """One part as those of the tensors that hold what it acts on."""
    forms = list(dict.fromkeys(experts.names[p] for p in own.projections))
    fused = forms[0].number is None
    same = len(forms) == 1 and forms[0].projections == own.projections
    if same and fused == (own.number is None):  # by another name
        return [(own.held_as(forms[0].of(own.number)).tensor, part)]
    _refuse_kind(part, own)
    alternates = alternate(own.tensor, experts, base, specs)
    if alternates is None and any(form.projections != own.projections for form in forms):
        raise _order_unknown(part.weighted, own, forms[0])
    numbers = [own.number] if own.number is not None else list(range(experts.count))
    found = []
    for form in forms:
        for number in [None] if fused else numbers:
            stored = own.held_as(form.of(number))
            share = Share(own, stored, experts.count, bool(alternates))
            found.append((stored.tensor, dataclasses.replace(part, expert=share)))
    return found


def alternate(
    tensor: str, experts: Experts, base: Checkpoint | BaseOutline, specs: Mapping[str, TensorSpec]
) -> bool | None:
    """Whether gate and up alternate where one tensor holds both, be it this one of an adapter or
    one of ``specs``; None where that is not known."""
    names = [expert_name(tensor), *experts.names.values()]
    if any(name is not None and name.leaf == "gate_up_projs" for name in names):
        return True
    held = next(iter(experts.names.values())).holder
    return interleaves(base.config, f"{held}.gate_up_proj_bias" in specs)


def _order_unknown(weighted: Weighted, own: ExpertName, form: ExpertName) -> UnsupportedAdapter:
    return UnsupportedAdapter(
        f"{weighted.path}: {own.tensor}: it is not known whether gate and up of {form.holder} are "
        "stacked or alternate in this architecture; merge into a base in the form that the "
        "adapter has"
    )


def one_by_one_shares(weighted: Weighted, module: LoraModule, base: Checkpoint) -> list[Share]:
    """Factors of all experts in one, as shares of a layer for each projection of each expert. The
    layers' names are the base's, or those of such checkpoints of its architecture.

    Raises:
        MismatchError: the factors are for other experts.
        UnsupportedAdapter: the base has none there, or in an order that is not known.
    """
    own = expert_name(module.weight)
    found, specs = experts_of(base, [own.layer] if own is not None else [])
    experts = found.get(own.layer) if own is not None else None
    if own is None or experts is None or not experts.names.keys() >= set(own.projections):
        raise UnsupportedAdapter(
            f"{weighted.path}: {module.weight} does not belong to known experts of {base.path}; "
            "merge the adapter into the base instead"
        )
    alternates = alternate(own.tensor, experts, base, specs)
    if alternates is None and len(own.projections) > 1:
        raise _order_unknown(weighted, own, experts.names[own.projections[0]])
    shares = []
    for projection in own.projections:
        stored, sides = single_layer(experts, projection, base, specs)
        share = Share(own, stored, experts.count, bool(alternates))
        spec = TensorSpec(stored.tensor, "F32", sides)
        fitted = fit_share(Part(weighted, module, "lora", expert=share), spec.name, spec, base)
        assert fitted.expert is not None
        shares += [
            dataclasses.replace(fitted.expert, stored=stored.of(n)) for n in range(experts.count)
        ]
    return shares


def single_layer(
    experts: Experts, projection: str, base: Checkpoint, specs: Mapping[str, TensorSpec]
) -> tuple[ExpertName, tuple[int, int]]:
    """The name that the first expert's layer of a projection has, or would have, and (out, in)."""
    held = experts.names[projection]
    spec = specs[held.tensor]
    turned = _stored_transposed(held.tensor, specs)
    if turned is None:
        turned = holds_transposed(base.config)
    rows, cols = spec.shape[-2:]
    out, inside = (cols, rows) if turned else (rows, cols)
    sides = out // len(held.projections), inside
    if held.number is not None and len(held.projections) == 1:
        return held, sides
    return one_by_one(held, projection, base.config), sides


def _refuse_kind(part: Part, own: ExpertName) -> None:
    """Raises UnsupportedAdapter for what is not brought from one form into another."""
    source = part.source
    what = part.kind if part.kind not in ("lora", "saved") else ""
    if isinstance(source, LoraModule) and source.bias:
        what = "lora_bias"
    if what:
        raise UnsupportedAdapter(
            f"{part.weighted.path}: has {what} for {own.tensor}, which the base stores in one "
            "tensor with others or in parts, and this cannot be merged; give the base in the form "
            "that the adapter was trained on"
        )


def fit_share(part: Part, name: str, spec: TensorSpec, base: Checkpoint | BaseOutline) -> Part:
    """Check shapes, and find which way both are turned.

    Raises:
        MismatchError: shapes or numbers of experts do not fit.
    """
    share, adapter = part.expert, part.weighted.adapter
    assert share is not None
    if isinstance(part.source, LoraModule):
        count = part.source.experts
        rows, cols = adapter.shape(part.source.B)[0], adapter.shape(part.source.A)[1]
    else:
        shape = adapter.shape(key_of(part))
        count, rows, cols = (1, *shape)[-3:]
    given = count if share.own.number is None else share.own.number + 1
    if given > share.count or (share.own.number is None and given < share.count):
        raise MismatchError(
            f"{share.own.tensor}: {base.path} has {share.count} experts, {part.weighted.path} has "
            f"{given}"
        )
    told = _stored_transposed(name, base.specs)
    ways = [
        way
        for way in (
            dataclasses.replace(share, swapped=swapped, transposed=transposed)
            for swapped in ((False, True) if share.own.number is None else (False,))
            for transposed in ((False, True) if told is None else (told,))
        )
        if _fits(way, (rows, cols), spec)
    ]
    if not ways:
        raise MismatchError(
            f"{name}: base is {spec.shape}, the factors of {share.own.tensor} are for (out, in) = "
            f"{(rows, cols)}; is this the base the adapter was trained on?"
        )
    if len(ways) > 1:
        held = holds_transposed(base.config)
        if told is None:
            ways = [way for way in ways if way.transposed == held] or ways
        swapped = held != _taken_transposed(part, base.config)
        ways = [way for way in ways if way.swapped == swapped] or ways
    apart = share.own.projections != share.stored.projections
    if part.kind == "saved" and share.interleaved and apart:
        raise UnsupportedAdapter(
            f"{part.weighted.path}: {share.own.tensor} is saved whole, and its rows alternate with "
            f"others in {name}, so it cannot be merged"
        )
    layout = LAYOUTS["linear" if share.stored.number is not None else "experts"]
    return dataclasses.replace(part, expert=ways[0], layout=layout, shape=spec.shape)


def _fits(share: Share, own: tuple[int, int], spec: TensorSpec) -> bool:
    _, *sides = (1, *spec.shape)[-3:]
    out, inside = own[::-1] if share.swapped else own
    stored_out, stored_in = sides[::-1] if share.transposed else sides
    return inside == stored_in and out * len(share.stored.projections) == stored_out * len(
        share.own.projections
    )


def _stored_transposed(name: str, specs: Mapping[str, TensorSpec]) -> bool | None:
    """Whether a tensor holds an expert's matrix as (in, out): one for all experts by the other one
    of the same experts; None where there is none."""
    found = expert_name(name)
    if found is None:
        return None
    if found.number is not None:
        return False
    pair = [specs.get(f"{found.holder}.{leaf}") for leaf in ("gate_up_proj", "down_proj")]
    if pair[0] is None or pair[1] is None:
        return None
    return transposed_by_shapes(pair[0].shape, pair[1].shape)


def _taken_transposed(part: Part, config: Mapping[str, Any]) -> bool:
    """Whether the adapter's matrices were taken for (in, out) of what is held in memory."""
    if part.kind == "saved":
        return False
    return part.weighted.adapter.transposes_experts or config.get("model_type") in TRANSPOSED
