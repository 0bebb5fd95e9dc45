"""The table of families, and what the tensors of a model are called in its other layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal

from lora_tools.formats.adapters.components import placed
from lora_tools.formats.counterparts.family import Family, Layout, Pair, tensor
from lora_tools.formats.counterparts.flux import FLUX, FLUX_2
from lora_tools.formats.counterparts.open_clip import OPEN_CLIP
from lora_tools.formats.counterparts.recent import RECENT
from lora_tools.formats.counterparts.transformers import (
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_COMFYUI,
    SD3,
    WAN,
    Z_IMAGE,
)
from lora_tools.formats.counterparts.unet import UNET
from lora_tools.formats.names import split_tensor
from lora_tools.records import Piece, TensorSpec, rows_of

FAMILIES = (
    FLUX_2,
    HUNYUAN_VIDEO_COMFYUI,
    FLUX,
    UNET,
    OPEN_CLIP,
    SD3,
    WAN,
    Z_IMAGE,
    HUNYUAN_VIDEO,
    *RECENT,
)
_PARAMETERS = ("weight", "bias")
# Whose names are wanted: the model's own, or those that readers of one kind go by.
Readers = Literal["", "diffusers", "kohya", "comfyui"]


@dataclasses.dataclass(frozen=True, slots=True)
class Counterpart:
    """A tensor as the other layout has it.

    Attributes:
        spec: its name and shape there.
        pieces: the stored rows that it is made of, one above the other.
    """

    spec: TensorSpec
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a model that is of a family.

    Attributes:
        wrapper: what stands before its modules' names.
        layout: the one that it is stored in.
    """

    family: Family
    layout: Layout
    wrapper: str
    pairs: tuple[Pair, ...]

    def wanted(self, by: Readers) -> Layout:
        """The layout that these readers have."""
        if by == "kohya":
            return self.family.kohya([m for pair in self.pairs for m in pair.modules(self.layout)])
        return {"": self.layout, "diffusers": "diffusers", "comfyui": self.family.comfyui}[by]


def parts(tensors: Collection[str], folders: Collection[str] = ()) -> Iterator[Part]:
    """The parts of a model with these tensors that have two layouts. ``folders``: what stands
    before the names of a pipeline's."""
    groups: dict[str, dict[str, None]] = {}
    for name in tensors:
        head, _, own = name.partition(".")
        rest = placed(own if head in folders else name)[1]
        wrapper = name.removesuffix(rest)
        groups.setdefault(wrapper, {})[_module(rest)] = None
    for wrapper, modules in groups.items():
        for family in FAMILIES:
            layout = family.layout(modules.keys())
            if layout is not None:
                found = dict.fromkeys(family.pairs(modules.keys(), layout))
                found |= dict.fromkeys(_respelled(family, [*found]))
                yield Part(family, layout, wrapper, tuple(found))
                break


def _respelled(family: Family, pairs: Collection[Pair]) -> Iterator[Pair]:
    """Those of which others have another name of the original's."""
    for pair in pairs:
        if (name := family.respelled(pair.original)) != pair.original:
            yield dataclasses.replace(pair, original=name)


def _module(name: str) -> str:
    """Of a tensor; of one whose name is no parameter's, as a pair has it; its own of a model's own
    parameter."""
    module, parameter = split_tensor(name)
    if parameter in ("in_proj_weight", "in_proj_bias"):
        return f"{module}.in_proj_"
    return module or parameter


def counterparts(
    specs: Mapping[str, TensorSpec],
    of: Callable[[Part], bool] = lambda part: True,
    folders: Collection[str] = (),
) -> dict[str, Counterpart]:
    """The tensors of a model by their names in the other layout, wrapper and all, where it has one:
    those alone that have another name there, or are cut or stacked.

    Args:
        of: of which parts; folders: as in ``parts``.
    """
    found: dict[str, Counterpart] = {}
    for part in filter(of, parts(specs, folders)):
        for pair in part.pairs:
            for made in _of_pair(pair, part, specs):
                found.setdefault(made.spec.name, made)
        if part.layout == "original":
            for made in _renamed(part, specs):
                found.setdefault(made.spec.name, made)
    return {name: made for name, made in found.items() if name not in specs}


def _renamed(part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Counterpart]:
    """Tensors of the original by the names that others have for them."""
    for pair in part.pairs:
        name = part.family.respelled(pair.original)
        for parameter in _PARAMETERS if name != pair.original else ():
            spec = specs.get(part.wrapper + tensor(pair.original, parameter))
            if spec is not None:
                own = dataclasses.replace(spec, name=part.wrapper + tensor(name, parameter))
                yield Counterpart(own, (Piece(spec.name, 0, rows_of(spec)),))


def _of_pair(pair: Pair, part: Part, specs: Mapping[str, TensorSpec]) -> Iterator[Counterpart]:
    stored = [part.wrapper + module for module in pair.modules(part.layout)]
    others = [part.wrapper + module for module in pair.modules(other(part.layout))]
    for parameter in _PARAMETERS:
        there = [specs.get(tensor(module, parameter)) for module in stored]
        held = [spec for spec in there if spec is not None and spec.shape]
        if len(held) != len(stored):
            continue
        wanted = [tensor(module, parameter) for module in others]
        if pair.swapped:
            yield _swapped(wanted[0], held[0])
        elif part.layout == "original":
            weight = specs.get(tensor(stored[0], "weight"), held[0])
            yield from _cut(wanted, held[0], shares(pair, weight.shape))
        else:
            yield _stacked(wanted[0], held)


def other(layout: Layout) -> Layout:
    """The other one of two."""
    return "diffusers" if layout == "original" else "original"


def shares(pair: Pair, shape: tuple[int, ...]) -> list[int]:
    """How many rows of a weight (out, in) are of each of the pair's modules: q, k and v have as
    many as it has columns, and what follows them the rest; k and v that are ``grouped`` have less.
    [] where they cannot have."""
    count = len(pair.diffusers)
    if count == 1:
        return [shape[0]]
    each = (shape[0] - shape[-1]) // 2 if pair.grouped else shape[-1]
    sizes = [shape[-1], each, each]
    sizes += [shape[0] - sum(sizes)] * (count - 3)
    return sizes if sum(sizes) == shape[0] and min(sizes) > 0 else []


def _cut(names: Collection[str], spec: TensorSpec, sizes: list[int]) -> Iterator[Counterpart]:
    first, each = 0, rows_of(spec) // max(spec.shape[0], 1)
    for name, rows in zip(names, sizes, strict=False):
        own = dataclasses.replace(spec, name=name, shape=(rows, *spec.shape[1:]))
        yield Counterpart(own, (Piece(spec.name, first * each, rows * each),))
        first += rows


def _stacked(name: str, held: list[TensorSpec]) -> Counterpart:
    rows = sum(spec.shape[0] for spec in held)
    own = dataclasses.replace(held[0], name=name, shape=(rows, *held[0].shape[1:]))
    return Counterpart(own, tuple(Piece(spec.name, 0, rows_of(spec)) for spec in held))


def _swapped(name: str, spec: TensorSpec) -> Counterpart:
    half = spec.shape[0] // 2
    pieces = (Piece(spec.name, half, spec.shape[0] - half), Piece(spec.name, 0, half))
    return Counterpart(dataclasses.replace(spec, name=name), pieces)
