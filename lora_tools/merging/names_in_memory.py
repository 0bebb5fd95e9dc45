"""Adapters that go by other names than the base: those in memory, and the base is a file; or the
other way about; or those of the other layout of a diffusion model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.counterparts.table import Counterpart, counterparts, parts
from lora_tools.formats.counterparts.unordered import may_be, refuse_unordered
from lora_tools.formats.names import split_tensor
from lora_tools.records import TensorSpec, rows_of
from lora_tools.sources.transformers_names import LoadedTensor, loaded

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.checkpoint import Checkpoint
    from lora_tools.linalg.merge import Added, Replaced
    from lora_tools.merging.targets import BaseOutline, Part, Target
    from lora_tools.sources.weighted import Weighted


def by_own_names(
    wanted: list[tuple[str, Part]], base: Checkpoint | BaseOutline, known: Collection[str]
) -> list[tuple[str, Part]]:
    """Parts of an adapter with the tensor names that it asks for, by those that the base has.

    Where all are ``known``, and where nobody has other names for them, they stay. One that
    is made of several stored tensors becomes a part for each.
    """
    _refuse_unordered(wanted, base)
    aliases = getattr(base, "aliases", {})
    wanted = [(aliases.get(name, name), part) for name, part in wanted]
    strange = {name for name, _ in wanted} - set(known)
    if not strange:
        return wanted
    renamed = getattr(base, "renamed", None)
    if renamed is not None:  # a live model
        own = renamed(strange)
        return [(own.get(name, name), part) for name, part in wanted]
    made = _other_names(base, strange)
    if not made:
        return wanted
    result = []
    for name, part in wanted:
        placed = part.expert is not None and name in known
        if placed or name not in made:
            result.append((name, part))
            continue
        tensor, row = made[name], 0
        if part.expert is not None and len(tensor.pieces) > 1:
            raise UnsupportedAdapter(
                f"{part.weighted.path}: {part.expert.own.tensor} changes a part of {name}, which "
                f"{base.path} stores in {len(tensor.pieces)} pieces, and this cannot be merged"
            )
        for piece in tensor.pieces:
            if len(tensor.pieces) > 1 or piece.rows < rows_of(base.specs[piece.stored]):
                part = dataclasses.replace(part, shape=tensor.spec.shape, start=row - piece.first)
            result.append((piece.stored, part))
            row += piece.rows
    return result


def _refuse_unordered(wanted: list[tuple[str, Part]], base: Checkpoint | BaseOutline) -> None:
    acting: dict[str, Weighted] = {}
    for name, part in wanted:
        if may_be(module := split_tensor(name)[0]):
            acting[module] = part.weighted
    if acting:
        found = tuple(parts(base.specs, getattr(base, "models", ())))
        for module, weighted in acting.items():
            by_peft = weighted.adapter.original.format == "peft"
            refuse_unordered(weighted.adapter.path, by_peft, [module], base.path, found)


def refuse_overlaps(name: str, parts: Sequence[Part], spec: TensorSpec) -> None:
    """Raises UnsupportedAdapter where one adapter has a change of a fused weight and of what is in
    it, besides: some trainers write both, and mean one.

    Args:
        name, spec: of the tensor that all the parts act on.
    """
    acting = [p for p in parts if p.kind in ("lora", "dora", "difference") and p.expert is None]
    for i, part in enumerate(acting):
        for other in acting[:i]:
            cut = [p for p in (part, other) if p.shape and p.shape != spec.shape]
            one_adapter, alike = part.weighted is other.weighted, part.kind == other.kind
            if one_adapter and alike and not cut and _called(part) != _called(other):
                raise UnsupportedAdapter(
                    f"{part.weighted.path}: {_called(other)} and {_called(part)} both change "
                    f"{name}, and are probably the same change twice; remove the keys of one of "
                    "them"
                )
            if part.weighted is not other.weighted or len(cut) != 1:
                continue
            [inner] = cut
            held = math.prod(inner.shape[:-1]) if len(inner.shape) > 1 else inner.shape[0]
            if max(-inner.start, 0) < min(held - inner.start, rows_of(spec)):
                raise UnsupportedAdapter(
                    f"{part.weighted.path}: {_called(other)} and {_called(part)} are the names of "
                    f"{name} in two layouts, and probably the same change twice; remove the keys "
                    "of one of them"
                )


def _called(part: Part) -> str:
    return part.source if isinstance(part.source, str) else str(getattr(part.source, "module", ""))


def _other_names(
    base: Checkpoint | BaseOutline, strange: Collection[str]
) -> Mapping[str, Counterpart | LoadedTensor]:
    """What the base's tensors are called elsewhere, where that is one of these names: in the other
    layout of a diffusion model, or in memory."""
    others = counterparts(base.specs, folders=getattr(base, "models", ()))
    if not others.keys().isdisjoint(strange):
        return others
    how = loaded(base.config, base.specs)
    return {} if how is None or how.tensors.keys().isdisjoint(strange) else how.tensors


def replaced(part: Part, saved: torch.Tensor, target: Target) -> Replaced:
    """The effect of a tensor saved whole, or of what of it is in the target."""
    from lora_tools.linalg.merge import Replaced

    weight = part.weighted.weight
    if not part.shape:
        return Replaced(saved.reshape(target.matrix(tuple(saved.shape))), weight)
    first = max(part.start, 0)
    rows = saved.reshape(-1, 1 if saved.dim() == 1 else saved.shape[-1])
    values = rows[first : max(part.start + rows_of(target.spec), 0)]
    if saved.dim() == 1:  # worked on as one row
        return Replaced(values.T, weight, col=first - part.start)
    return Replaced(values, weight, row=first - part.start)


def differed(part: Part, difference: torch.Tensor, target: Target) -> Added:
    """The effect of a difference, or of what of it is in the target."""
    from lora_tools.linalg.merge import Added

    matrix, weight = target.matrix(target.spec.shape), part.weighted.weight
    if part.shape:
        held = replaced(part, difference, target)
        rows, cols = held.values.shape
        whole = difference.new_zeros(matrix)
        whole[held.row : held.row + rows, held.col : held.col + cols] = held.values
        return Added(whole, weight)
    return Added(difference.reshape(matrix), weight)
