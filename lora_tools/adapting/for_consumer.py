"""An adapter on its way to a consumer that goes by the base's names: its modules under those names,
and factors of experts in the form in which the consumer reads them."""

from __future__ import annotations

from lora_tools.adapting.expert_layers import Layer, all_in_one, one_by_one
from lora_tools.formats.adapters.consumers import Consumer
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.reformed import NewModule, Reformed, renamed
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.expert_names import expert_name
from lora_tools.formats.names import split_tensor
from lora_tools.merging.experts import experts_of
from lora_tools.merging.plan import names_in_base
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
        return given, [
            f"names match the base if {sentence}; they were not changed"
        ] if sentence else []
    _refuse_experts(given, base, consumer)
    if base is None:
        return given, []
    layers = _layers(weighted, base) if consumer.stacked else {}
    stacks = base.config.get("model_type") in consumer.stacked
    modules: list[NewModule] = []
    made = {id(module): layer for layer in layers.values() for module in layer.modules}
    for name, module in given.modules.items():
        if id(module) not in made:
            modules.append(renamed(given, module, split_tensor(names.get(name, module.weight))[0]))
    for layer in layers.values():
        modules += all_in_one(layer) if stacks else one_by_one(layer)
    old = {module.name: module.r for module in given.modules.values()}
    new = {module.target: module.r for module in modules}
    if new == old and all(part.recipe == "same" for m in modules for part in m.parts.values()):
        return given, []
    notes = []
    moved = sum(
        module.name not in new for module in given.modules.values() if id(module) not in made
    )
    if moved:
        notes.append(f"{sentence}: {moved} modules now have the base's names")
    if made:
        form = "of all experts in one" if stacks else "of each expert"
        ranks = sorted({m.r for m in modules if m.target not in old} or set(new.values()))
        notes.append(
            f"{consumer.name} reads factors {form}: {len(made)} pairs became "
            f"{len(modules) - len(given.modules) + len(made)}, of rank "
            f"{', '.join(map(str, ranks))}. The effect is exactly the same; experts without "
            "factors got zeros"
        )
    from lora_tools.linalg.recipes import compute

    return Reformed(given, modules, compute), notes


def _refuse_experts(given: Adapter, base: Checkpoint | None, consumer: Consumer) -> None:
    """Raises UnsupportedAdapter for factors of all experts in one that cannot be cut."""
    stacked = [m for m in given.modules.values() if m.form == "experts"]
    if stacked and (base is None or not consumer.stacked):
        raise consumer.refuse(
            f"factors of all experts in one ({stacked[0].name})",
            "give the base they were trained on with --base, which shows the part of each expert"
            if consumer.stacked
            else "merge the adapter into the base instead",
        )


def _layers(weighted: Weighted, base: Checkpoint) -> dict[str, Layer]:
    """The modules that are of experts, by layer."""
    mine: dict[str, list[LoraModule]] = {}
    for module in weighted.adapter.modules.values():
        own = expert_name(module.weight)
        if own is not None and own.layer:
            mine.setdefault(own.layer, []).append(module)
    found, specs = experts_of(base, mine)
    return {
        layer: Layer(weighted, tuple(modules), found[layer], base, specs)
        for layer, modules in mine.items()
        if layer in found
    }
