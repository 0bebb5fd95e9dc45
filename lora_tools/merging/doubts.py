"""What makes a merge look unlike what was meant: adapters without an effect, for another model, or
with a part of their layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import modules_matched, split_tensor
from lora_tools.formats.pipelines import Pipeline
from lora_tools.linalg.scaling import scaling
from lora_tools.records import counted
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    from lora_tools.merging.targets import BaseOutline, Part

# A model's name goes on so where its weights are stored in other numbers.
_IN_OTHER_NUMBERS = re.compile(
    r"([-_.](unsloth|bnb|nf4|fp4|fp8|fp16|bf16|int[48]|[48]bit|awq|gptq|dynamic|hf))+$"
)


def doubts(
    base: Checkpoint | BaseOutline,
    weighted: Sequence[Weighted],
    parts: Mapping[str, Sequence[Part]],
) -> Iterator[str]:
    """Sentences on what a person should look at before trusting the merge.

    Args:
        parts: what acts on each tensor of the base.
    """
    pipeline = base.pipeline if isinstance(base, Checkpoint) else None
    path = pipeline.root if pipeline is not None else base.path
    for each in weighted:
        acted_on = {n for n, acting in parts.items() if any(p.weighted is each for p in acting)}
        found = (
            _idle(each.adapter),
            _other_base(each.adapter, path, base.config),
            _missing_layers(each.adapter, acted_on, base.specs),
            _own_modules(each.adapter, pipeline),
        )
        yield from (f"{each.path}: {said}" for said in found if said)


def _idle(adapter: Adapter) -> str:
    modules = adapter.modules.values()
    idle = [m.name for m in modules if not scaling(m.alpha, m.r, adapter.use_rslora)]
    if not idle:
        return ""
    return (
        f"{len(idle)} of {len(modules)} modules have lora_alpha 0, so they have no effect, such as "
        f"{idle[0]}; some trainers always write 0, and then you have to set lora_alpha in "
        "adapter_config.json"
    )


def _other_base(adapter: Adapter, path: Path, config: Mapping[str, Any]) -> str:
    said = adapter.config.get("base_model_name_or_path")
    if not (isinstance(said, str) and _plain(said)):
        return ""
    own = str(config.get("_name_or_path") or "")
    known = {_plain(own), *map(_plain, path.absolute().parts[-1:]), _hub_name(path)} - {""}
    if not known or _plain(said) in known or _hub_name(Path(said)) in known:
        return ""
    return f"its config says that it was trained on {said}, but the base is {own or path.name}"


def _plain(name: str) -> str:
    """The last part of a path or hub id, whatever numbers the weights are stored in."""
    last = name.replace("\\", "/").rstrip("/").rpartition("/")[2].partition("@")[0].lower()
    return _IN_OTHER_NUMBERS.sub("", last.removesuffix(".safetensors"))


def _hub_name(path: Path) -> str:
    """The model's name where the path lies in a cache of the hub: ``models--org--name``."""
    found = (part for part in path.absolute().parts if part.startswith("models--"))
    return _plain(next(found, "").rpartition("--")[2])


def _missing_layers(adapter: Adapter, acted_on: Collection[str], base: Collection[str]) -> str:
    """Where some layers have factors and others, which the config targets alike, have none."""
    config = adapter.config
    targets = config.get("target_modules")
    listed = [t for t in targets if "." not in t] if isinstance(targets, list | tuple) else []
    if any(config.get(f) for f in ("layers_to_transform", "exclude_modules")) or not listed:
        return ""
    acted, there = ({split_tensor(name)[0] for name in names} for names in (acted_on, base))
    whole = [t for t in listed if modules_matched(t, there) and not modules_matched(t, acted)]
    if whole:
        return (
            f"target_modules in its config select {', '.join(whole)}, but it has no factors for "
            "any such module; was the adapter saved completely?"
        )
    layers = {_layer(name) for name in acted_on}
    modules = {split_tensor(n)[0]: n for n in base if _layer(n) in layers and n not in acted_on}
    missing = sorted(m for t in listed for m in modules_matched(t, modules))
    if not missing:
        return ""
    return (
        f"target_modules in its config select {counted(len(missing), 'more module')} than it has "
        f"factors for, such as {missing[0]}; was the adapter saved completely? "
        "(layers_to_transform would select fewer)"
    )


def _own_modules(adapter: Adapter, base: Pipeline | None) -> str:
    """Where sentence-transformers saved the adapter with modules that the base has not."""
    mine = Pipeline.at(adapter.path)
    theirs = base.others if base is not None else ()
    same = {(each.path, *each.contents()) for each in theirs}
    own = [e.path for e in (mine.others if mine else ()) if (e.path, *e.contents()) not in same]
    if not own:
        return ""
    return (
        "its folder has modules that run after the transformer and differ from the base's "
        f"({', '.join(own)}). They are not merged; copy their folders and modules.json into the "
        "output"
    )


def _layer(tensor: str) -> str:
    """The name with any number for that of the layer."""
    return re.sub(r"\.\d+\.", ".*.", tensor, count=1)
