"""What the class that a config.json names says of a checkpoint's tensors: which are one, which are
the head and the embedding. For plain decoders it is known without transformers, whose import takes
as long as many a merge; of all others the class is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_tools.formats.names import is_input_embedding, is_language_model, split_tensor
from lora_tools.formats.weights import ModelSays, weight_of
from lora_tools.records import TensorSpec
from lora_tools.sources.transformers_names import Loaded, keeps_names, look

# Decoders with one embedding and a head of the name lm_head, and whether they tie the two where
# config.json does not say.
DECODERS = {
    "gemma": True,
    "gemma2": True,
    "gemma3_text": True,
    "gpt2": True,
    "llama": False,
    "mistral": False,
    "phi": False,
    "phi3": False,
    "qwen2": False,
    "qwen3": False,
    "smollm3": True,
}
_HEAD = "lm_head.weight"


def class_says(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> ModelSays | None:
    """By the names that the tensors are stored under; None where nobody knows the class."""
    known = _of_a_plain_one(config, specs)
    if known is not None:
        return known
    how, _ = look(config, specs)
    return _by_stored_names(how) if how is not None else None


def _of_a_plain_one(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> ModelSays | None:
    kind, classes = config.get("model_type"), config.get("architectures")
    if not (classes and keeps_names(config, specs)):
        return None
    layers = (weight_of(spec, config) for spec in specs.values())
    linears = {
        weight.module: weight.layout == "conv1d"
        for weight in layers
        if weight.layout in ("linear", "conv1d")
    }
    if not is_language_model(str(classes[0])):
        return ModelSays(linears=linears)
    found = [name for name in specs if is_input_embedding(name)]
    tied = config.get("tie_word_embeddings", DECODERS.get(str(kind)))
    if kind not in DECODERS or len(found) != 1 or tied is None:
        return None
    linears[split_tensor(_HEAD)[0]] = False
    return ModelSays({}, ((found[0], _HEAD),) if tied else (), (_HEAD,), found[0], linears)


def in_memory(how: Loaded) -> ModelSays:
    """By the names in memory."""
    facts = how.facts
    if facts is None:
        return ModelSays()
    parted = ([n for n in group if n in how.tensors] for group in facts.groups)
    groups = tuple(
        (*there, *(name for name in group if name not in there))
        for group, there in zip(facts.groups, parted, strict=True)
        if there
    )
    return ModelSays({}, groups, facts.heads, facts.embedding, facts.linears)


def _by_stored_names(how: Loaded) -> ModelSays:
    says = in_memory(how)

    def stored(name: str) -> str:
        """The name of the whole stored tensor that one in memory is; its own where it is none."""
        made_of = how.tensors.get(name)
        return name if made_of is None or made_of.converted else made_of.pieces[0].stored

    groups = (group for group in says.groups if not how.tensors[group[0]].converted)
    return dataclasses.replace(
        says,
        groups=tuple(tuple(map(stored, group)) for group in groups),
        heads=tuple(map(stored, says.heads)),
        embedding=stored(says.embedding) if says.embedding else "",
        linears={
            split_tensor(stored(f"{module}.weight"))[0]: conv1d
            for module, conv1d in says.linears.items()
        },
    )
