"""What a model in torch says of its own parts: which of its parameters are one tensor, where its
embedding and its head are, which layers bitsandbytes' loader replaces. It may be a live model or
one on the meta device."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lora_tools.formats.weights import ModelSays

if TYPE_CHECKING:
    import torch

_READ = re.compile(r"self\.(\w+)\.weight\b(?!\.(?:dtype|device)\b)")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """By names in memory.

    Attributes:
        groups: the names of each tensor that has several.
        heads: the weights of output heads.
        embedding: the weight of the input embedding, or "".
        linears: the layers that transformers' loader puts into four bits → whether each is a
            Conv1D, which is stored transposed. It takes none of a subclass of nn.Linear.
        kept: what it leaves alone all the same, as its list of modules to skip has it.
        read: those layers whose weights other layers read, instead of calling them: there, codes
            would be taken for numbers. (Mamba's.)
    """

    groups: tuple[tuple[str, ...], ...]
    heads: tuple[str, ...]
    embedding: str
    linears: Mapping[str, bool]
    kept: tuple[str, ...]
    read: frozenset[str]


def facts_of(model: Any, state: Mapping[str, torch.Tensor]) -> ModelFacts:
    """Of a model with that ``state_dict(keep_vars=True)``."""
    from torch import nn

    linears: dict[str, bool] = {}
    modules = dict(model.named_modules())
    parts = {kind: _parts_read(kind) for kind in set(map(type, modules.values()))}
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
    )


@functools.cache
def _parts_read(kind: type) -> tuple[str, ...]:
    """Parts of a module whose weights' numbers or shapes its class's own code names."""
    functions = filter(inspect.isfunction, vars(kind).values())
    try:  # a whole class is found by parsing its whole file, a function by its line
        return tuple(part for f in functions for part in _READ.findall(inspect.getsource(f)))
    except (OSError, TypeError):  # written in no file
        return ()


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
    return ModelSays({}, facts.groups, facts.heads, facts.embedding)
