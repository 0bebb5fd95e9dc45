"""Adapters that hold experts in another form than the base: one by one, in one tensor for all, gate
and up apart or together, by other names. Names say what each tensor holds, shapes which way it is
turned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
    transposed_by_shapes,
)
from lora_tools.linalg.layouts import LAYOUTS
from lora_tools.merging.expert_share import Share
from lora_tools.merging.targets import BaseOutline, Part, key_of
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import loaded

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
    specs = base.specs
    found = experts_by_layer(specs)
    if not layers & found.keys() and getattr(base, "renamed", None) is None:
        how = loaded(base.config, base.specs)
        specs = {} if how is None else {name: t.spec for name, t in how.tensors.items()}
        found = experts_by_layer(specs)
    result: list[_Wanted] = []
    for name, part in wanted:
        own = asked.get(name)
        experts = found.get(own.layer) if own is not None else None
        if own is None or experts is None or not experts.names.keys() >= set(own.projections):
            result.append((name, part))
        else:
            result += _in_form(own, part, experts, base.config, specs)
    return result


def _in_form(
    own: ExpertName,
    part: Part,
    experts: Experts,
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
) -> list[_Wanted]:
    """One part as those of the tensors that hold what it acts on."""
    forms = list(dict.fromkeys(experts.names[p] for p in own.projections))
    fused = forms[0].number is None
    same = len(forms) == 1 and forms[0].projections == own.projections
    if same and fused == (own.number is None):  # by another name
        return [(own.held_as(forms[0].of(own.number)).tensor, part)]
    _refuse_kind(part, own)
    together = {"gate_up_proj", "gate_up_projs"} & {own.leaf, *(form.leaf for form in forms)}
    biased = f"{forms[0].holder}.gate_up_proj_bias" in specs
    alternate = "gate_up_projs" in together or interleaves(config, biased)
    if alternate is None and any(form.projections != own.projections for form in forms):
        raise UnsupportedAdapter(
            f"{part.weighted.path}: {own.tensor}: whether gate and up of {forms[0].holder} are one "
            "above the other or alternate is not known of this architecture; merge in the form "
            "that the adapter has"
        )
    numbers = [own.number] if own.number is not None else list(range(experts.count))
    found = []
    for form in forms:
        for number in [None] if fused else numbers:
            stored = own.held_as(form.of(number))
            share = Share(own, stored, experts.count, bool(alternate))
            found.append((stored.tensor, dataclasses.replace(part, expert=share)))
    return found


def _refuse_kind(part: Part, own: ExpertName) -> None:
    """Raises UnsupportedAdapter for what is not brought from one form into another."""
    source = part.source
    what = part.kind if part.kind not in ("lora", "saved") else ""
    if isinstance(source, LoraModule) and source.bias:
        what = "lora_bias"
    if what:
        raise UnsupportedAdapter(
            f"{part.weighted.path}: has {what} for {own.tensor}, which the base stores in another "
            "form, in one tensor with others or in parts; that is not merged. Merge into the base "
            "as it was when the adapter was trained on it"
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
    if (share.own.number is None and count != share.count) or (
        share.own.number or 0
    ) >= share.count:
        raise MismatchError(
            f"{share.own.tensor}: {base.path} has {share.count} experts there, "
            f"{part.weighted.path} has {count if share.own.number is None else 'more'}"
        )
    ways = [
        way
        for way in (
            dataclasses.replace(share, swapped=swapped, transposed=transposed)
            for swapped in (False, True)[: 2 if share.own.number is None else 1]
            for transposed in (False, True)[: 2 if share.stored.number is None else 1]
        )
        if _fits(way, (rows, cols), spec)
    ]
    if not ways:
        raise MismatchError(
            f"{name}: base is {spec.shape}, the factors of {share.own.tensor} are for (out, in) = "
            f"{(rows, cols)}; is this the base the adapter was trained on?"
        )
    if len(ways) > 1:
        turned = _stored_transposed(name, spec, base)
        ways = [way for way in ways if way.transposed == turned] or ways
        swapped = holds_transposed(base.config) != _taken_transposed(part, base.config)
        ways = [way for way in ways if way.swapped == swapped] or ways
    if (
        part.kind == "saved"
        and share.interleaved
        and share.own.projections != share.stored.projections
    ):
        raise UnsupportedAdapter(
            f"{part.weighted.path}: {share.own.tensor} is saved whole, and its rows alternate with "
            f"others in {name}; that is not merged"
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


def _stored_transposed(name: str, spec: TensorSpec, base: Checkpoint | BaseOutline) -> bool:
    """Whether a base stores an expert's square matrix as (in, out): by the other tensor of these
    experts, else by the architecture."""
    found = expert_name(name)
    if found is None or found.number is not None:
        return False
    pair = [base.specs.get(f"{found.holder}.{leaf}") for leaf in ("gate_up_proj", "down_proj")]
    if pair[0] is not None and pair[1] is not None:
        return transposed_by_shapes(pair[0].shape, pair[1].shape)
    return holds_transposed(base.config)


def _taken_transposed(part: Part, config: Mapping[str, Any]) -> bool:
    """Whether the adapter's matrices were taken for (in, out) of what is held in memory."""
    if part.kind == "saved":
        return False
    return part.weighted.adapter.transposes_experts or config.get("model_type") in TRANSPOSED
