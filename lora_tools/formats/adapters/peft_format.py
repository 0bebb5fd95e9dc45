"""PEFT as one of the formats to convert to: ``PeftWriter`` with the face of the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import FEATURES, Format
from lora_tools.formats.adapters.outline import Compute
from lora_tools.formats.adapters.peft import WEIGHTS
from lora_tools.formats.adapters.peft_writer import PeftWriter
from lora_tools.formats.adapters.writer import Factors, Writer

if TYPE_CHECKING:
    import torch


# Fields that take modules out of those that target_modules selects.
_NARROWS = {"exclude_modules", "layers_to_transform", "layers_pattern"}


class PeftFormat(Writer):
    """Writes an adapter folder. With a base at hand, target_modules is as short as PEFT allows."""

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        out.mkdir()
        self._writer = PeftWriter(out)
        self._modules: list[str] = []
        self.config: Mapping[str, Any] = {}  # fields that are not derived from the factors
        self.saves = False  # tensors saved whole: then the config says of which modules

    def add(self, factors: Factors) -> None:
        """Write one module's factors."""
        self._modules.append(factors.module)
        self._writer.add_lora(
            factors.module,
            factors.lora_A,
            factors.lora_B,
            factors.alpha,
            form=factors.form,
            parameter=factors.parameter,
            r=factors.r,
            bias=factors.bias,
            magnitude=factors.magnitude,
        )

    def add_raw(self, key: str, tensor: torch.Tensor) -> None:
        """A tensor saved whole, under its own key."""
        self.saves = True
        self._writer.add_raw(key, tensor)

    def finish(self) -> None:
        """Write both files."""
        config = dict(self.config)
        names = None
        if self.base is not None:
            names = None if self.saves else [*self.base.weights, *self._modules]
            if names is not None:  # target_modules selects exactly what is here
                config |= dict.fromkeys(_NARROWS & config.keys())
            kinds = {self.base.layouts.get(module) for module in self._modules}
            config["fan_in_fan_out"] = "conv1d" in kinds
        self._writer.finish(config, names, self.made)

    def close(self) -> None:
        """Drop the scratch space, whether finished or not."""
        self._writer.close()


FORMAT = Format(
    "peft",
    "PEFT",
    frozenset(FEATURES) - {"differences"},
    "module",
    "peft 0.21",
    is_folder=True,
    reads_besides="IA³ (merge only)",
    writer=PeftFormat,
    file_name=WEIGHTS,
    marks=("lora", "ia3_l"),
)
