"""What every stored number format says of itself, and of one weight, whatever that is stored as."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from lora_tools.formats.dtypes import FLOAT_NAMES, parse_float_dtype
from lora_tools.records import TensorSpec

# What the names of parts begin with that are of no use to a weight's numbers (scales of
# activations, marks): they are not read, and lie in no plain copy.
ASIDE = "aside: "
# Parameters of a module that are of its activations, or of its attention's keys, values, queries.
ACTIVATIONS = tuple(
    f"{of}_{what}"
    for of in ("input", "output", "k", "v", "q")
    for what in ("scale", "zero_point", "global_scale")
)


class PackedWeight(Protocol):
    """One weight that is stored as other numbers than its own, in one tensor or in several."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """The stored tensors by what they are of it; the first lies where the weight would."""

    @property
    def plain(self) -> TensorSpec:
        """The weight as a plain checkpoint stores it: its name, dtype and shape."""

    @property
    def label(self) -> str:
        """How it is stored, in a word or two."""


class StoredFormat(Protocol):
    """A row of ``sources.schemes``, as far as it is known where its arithmetic is not."""

    @property
    def name(self) -> str:
        """A short one."""

    @property
    def title(self) -> str:
        """As people call it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Small files that say something of it, and do not go with plain numbers."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A ``PackedWeight`` of which nothing more need be known; others add fields to it.

    Attributes:
        specs: the stored tensors by what they are of it; the first lies where the weight would, and
            what is of no use to its numbers (scales of activations) comes last.
    """

    plain: TensorSpec
    specs: Mapping[str, TensorSpec]
    label: str


def plain_dtype(config: Mapping[str, Any]) -> str:
    """The dtype of a plain copy of a quantized checkpoint, by safetensors' name: what config.json
    says (``dtype``, ``torch_dtype``, of the model or of its text), and BF16 where it says none."""
    text = config.get("text_config")
    for said in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            name = str(said.get(key)).removeprefix("torch.")
            if name in FLOAT_NAMES:
                return parse_float_dtype(name)
    return "BF16"


W = TypeVar("W", bound=Packed)


def with_activations(found: Mapping[str, W], specs: Mapping[str, TensorSpec]) -> dict[str, W]:
    """The weights with the ``ACTIVATIONS`` put aside, each with the weight of its own module or the
    first that lies in it: so they are in no plain copy."""
    owners: dict[str, str] = {}
    for name in found:
        module = name.rpartition(".")[0]
        owners[module] = name
        while "." in module:
            module = module.rpartition(".")[0]
            owners.setdefault(module, name)
    result = dict(found)
    for spec in specs.values():
        module, _, leaf = spec.name.rpartition(".")
        if leaf in ACTIVATIONS and module in owners:
            weight = result[owners[module]]
            parts = {**weight.specs, ASIDE + spec.name: spec}
            result[owners[module]] = dataclasses.replace(weight, specs=parts)
    return result
