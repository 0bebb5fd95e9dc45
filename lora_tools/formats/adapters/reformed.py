"""A PEFT adapter seen with other modules than it has: by other names, or with the factors of each
made of other ones. Nothing is read before it is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.formats.adapters.outline import Compute, Made, View
from lora_tools.formats.adapters.peft import PREFIX, Adapter
from lora_tools.records import TensorSpec


@dataclasses.dataclass(frozen=True)
class NewModule:
    """Factors of one module; the names of the specs are filled in here.

    Attributes:
        parts: by what PEFT calls them in a key: ``lora_A.weight``, ``lora_embedding_A``, …
    """

    name: str
    parts: Mapping[str, Made]
    r: int
    alpha: float


class Reformed(Adapter):
    """``given`` with these modules; what is saved whole stays as it is."""

    def __init__(self, given: Adapter, modules: Sequence[NewModule], compute: Compute) -> None:
        self._given = given
        self._numbers: dict[str, Mapping[str, Any]] = {
            "rank_pattern": {module.name: module.r for module in modules},
            "alpha_pattern": {module.name: module.alpha for module in modules},
        }
        self.form, self.format, self.stored = given.form, given.format, given.stored
        self.notes, self.blocks, self.unresolved = given.notes, given.blocks, given.unresolved
        made = [
            dataclasses.replace(part, spec=_named(part.spec, f"{PREFIX}{module.name}.{key}"))
            for module in modules
            for key, part in module.parts.items()
        ]
        others = [*given.whole.values(), *(rows.key for rows in given.tokens.values())]
        made += [Made(given.file.specs[key], (key,)) for key in others]
        config = {
            **given.config,
            "target_modules": sorted(module.name for module in modules),
            "target_parameters": None,
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
