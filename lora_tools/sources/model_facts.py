"""What a model in torch says of its own parts: which of its parameters are one tensor, where its
embedding and its head are, which layers bitsandbytes' loader replaces. It may be a live model or
one on the meta device."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_tools.formats.weights import ModelSays

if TYPE_CHECKING:
    import torch

_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device)\b)")
_RESCALED = re.compile(r"\w\.(\w+(?:\.\w+)+)\.weight\.(?:mul|div)_\(")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """By names in memory.

    Attributes:
        groups: the names of each tensor that has several.
        heads: the weights of output heads.
        embedding: the weight of the input embedding, or "".
        linears: the layers that transformers' loader puts into four bits → whether each is a
            Conv1D, which is stored transposed. It takes none of a subclass of nn.Linear.
        kin: the layers of such a subclass, which other loaders take.
        kept: what it leaves alone all the same, as its list of modules to skip has it.
        read: those layers whose weights other layers read, instead of calling them: there, codes
            would be taken for numbers. (Mamba's.)
        rescaled: those layers whose weights the model multiplies in place; codes it would round
            again, and not as they were. (RWKV's.)
        parted: fused experts in whose place the loader puts a layer for each where it loads them in
            four bits, by other names. (Llama 4's.)
    """

    groups: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]
    embedding: str
    linears: Mapping[str, bool]
    kept: tuple[str, ...]
    read: frozenset[str]
    rescaled: frozenset[str]
    parted: tuple[str, ...]
    kin: frozenset[str] = frozenset()


def facts_of(model: Any, state: Mapping[str, torch.Tensor]) -> ModelFacts:
    """Of a model with that ``state_dict(keep_vars=True)``."""
    from torch import nn

    linears: dict[str, bool] = {}
    modules = dict(model.named_modules())
    sources = {kind: _source(kind) for kind in set(map(type, modules.values()))}
    parts = {kind: _READ.findall(text) for kind, text in sources.items()}
    rescaled = [part for text in sources.values() for part in _RESCALED.findall(text)]
    fused = _parted_in_four_bits()
    read = {f"{name}.{part}" for name, module in modules.items() for part in parts[type(module)]}
    for name, module in modules.items():
        if type(module) is nn.Linear:
            linears[name] = False
        elif any(kind.__name__ == "Conv1D" for kind in type(module).__mro__):
            linears[name] = True
    return ModelFacts(
        groups_of(state),
        tuple(_weight(model, "get_output_embeddings", state)),
        next(iter(_weight(model, "get_input_embeddings", state)), ""),
        linears,
        tuple(sorted(getattr(model, "_keep_in_fp32_modules", None) or ())),
        frozenset(read & linears.keys()),
        frozenset(name for name in linears if any(name.endswith(f".{r}") for r in rescaled)),
        tuple(name for name, module in modules.items() if type(module).__name__ in fused),
        frozenset(n for n, m in modules.items() if isinstance(m, nn.Linear) and n not in linears),
    )


@functools.cache
def _source(kind: type) -> str:
    """The code of a class's functions, which says of what parts of a module it names the weights.
    (That of a whole class is found by parsing its whole file.)"""
    functions = filter(inspect.isfunction, vars(kind).values())
    try:
        return "\n".join(map(inspect.getsource, functions))
    except (OSError, TypeError):  # written in no file
        return ""


def _parted_in_four_bits() -> set[str]:
    """Names of classes for which bitsandbytes' loader puts others."""
    loader = sys.modules.get("transformers.quantizers.base")  # there with any model of its
    table = getattr(loader, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
    return {name for name, row in table.items() if "bitsandbytes" in row["quantization_methods"]}


def groups_of(state: Mapping[str, torch.Tensor]) -> tuple[tuple[str, ...], ...]:
    """The names of each tensor that has several."""
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _weight(model: Any, getter: str, state: Mapping[str, torch.Tensor]) -> list[str]:
    """The name of the weight of the layer that a model gives when it is asked so."""
    try:
        layer = getattr(model, getter)()
    except (AttributeError, NotImplementedError):  # it has none, or no such question
        return []
    if layer is None:
        return []
    weights = (f"{name}.weight" for name, module in model.named_modules() if module is layer)
    return [weight for weight in weights if weight in state and state[weight].dim() == 2]


def live_says(model: Any, state: Mapping[str, torch.Tensor]) -> ModelSays:
    """What a live model with that state says: every name is stored."""
    facts = facts_of(model, state)
    return ModelSays({}, facts.groups, facts.heads, facts.embedding, facts.linears)
