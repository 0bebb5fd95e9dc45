"""Parts of adapters, and the tensors that they act on."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError, UnsupportedAdapter
from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.adapters.peft import LoraModule, Multiplier, TokenRows
from lora_tools.formats.weights import Says, Weights
from lora_tools.linalg.layouts import Block, Layout
from lora_tools.merging.expert_share import Share
from lora_tools.records import TensorSpec
from lora_tools.sources.weighted import Weighted


@dataclasses.dataclass(frozen=True)
class BaseOutline:
    """What a plan needs to know of a checkpoint.

    Attributes:
        renamed: of a live model: names in files → its own.
        says: what the model says of the tensors, or how to ask it.
        notes: what to say of how it is read.
    """

    path: Path
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any]
    renamed: Callable[[Collection[str]], Mapping[str, str]] | None = None
    says: Says = None
    notes: tuple[str, ...] = ()

    @functools.cached_property
    def weights(self) -> Weights:
        """What each tensor is to its model, by name."""
        return Weights(self.specs, self.config, self.says)


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One key, or one pair of factors, of one adapter acting on one tensor."""

    weighted: Weighted
    # a str: the key of a tensor saved whole, or of a difference
    source: LoraModule | TokenRows | Multiplier | ChangedModule | str
    # "lora", "dora", "bias", "saved", "difference", "rows", "ia3", or a row of
    # ``linalg.changes.table``
    kind: str
    layout: Layout | None = None
    # Where the tensor is a part of what the adapter acts on, or has that as a part: its shape, and
    # the tensor's first row among its rows (below 0: it begins so many rows further down).
    shape: tuple[int, ...] = ()
    start: int = 0
    expert: Share | None = None  # where adapter and base hold experts in two forms


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the output: the base's (or the one it is untied from) and what acts on it."""

    spec: TensorSpec
    base_name: str
    parts: tuple[Part, ...]

    def matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(rows, cols) that the tensor is worked on as: by its first dimension, a vector as one
        row, or as the one layer kind that acts on it sees it."""
        kinds = {part.layout.matrix(part.shape) for part in self.parts if part.layout}
        if len(kinds) == 1 and all(part.layout and part.shape == shape for part in self.parts):
            return kinds.pop()
        return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def blocks_of(part: Part) -> list[Block]:
    """The low-rank change that it makes, up to its scaling."""
    adapter, module = part.weighted.adapter, part.source
    assert part.layout is not None
    assert isinstance(module, LoraModule)
    A, B = adapter.tensor(module.A), adapter.tensor(module.B)
    if part.expert is not None:
        return part.expert.blocks(A, B, part.shape)
    try:
        return part.layout.blocks(A, B, part.shape)
    except UnsupportedAdapter as error:
        raise UnsupportedAdapter(f"{part.weighted.path}: {module.module}: {error}") from None


def need_float(name: str, spec: TensorSpec) -> None:
    """Raises MismatchError where a tensor that is to be changed is none of floats."""
    if not spec.is_float:
        raise MismatchError(f"{name}: the base stores it as {spec.dtype}, which is not a float")


def key_of(part: Part) -> str:
    """The key of a part that is one tensor."""
    if isinstance(part.source, str):
        return part.source
    if isinstance(part.source, Multiplier):
        return part.source.key
    assert not isinstance(part.source, ChangedModule)
    key = part.source.key if isinstance(part.source, TokenRows) else part.source.bias
    assert key is not None
    return key
