"""A PEFT adapter seen with other modules than it has: by other names, or with the factors of each
made of other ones. Nothing is read before it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.formats.adapters.outline import Compute, Made, View
from lora_tools.formats.adapters.peft import PREFIX, Adapter, LoraModule
from lora_tools.records import TensorSpec


@dataclasses.dataclass(frozen=True)
class NewModule:
    """Factors of one module; the names of the specs are filled in here.

    Attributes:
        parts: by what PEFT calls them in a key: ``lora_A.weight``, ``lora_embedding_A``, …
        parameter: of a module of experts, the parameter that they act on.
        depth: how many of PEFT's wrappers are around it.
    """

    name: str
    parts: Mapping[str, Made]
    r: int
    alpha: float
    parameter: str = ""
    depth: int = 0

    @property
    def target(self) -> str:
        """What PEFT is told to put factors beside."""
        return f"{self.name}.{self.parameter}" if self.parameter else self.name

    @property
    def prefix(self) -> str:
        """How its keys begin."""
        return f"{PREFIX}{self.name}{'.base_layer' * self.depth}"


def renamed(given: Adapter, module: LoraModule, name: str) -> NewModule:
    """The module as it is, by another name."""
    keys = {"lora_B.bias": module.bias, "lora_magnitude_vector": module.magnitude}
    if module.form == "embedding":
        keys |= {"lora_embedding_A": module.A, "lora_embedding_B": module.B}
    else:
        keys |= {"lora_A.weight": module.A, "lora_B.weight": module.B}
    parts = {part: Made(given.file.specs[key], (key,)) for part, key in keys.items() if key}
    return NewModule(name, parts, module.r, module.alpha)


class Reformed(Adapter):
    """``given`` with these modules; what is saved whole stays as it is."""

    def __init__(self, given: Adapter, modules: Sequence[NewModule], compute: Compute) -> None:
        self._given, self.mixes_dora = given, given.mixes_dora
        self._numbers: dict[str, Mapping[str, Any]] = {
            "rank_pattern": {module.target: module.r for module in modules},
            "alpha_pattern": {module.target: module.alpha for module in modules},
        }
        self.form, self.format, self.stored = given.form, given.format, given.stored
        self.notes, self.blocks, self.unresolved = given.notes, given.blocks, given.unresolved
        made = [
            dataclasses.replace(part, spec=_named(part.spec, f"{module.prefix}.{key}"))
            for module in modules
            for key, part in module.parts.items()
        ]
        others = [*given.whole.values(), *(rows.key for rows in given.tokens.values())]
        others += given.differences.values()
        self.differences = given.differences
        made += [Made(given.file.specs[key], (key,)) for key in others]
        # The version tells how old ones turned factors of experts; these are as new ones have them.
        config = {
            **{key: value for key, value in given.config.items() if key != "peft_version"},
            "target_modules": sorted(m.name for m in modules if not m.parameter),
            "target_parameters": sorted(m.target for m in modules if m.parameter) or None,
        }
        super().__init__(given.path, View(given.file, made, compute), config)

    @property
    def original(self) -> Adapter:
        return self._given.original

    def pattern(self, which: str, module: str, default: Any) -> Any:
        """The module's own rank or alpha: no pattern stands between."""
        return self._numbers[which].get(module, default)


def _named(spec: TensorSpec, name: str) -> TensorSpec:
    return dataclasses.replace(spec, name=name)
