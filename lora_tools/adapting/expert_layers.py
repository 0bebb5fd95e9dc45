"""Factors of the experts of one layer in another form: all experts in one as PEFT has them, or one
by one. Both ways are exact: what is cut is of the same rank, and what is put together of the sum of
the ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lora_tools.adapting.convert_module import strength_of
from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.outline import Made
from lora_tools.formats.adapters.peft import LoraModule
from lora_tools.formats.adapters.reformed import NewModule, renamed
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.expert_names import ExpertName, Experts, expert_name
from lora_tools.linalg.scaling import scaling
from lora_tools.merging.expert_share import Share
from lora_tools.merging.experts import alternate, one_by_one_shares, single_layer
from lora_tools.records import TensorSpec
from lora_tools.sources.weighted import Weighted


@dataclasses.dataclass(frozen=True)
class Layer:
    """The experts of one layer, and the modules of an adapter that act on them.

    Attributes:
        specs: the tensors that ``experts`` names.
    """

    weighted: Weighted
    modules: tuple[LoraModule, ...]
    experts: Experts
    base: Checkpoint
    specs: Mapping[str, TensorSpec]

    def single(self, projection: str) -> tuple[ExpertName, tuple[int, int]]:
        """The first expert's layer of a projection, and its (out, in)."""
        return single_layer(self.experts, projection, self.base, self.specs)

    def refuse(self, what: str) -> UnsupportedAdapter:
        """The error for factors that are not brought into another form."""
        return UnsupportedAdapter(
            f"{self.weighted.path}: {self.modules[0].name}: {what}; merge the adapter into the "
            "base instead"
        )


def one_by_one(layer: Layer) -> list[NewModule]:
    """Factors of every projection of every expert; zeros where there are none."""
    found: dict[str, NewModule] = {}
    for module in layer.modules:
        own = expert_name(module.weight)
        assert own is not None
        if own.number is None:
            shares = one_by_one_shares(layer.weighted, module, layer.base)
            made = [_cut(layer, module, share) for share in shares]
        elif len(own.projections) == 1:
            name = layer.single(own.projections[0])[0].of(own.number).module
            made = [_as_it_is(layer, module, name)]
        else:
            raise layer.refuse("gate and up of an expert are one tensor")
        found |= {new.name: new for new in made}
    first = layer.modules[0]
    for projection in layer.experts.names:
        stored, (out, inside) = layer.single(projection)
        for number in range(layer.experts.count):
            name = stored.of(number).module
            if name not in found:
                shapes = {"lora_A.weight": (first.r, inside), "lora_B.weight": (out, first.r)}
                parts = {key: _zeros(layer, shape) for key, shape in shapes.items()}
                found[name] = NewModule(name, parts, first.r, first.alpha)
    return list(found.values())


def _zeros(layer: Layer, shape: tuple[int, int]) -> Made:
    key = layer.modules[0].A
    spec = dataclasses.replace(layer.weighted.adapter.file.specs[key], shape=shape)
    return Made(spec, (key,), "zeros", shape)


def _as_it_is(layer: Layer, module: LoraModule, name: str) -> NewModule:
    if module.bias or module.magnitude:
        raise layer.refuse("has DoRA or lora_bias")
    return renamed(layer.weighted.adapter, module, name)


def _cut(layer: Layer, module: LoraModule, share: Share) -> NewModule:
    """One projection of one expert, cut out of the factors of all."""
    number = share.stored.number
    assert number is not None
    specs = layer.weighted.adapter.file.specs
    A, B = specs[module.A], specs[module.B]
    out, inside = B.shape[0], A.shape[1]
    if share.swapped:
        out, inside = inside, out
    ((rows, _),) = share.halves(out, out)
    every, taken = (0, inside, 1), (rows.start, rows.stop, rows.step or 1)
    turned = int(share.swapped)

    def made(spec: TensorSpec, recipe: str, shape: tuple[int, int], cut: Sequence[int]) -> Made:
        spec, key = dataclasses.replace(spec, shape=shape), spec.name
        return Made(spec, (key,), recipe, (share.count, number, *cut, turned))

    shapes = (module.r, inside), (len(range(*taken)), module.r)
    if share.swapped:
        lora_A = made(B, "one_of_B", shapes[0], every)
        lora_B = made(A, "one_of_A", shapes[1], taken)
    else:
        lora_A = made(A, "one_of_A", shapes[0], every)
        lora_B = made(B, "one_of_B", shapes[1], taken)
    parts = {"lora_A.weight": lora_A, "lora_B.weight": lora_B}
    return NewModule(share.stored.module, parts, module.r, module.alpha)


