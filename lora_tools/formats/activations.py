"""What ``collect-stats`` writes: the second moment of each linear layer's input.

A safetensors file with one tensor a module, named as the module: E[xxᵀ] (in, in), or its diagonal
(in), in float32. Its metadata says how many tokens were seen.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.alignment import align
from lora_tools.formats.safetensors_file import SafetensorsFile
from lora_tools.records import Input

if TYPE_CHECKING:
    import torch

MARK, VERSION = "loratools_activations", "1"


class Activations:
    """Such a file, read lazily. Raises CheckpointError where it is none."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, SafetensorsFile(path)
        if self._file.metadata.get(MARK) != VERSION:
            raise CheckpointError(
                f"{path}: does not hold activation statistics; make them with loratools "
                "collect-stats"
            )
        for spec in self._file.specs.values():
            square = len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
            if spec.dtype != "F32" or not (square or len(spec.shape) == 1):
                raise CheckpointError(f"{path}: {spec} is not a second moment of activations")
        hashes = {name: hashing.tensor_hash(self._file.raw(name)) for name in self._file.specs}
        self.digest = hashing.digest(self._file.specs.values(), hashes)
        self._own = {name: name for name in self._file.specs}

    def match(self, modules: Collection[str]) -> None:
        """Find the names by which these modules are known here, prefixes aside.

        Raises:
            MismatchError: none of the modules is known.
        """
        mapping, _ = align(list(self._file.specs), list(modules))
        self._own = {ours: theirs for theirs, ours in mapping.items()}
        if not any(module in self._own for module in modules):
            raise MismatchError(
                f"{self._path}: has none of the modules ({next(iter(modules), '-')}, …); was it "
                "collected on this model?"
            )

    def as_input(self) -> Input:
        """As a report has it among its inputs."""
        return Input("activations", str(self.path), self.digest)

    def __contains__(self, module: str) -> bool:
        return module in self._own

    @property
    def tokens(self) -> int | None:
        """How many were seen, where it says so."""
        said = self._file.metadata.get("tokens", "")
        return int(said) if said.isascii() and said.isdecimal() else None

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def is_full(self, module: str) -> bool:
        """Whether all of E[xxᵀ] is known, and not its diagonal alone."""
        return len(self._file.specs[self._own[module]].shape) == 2

    def check(self, module: str, width: int) -> None:
        """Raises MismatchError: it is not of that many inputs."""
        name = self._own[module]
        if self._file.specs[name].shape[0] != width:
            raise MismatchError(
                f"{self._path}: {name} has {self._file.specs[name].shape[0]} inputs, and the "
                f"checkpoint's {module} has {width}; was it collected on this model?"
            )

    def moment(self, module: str, width: int) -> torch.Tensor:
        """E[xxᵀ] or its diagonal.

        Raises:
            MismatchError: it is not of that many inputs.
        """
        self.check(module, width)
        name = self._own[module]
        moment = self._file.tensor(name)
        if not moment.isfinite().all():
            raise CheckpointError(f"{self._path}: {name} holds an inf or a NaN")
        return moment
