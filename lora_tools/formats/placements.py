"""Which block of a tensor a process holds, as what it saved says.

``torch.distributed.tensor``: along each dimension of the mesh of processes a DTensor is a copy
(``Replicate``) or is cut into as many chunks as there are processes (``Shard(dim)``; all of
⌈length / processes⌉ but the last ones). Read of torch 2.4 to 2.13.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.inert_pickle import Record, kind_of
from lora_tools.formats.torch_zip import SavedTensor, saved_tensor

_SUBCLASS = "torch._tensor._rebuild_from_type_v2"  # (function, class, its arguments, state)


@dataclasses.dataclass(frozen=True)
class Block:
    """What one process holds of a tensor of this ``shape``, and where in it that begins."""

    saved: SavedTensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class _Local:
    """A process's part of a DTensor.

    Attributes:
        cuts: along each dimension of the mesh the tensor's dimension that is cut, or None.
        place: of the process in the mesh.
    """

    saved: SavedTensor
    shape: tuple[int, ...]
    cuts: tuple[int | None, ...]
    place: tuple[int, ...]


def blocks(values: Sequence[Any]) -> tuple[list[list[Block]], bool]:
    """What each process holds of one tensor, and whether each holds all of it.

    Args:
        values: what each process saved, in the order of their ranks.

    Raises:
        CheckpointError: they do not fit each other, or are of a kind that is not read.
    """
    found = [_read(value) for value in values]
    if len({type(each) for each in found}) > 1:
        raise CheckpointError("a plain tensor in one file, and a part of one in another")
    plain = [each for each in found if isinstance(each, SavedTensor)]
    if plain:
        kinds = {(each.dtype, each.shape) for each in plain}
        if len(kinds) > 1:
            raise CheckpointError("has different shapes in different files")
        return [[Block(each, each.shape, (0,) * len(each.shape))] for each in plain], True
    locals_ = [each for each in found if isinstance(each, _Local)]
    if locals_:
        return [[block] for block in _of_mesh(locals_)], False
    return [each for each in found if isinstance(each, list)], False


def _read(value: Any) -> SavedTensor | _Local | list[Block]:
    saved = saved_tensor(value)
    if saved is not None:
        return saved
    if not isinstance(value, Record) or value.kind != _SUBCLASS or len(value.args) != 4:
        raise CheckpointError(f"of a kind that is not read ({kind_of(value)})")
    _, kind, arguments, state = value.args
    name = kind_of(kind).rpartition(".")[2]
    fields = {k: v for part in _tuple(state) if type(part) is dict for k, v in part.items()}
    try:
        if name == "DTensor":
            return _dtensor(fields["_local_tensor"], fields["_spec"].fields)
        if name == "ShardedTensor":
            return _sharded(state[0], state[1].fields)
        if name == "Parameter":
            return _read(value.args[0](*arguments))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        raise CheckpointError(f"a {name} that torch does not write so") from None
    raise CheckpointError(f"a {name or 'tensor'}, which cannot be read; save plain tensors")


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if type(value) is tuple else (value,)


def _sizes(value: Any) -> tuple[int, ...]:
    if not all(type(n) is int and 0 <= n < 2**63 for n in value):
        raise ValueError
    return tuple(value)


def _local(value: Any) -> SavedTensor:
    saved = saved_tensor(value)
    if saved is None:
        raise CheckpointError("its part is not a plain, dense tensor")
    return saved


def _dtensor(local: Any, spec: dict[str, Any]) -> _Local:
    mesh, meta = spec["mesh"].fields, spec["tensor_meta"]
    shape = _sizes(meta.args[0])
    cuts = tuple(_cut(placement, len(shape)) for placement in spec["placements"])
    for entry in spec.get("shard_order") or ():
        axes = entry.args[1]
        if list(axes) != sorted(axes):
            raise CheckpointError("cut along the mesh in another order than its own")
    place = mesh.get("_coordinate_on_dim")
    if place is None:
        raise CheckpointError("does not say which process it is from")
    place = _sizes(place)
    if len(place) != len(cuts):
        raise ValueError
    return _Local(_local(local), shape, cuts, place)


def _cut(placement: Record, dims: int) -> int | None:
    name = placement.kind.rpartition(".")[2]
    if name == "Replicate":
        return None
    dim = placement.fields.get("dim")
    if name != "Shard" or type(dim) is not int or not 0 <= dim < dims:
        raise CheckpointError(
            f"placed by {name}, which cannot be read; gather it (full_tensor()), and save that"
        )
    return dim


def _of_mesh(parts: Sequence[_Local]) -> list[Block]:
    """Each process's block. Raises CheckpointError where one holds another than it should."""
    first = parts[0]
    if any((p.shape, p.cuts) != (first.shape, first.cuts) for p in parts):
        raise CheckpointError("has different shapes or placements in different files")
    mesh = [1 + max(places) for places in zip(*(p.place for p in parts), strict=True)]
    if len({p.place for p in parts}) != math.prod(mesh):
        raise CheckpointError(
            f"of a mesh of {' × '.join(map(str, mesh))} processes, and {len(parts)} are there"
        )
    return [_block(part, mesh) for part in parts]


def _block(part: _Local, mesh: Sequence[int]) -> Block:
    offsets, sizes = [0] * len(part.shape), list(part.shape)
    for dim, place, count in zip(part.cuts, part.place, mesh, strict=True):
        if dim is not None:
            step = -(-sizes[dim] // count)
            begin = min(place * step, sizes[dim])
            offsets[dim] += begin
            sizes[dim] = min(step, sizes[dim] - begin)
    held = part.saved.shape
    if held != tuple(sizes) and (0 not in held or 0 not in sizes):
        raise CheckpointError(
            f"the process at {list(part.place)} holds {list(held)} of {list(part.shape)}, but "
            f"should hold {sizes}; are all files there?"
        )
    return Block(part.saved, part.shape, tuple(offsets))


def _sharded(shards: Any, metadata: dict[str, Any]) -> list[Block]:
    shape = _sizes(metadata["size"])
    found = []
    for shard in shards:
        fields = shard.fields
        block = Block(
            _local(fields["tensor"]), shape, _sizes(fields["metadata"].fields["shard_offsets"])
        )
        found.append(block)
    return found
