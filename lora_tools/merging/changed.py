"""Types of PEFT that are no LoRA, on stored weights: the change that each makes of a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from lora_tools.errors import MismatchError, UnsupportedAdapter
from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.names import split_tensor
from lora_tools.linalg.layouts import LAYOUTS, Layout
from lora_tools.merging.targets import BaseOutline, Part, Target, need_float
from lora_tools.records import TensorSpec
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.checkpoint import Checkpoint
    from lora_tools.linalg.changes.on import Product
    from lora_tools.linalg.merge import Added

T = TypeVar("T")

# Gives a whole tensor of the base by its name, in plain numbers.
Read = Callable[[str], "torch.Tensor"]


def wanted_changes(weighted: Weighted) -> list[tuple[str, Part]]:
    """What the modules act on: their weights, or their biases, or both."""
    wanted = []
    for name, module in sorted(weighted.adapter.changes.items()):
        for parameter, row in (("weight", module.kind.weight), ("bias", module.kind.bias)):
            if row:
                wanted.append((f"{name}.{parameter}", Part(weighted, module, row)))
    return wanted


def may_lack(part: Part, name: str) -> bool:
    """Whether a base without the tensor is fine: a bias of a type that changes weights, too."""
    return (
        isinstance(part.source, ChangedModule)
        and bool(part.source.kind.weight)
        and name.endswith(".bias")
    )


def stored_as(part: Part, spec: TensorSpec, base: Checkpoint | BaseOutline) -> Layout | None:
    """How a tensor that is changed is stored; None of a bias.

    Raises:
        MismatchError: it is no float.
    """
    need_float(spec.name, spec)
    if len(spec.shape) == 1:
        return None
    assert isinstance(part.source, ChangedModule)
    turned = base.weights.of(spec).layout == "conv1d"
    if not base.config and len(spec.shape) == 2:  # then the adapter says how it is stored
        of_tokens = any("embedding" in key for key in part.source.keys)
        turned = part.weighted.adapter.fan_in_fan_out and not of_tokens
    return LAYOUTS["conv1d" if turned else "linear"]


def refuse_mixtures(name: str, parts: Sequence[Part]) -> None:
    """Raises UnsupportedAdapter where it matters which of several adapters comes first, and nobody
    says."""
    adapters = {id(part.weighted) for part in parts}
    kinds = [
        part.source.kind if isinstance(part.source, ChangedModule) else None
        for part in parts
        if len(adapters) > 1 or part.kind != "saved"  # of one's own: what it was changed from
    ]
    of_base = [kind for kind in kinds if kind is not None and kind.of_base]
    if of_base and any(kind is not of_base[0] for kind in kinds):
        raise UnsupportedAdapter(
            f"{name}: the change of {of_base[0].title} depends on the weight, and another adapter "
            "changes it too; merge one of them first, and the other into the result"
        )


def change_of(
    part: Part,
    spec: TensorSpec,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a part adds to a tensor, in its stored shape.

    Args:
        weight: that of the module, as it is stored, where the change depends on it; bias: that.

    Raises:
        MismatchError: the adapter's tensors are of another layer.
    """
    from lora_tools.linalg.changes.table import change

    delta = _made(change, part, spec, weight, bias)
    return delta.T if is_turned(part) else delta


def product_of(part: Part, spec: TensorSpec) -> Product | None:
    """Exact factors of the same, as (rows, columns) of a matrix, where there are small ones."""
    from lora_tools.linalg.changes.table import product

    assert isinstance(part.source, ChangedModule)
    found = None if part.source.kind.of_base else _made(product, part, spec)
    return found.T if found is not None and is_turned(part) else found


def is_turned(part: Part) -> bool:
    """Whether the weight is stored as (in, out)."""
    return part.layout is not None and part.layout.transposed


def _made(
    row: Callable[..., T],
    part: Part,
    spec: TensorSpec,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> T:
    """By a function of ``linalg.changes.table``, for the weight as (out, in, *kernel)."""
    from lora_tools.linalg.changes.on import On

    source, adapter = part.source, part.weighted.adapter
    assert isinstance(source, ChangedModule)
    turned = is_turned(part)
    on = On(spec.shape[::-1] if turned else spec.shape, weight, bias)
    if weight is not None and turned:
        on = dataclasses.replace(on, given=weight.T)
    tensors = {name: adapter.tensor(key) for name, key in source.keys.items()}
    try:
        return row(part.kind, tensors, source.numbers, on)
    except MismatchError as error:
        raise MismatchError(
            f"{spec.name}: {part.weighted.path}: {error}; is this the base it was trained on?"
        ) from None


def layer_of(target: Target, part: Part, read: Read) -> torch.Tensor:
    """The weight that a change is made on: the base's, or what its own adapter has saved of it, as
    PEFT does of embeddings and output heads that it acts on."""
    for other in target.parts:
        if other.kind == "saved" and other.weighted is part.weighted:
            assert isinstance(other.source, str)
            return other.weighted.adapter.tensor(other.source)
    return read(target.base_name)


def change_effects(target: Target, read: Read | None) -> list[Added]:
    """What all of its parts that are such changes come to.

    Args:
        read: None where the base is not there: then those that depend on it are left out.
    """
    from lora_tools.linalg.merge import Added, working_dtype

    matrix = target.matrix(target.spec.shape)
    effects, moved = [], None
    for part in target.parts:
        if not isinstance(part.source, ChangedModule):
            continue
        if not part.source.kind.of_base:
            delta = change_of(part, target.spec)
            effects.append(Added(delta.reshape(matrix), part.weighted.weight))
        elif read is not None:
            own = layer_of(target, part, read)
            own = own.to(working_dtype(own.dtype))
            if moved is not None and part.source.kind.chained:
                own = own + moved
            on_bias = len(target.spec.shape) == 1
            weight = _weight_beside(target, part, read) if on_bias else own
            weight = weight.to(own.dtype)
            delta = change_of(part, target.spec, weight, own if on_bias else None)
            delta = delta * part.weighted.weight
            moved = delta if moved is None else moved + delta
    if moved is not None:
        effects.append(Added(moved.reshape(matrix), 1.0, of_base=True))
    return effects


def _weight_beside(target: Target, part: Part, read: Read) -> torch.Tensor:
    """The weight of the layer that a bias is of, as ``layer_of`` has it."""
    adapter = part.weighted.adapter
    assert isinstance(part.source, ChangedModule)
    saved = adapter.whole.get(f"{part.source.module}.weight")
    if saved is not None:
        return adapter.tensor(saved)
    return read(f"{split_tensor(target.base_name)[0]}.weight")


def working_bytes(target: Target) -> int:
    """Memory for what such changes are made of, besides the tensor itself."""
    changed = any(isinstance(part.source, ChangedModule) for part in target.parts)
    return 4 * 4 * target.spec.numel if changed else 0
