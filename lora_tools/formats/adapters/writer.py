"""Writing adapters: what all writers share, and all but the names of those formats that are a
safetensors file of named factors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.outline import ALPHA_METADATA, Compute
from lora_tools.formats.adapters.places import Places
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.spool import SafetensorsSpool
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Factors:
    """One module's update as every writer takes it.

    Attributes:
        lora_A: (r, in), of a convolution (r, in, *k); lora_B: (out, r), (out, r, *1).
        alpha: lora_alpha; scale: the scaling that follows from it.
        form, parameter, r: as in ``peft.LoraModule``; only PEFT knows other forms than "matrix",
            "embedding" and "conv".
        on_inputs: the magnitudes are those of the inputs.
        blocks: of loralib's MergedLinear: which are enabled. spread: the rank of the PEFT factors
            that loralib's were made of, where it is another (``linalg.loralib``).
    """

    module: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    alpha: float
    scale: float
    r: int
    form: str = "matrix"
    parameter: str = "weight"
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    on_inputs: bool = False
    blocks: tuple[bool, ...] = ()
    spread: int = 0

    @property
    def dora_scale(self) -> torch.Tensor | None:
        """The magnitudes as LyCORIS has them: (out, 1, …), or of the inputs (1, in, …)."""
        if self.magnitude is None:
            return None
        ones = [1] * (self.lora_A.dim() - 1)
        return self.magnitude.reshape((1, -1, *ones[1:]) if self.on_inputs else (-1, *ones))


class Writer:
    """What a format's writer does.

    Args:
        out: the path to write.
        base: the model's names, for formats that need them.
        compute: a recipe of ``linalg.recipes``, by name.

    Attributes:
        places: where the modules belong, for formats whose keys say so.
        made: how the adapter was made, to be put where the format has room for such.
    """

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        self.out, self.base, self.compute = out, base, compute
        self.made: Mapping[str, str] = {}
        self.places = Places(base)

    def add(self, factors: Factors) -> None:
        """Write one module's factors. Not for use from several threads."""
        raise NotImplementedError

    def add_saved(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor saved whole, in formats that keep such."""
        raise NotImplementedError

    def add_difference(self, name: str, tensor: torch.Tensor) -> None:
        """Write what is added to a tensor, in formats that keep such."""
        raise NotImplementedError

    def finish(self) -> None:
        """Complete the output."""
        raise NotImplementedError

    def close(self) -> None:
        """Drop what is open, whether finished or not."""
        raise NotImplementedError


class Keyed(Writer):
    """Spools what ``keys`` names, then writes one safetensors file sorted by name."""

    file_name: ClassVar[str] = ""  # of the weights, in formats that are a folder

    def __init__(self, out: Path, base: BaseNames | None, compute: Compute) -> None:
        super().__init__(out, base, compute)
        self.file = out / self.file_name if self.file_name else out
        if self.file_name:
            out.mkdir()
        self.named_alphas: dict[str, float] = {}  # for formats without a place for them
        self._spool = SafetensorsSpool(self.file.parent)

    def add(self, factors: Factors) -> None:
        """Write one module's factors. Not for use from several threads."""
        for key, tensor in self.keys(factors).items():
            self.add_key(key, tensor)

    def add_key(self, key: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        spec = TensorSpec(key, dtype_name(tensor.dtype), tuple(tensor.shape))
        self._spool.add(spec, as_bytes(tensor))

    def keys(self, factors: Factors) -> dict[str, Any]:
        """The tensors of one module by key."""
        raise NotImplementedError

    def metadata(self) -> dict[str, str]:
        """What stands in the file's ``__metadata__``."""
        if not self.named_alphas:
            return {"format": "pt"}
        return {"format": "pt", ALPHA_METADATA: json.dumps(self.named_alphas, sort_keys=True)}

    def finish(self) -> None:
        """Write the file."""
        self._spool.finish(self.file, {**self.metadata(), **self.made})

    def close(self) -> None:
        """Drop the scratch space, whether finished or not."""
        self._spool.close()
