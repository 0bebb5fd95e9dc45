"""An adapter on its way to a consumer that goes by the base's names and reads experts one by one:
its modules under those names, and factors of all experts in one cut into those of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.outline import Made
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.reformed import NewModule, Reformed
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.merging.expert_share import Share
from lora_tools.merging.experts import one_by_one_shares
from lora_tools.merging.plan import names_in_base
from lora_tools.records import TensorSpec
from lora_tools.sources.weighted import Weighted


def in_terms_of(
    given: Adapter, path: str, base: Checkpoint | None, consumer: Consumer
) -> tuple[Adapter, list[str]]:
    """The adapter as the consumer looks for its modules in the base, and what was done.

    Raises:
        AdapterError: a key matches nothing in the base.
        UnsupportedAdapter: factors of experts that the consumer does not read.
    """
    weighted = Weighted(given, 1.0, path)
    names, sentence = names_in_base(weighted, base) if base is not None else ({}, "")
    if consumer.loads:
        return given, [f"{path}: {sentence} to match the base"] if sentence else []
    stacked = [m for m in given.modules.values() if m.form == "experts"]
    if base is not None and base.config.get("model_type") in consumer.stacked:
        stacked = []
    elif stacked and (base is None or not consumer.stacked):
        raise consumer.refuse(
            f"factors of all experts in one ({stacked[0].name})",
            "give the base they were trained on with --base, which tells what of them is of which "
            "expert"
            if consumer.stacked
            else "merge the adapter into the base instead",
        )
    moved = {m: name for m, name in names.items() if given.modules[m].weight != name}
    if not stacked and not moved:
        return given, []
    modules: list[NewModule] = []
    for name, module in given.modules.items():
        if module in stacked and base is not None:
            modules += [_one(given, module, s) for s in one_by_one_shares(weighted, module, base)]
        else:
            modules.append(_renamed(given, module, split_tensor(names.get(name, module.weight))[0]))
    notes = [f"{sentence}: {len(moved)} modules have the base's names"] if moved else []
    if stacked:
        notes.append(
            f"{consumer.name} reads factors of each expert: {len(stacked)} pairs for all experts "
            f"in one are {len(modules) - len(given.modules) + len(stacked)} now, of the same rank, "
            "exactly"
        )
    from lora_tools.linalg.recipes import compute

    return Reformed(given, modules, compute), notes


def _renamed(given: Adapter, module: LoraModule, name: str) -> NewModule:
    """The module as it is, by another name."""
    keys = {"lora_B.bias": module.bias, "lora_magnitude_vector": module.magnitude}
    if module.form == "embedding":
        keys |= {"lora_embedding_A": module.A, "lora_embedding_B": module.B}
    else:
        keys |= {"lora_A.weight": module.A, "lora_B.weight": module.B}
    parts = {part: Made(given.file.specs[key], (key,)) for part, key in keys.items() if key}
    return NewModule(name, parts, module.r, module.alpha)


def _one(given: Adapter, module: LoraModule, share: Share) -> NewModule:
    """One projection of one expert, cut out of the factors of all."""
    number = share.stored.number
    assert number is not None
    A, B = given.file.specs[module.A], given.file.specs[module.B]
    out, inside = B.shape[0], A.shape[1]
    if share.swapped:
        out, inside = inside, out
    ((rows, _),) = share.halves(out, out)
    every, taken = (0, inside, 1), (rows.start, rows.stop, rows.step or 1)
    turned = int(share.swapped)

    def made(spec: TensorSpec, recipe: str, shape: tuple[int, int], cut: Sequence[int]) -> Made:
        spec = dataclasses.replace(spec, shape=shape)
        return Made(spec, (spec.name,), recipe, (share.count, number, *cut, turned))

    shapes = (module.r, inside), (len(range(*taken)), module.r)
    if share.swapped:
        lora_A = made(B, "one_of_B", shapes[0], every)
        lora_B = made(A, "one_of_A", shapes[1], taken)
    else:
        lora_A = made(A, "one_of_A", shapes[0], every)
        lora_B = made(B, "one_of_B", shapes[1], taken)
    parts: Mapping[str, Made] = {"lora_A.weight": lora_A, "lora_B.weight": lora_B}
    return NewModule(share.stored.module, parts, module.r, module.alpha)