def all_in_one(layer: Layer) -> list[NewModule]:
    """Factors of both parameters of the experts as PEFT has them; zeros where there are none."""
    made = []
    for depth, (parameter, projections) in enumerate(
        (("down_proj", ("down",)), ("gate_up_proj", ("gate", "up")))
    ):
        mine = {}
        for module in layer.modules:
            own = expert_name(module.weight)
            if own is not None and set(own.projections) <= set(projections):
                mine[own] = module
        whole = [module for own, module in mine.items() if own.number is None]
        if len(whole) > 1 or (whole and len(mine) > 1):
            raise layer.refuse("it has factors of single experts and of all experts in one")
        if whole:
            parts, r, alpha = _turned(layer, whole[0]), whole[0].r, whole[0].alpha
        else:
            parts, r, alpha = _joined(layer, projections, mine)
        holder = layer.single(projections[0])[0].holder
        made.append(NewModule(holder, parts, r, alpha, parameter, depth))
    return made


def _turned(layer: Layer, module: LoraModule) -> dict[str, Made]:
    """Factors of all experts, (out, in) whatever PEFT took them for."""
    specs = layer.weighted.adapter.file.specs
    A, B = specs[module.A], specs[module.B]
    share = one_by_one_shares(layer.weighted, module, layer.base)[0]
    if not share.swapped:
        return {"lora_A.weight": Made(A, (A.name,)), "lora_B.weight": Made(B, (B.name,))}
    (rank, out), inside, count = A.shape, B.shape[0], (share.count,)
    lora_A = Made(dataclasses.replace(B, shape=(rank, inside)), (B.name,), "turned_B", count)
    lora_B = Made(dataclasses.replace(A, shape=(out, rank)), (A.name,), "turned_A", count)
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}


def _joined(
    layer: Layer, projections: tuple[str, ...], mine: Mapping[ExpertName, LoraModule]
) -> tuple[dict[str, Made], int, float]:
    """Factors of single experts as those of all, in a rank that is the sum of gate's and up's; and
    the rank, and lora_alpha."""
    given, count = layer.weighted.adapter, layer.experts.count
    first = next(iter(mine.values()), layer.modules[0])
    if any(
        m.bias or m.magnitude or m.r != first.r or m.alpha != first.alpha for m in mine.values()
    ):
        raise layer.refuse("experts differ in rank or lora_alpha, or have DoRA or lora_bias")
    forms = {own.projections for own in mine} or {projections}
    if len(forms) > 1 and projections in forms:
        raise layer.refuse("gate and up are one tensor for some experts only")
    halves = [projections] if projections in forms else [(p,) for p in projections]
    by_place = {(own.number, own.projections): module for own, module in mine.items()}
    places = [by_place.get((n, half)) for n in range(count) for half in halves]
    there = tuple(int(module is not None) for module in places)
    interleaved = alternate(first.weight, layer.experts, layer.base, layer.specs)
    if interleaved is None and len(halves) > 1:
        raise layer.refuse("it is not known whether gate and up alternate in this architecture")
    out, inside = layer.single(projections[0])[1]
    out, r = out * len(projections), first.r * len(halves)
    spec = given.file.specs[first.A]
    named = [module for module in places if module is not None] or [first]
    sizes = (count, len(halves), first.r)
    lora_A = Made(
        dataclasses.replace(spec, shape=(count * r, inside)),
        tuple(m.A for m in named),
        "all_As",
        (*sizes, inside, *there),
    )
    lora_B = Made(
        dataclasses.replace(spec, shape=(out, r * count)),
        tuple(m.B for m in named),
        "all_Bs",
        (*sizes, out, int(bool(interleaved)), *there),
    )
    alpha = strength_of(first, given) / scaling(1.0, r, given.use_rslora)
    return {"lora_A.weight": lora_A, "lora_B.weight": lora_B}, r, alpha
