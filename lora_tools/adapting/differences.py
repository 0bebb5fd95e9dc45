"""Tensors saved whole as what they add to the base's: for formats that have a place for that."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.tensor_file import TensorFile
from lora_tools.formats.tensors import as_bytes

if TYPE_CHECKING:
    import torch


class WithDifferences(Adapter):
    """``given``; of its tensors saved whole, those that the base has in the same shape are
    differences from these, in float32. Those that are the base's own bytes are left out."""

    def __init__(self, given: Adapter, base: Checkpoint) -> None:
        self._given = given
        alike = {
            name: key
            for name, key in given.whole.items()
            if name in base.specs and base.specs[name].shape == given.shape(key)
        }
        same = {key for name, key in alike.items() if _is_same(given, key, base, name)}
        self.differences = {name: key for name, key in alike.items() if key not in same}
        self.form, self.format, self.notes = given.form, given.format, given.notes
        file = _Differing(given.file, {key: n for n, key in self.differences.items()}, same, base)
        super().__init__(given.path, file, given.config)
        self.stored = given.stored

    @property
    def original(self) -> Adapter:
        return self._given.original


def _is_same(given: Adapter, key: str, base: Checkpoint, name: str) -> bool:
    same = given.file.specs[key].dtype == base.specs[name].dtype
    return same and bytes(given.file.raw(key)) == bytes(base.raw(name))


class _Differing:
    """``file`` with some of its tensors as differences from the base's, and some left out."""

    header = b""

    def __init__(
        self, file: TensorFile, names: Mapping[str, str], left: set[str], base: Checkpoint
    ) -> None:
        self.path, self.metadata = file.path, file.metadata
        self._file, self._names, self._base = file, names, base
        self.specs = {
            key: dataclasses.replace(spec, dtype="F32") if key in names else spec
            for key, spec in file.specs.items()
            if key not in left
        }

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it."""
        tensor = self._file.tensor(name)
        if name not in self._names:
            return tensor
        return (tensor.double() - self._base.tensor(self._names[name]).double()).float()

    def raw(self, name: str) -> memoryview:
        """Its bytes in row-major order."""
        return as_bytes(self.tensor(name)) if name in self._names else self._file.raw(name)

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of its bytes [start, stop) back."""
        self._file.release(name, start, stop)
