"""A checkpoint seen as transformers holds it in memory: by those names, with experts fused and
blocks parted where it does so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import layout_name
from lora_tools.sources.class_says import in_memory
from lora_tools.sources.pieced import PiecedView
from lora_tools.sources.transformers_names import Loaded, loaded, why_unknown

# In models whose experts transformers 5 fuses, PEFT 0.21 takes target_modules of these names for
# the experts', though they be other layers; as target_parameters they are what they are.
_OF_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


class LoadedView(PiecedView):
    """``source`` by names in memory. What is not loaded, or changed in ways that are not followed,
    keeps its name.

    Attributes:
        how: what becomes of it.
        others: tensors of other names than those stored.
    """

    def __init__(self, source: Checkpoint, how: Loaded) -> None:
        self.how = how
        self.others = [t for t in how.tensors.values() if t.pieces[0].stored != t.spec.name]
        super().__init__(source, how.tensors, how.other)
        says = in_memory(how)
        self.says = dataclasses.replace(says, layouts=_layouts(how, source.config))


def loaded_view(source: Checkpoint) -> Checkpoint:
    """The view; ``source`` itself where nothing is known of how it is loaded."""
    how = loaded(source.config, source.specs)
    return source if how is None else LoadedView(source, how)


def _layouts(how: Loaded, config: Mapping[str, Any]) -> dict[str, tuple[str | None, int]]:
    """The kinds of layer of a view's weights, and their groups, as the model has them."""
    tensors = how.tensors
    fuses = any(len(t.pieces) > 1 and len(t.spec.shape) == 3 for t in tensors.values())
    kinds: dict[str, tuple[str | None, int]] = {}
    for name, tensor in tensors.items():
        found = layout_name(tensor.spec, config) if tensor.layer == "" else tensor.layer
        if found == "linear" and fuses and name.split(".")[-2] in _OF_EXPERTS:
            found = "experts"
        kinds[name] = found, tensor.groups
    return kinds


def named_by(side: Checkpoint) -> str:
    """What gave a view's tensors other names than the files have, or ""."""
    return side.how.by if isinstance(side, LoadedView) and side.others else ""


def notes_on_names(side: Checkpoint) -> list[str]:
    """Sentences on what has other names, and on what PEFT will not find."""
    notes = []
    if not isinstance(side, LoadedView):
        reason = why_unknown(side.config, side.specs)
        if reason:
            notes.append(
                "modules have their names in the files, which may differ from the names in memory "
                f"that PEFT needs: {reason}"
            )
    if isinstance(side, LoadedView) and side.others:
        first = side.others[0]
        notes.append(
            f"{len(side.others)} tensors have the names that {side.how.by} uses in memory, such as "
            f"{first.spec.name} for {first.pieces[0].stored}; --names stored keeps the names in "
            "the files"
        )
    other = side.how.other if isinstance(side, LoadedView) else ()
    other = tuple(name for name in other if name not in side.outside)
    if isinstance(side, LoadedView) and other:
        notes.append(
            f"{side.how.by} does not load {len(other)} tensors, such as {other[0]}, so PEFT does "
            "not load their changes either"
        )
    return notes
