"""A base made ready for an adapter, tensor by tensor on demand: with the vocabulary, the labels and
the head that the adapter was trained with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.checkpoint import Checkpoint, View
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.jobs import Lying
from lora_tools.records import Fate, TensorSpec
from lora_tools.sources.class_says import class_says

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Made:
    """One tensor of a fitted base.

    Attributes:
        spec: name, dtype and shape that it has there.
        source: the tensor of the base whose first rows it is (of a bias with a column for each
            token the first columns, and zeros after them), or a key of ``adapter``.
    """

    spec: TensorSpec
    source: str
    adapter: Adapter | None = None


class FittedBase(View):
    """``source`` with the tensors ``made``: some renamed, cut, brought by an adapter, or left out.

    Attributes:
        aliases: names that an adapter has for tensors that go by another one here.
        notes: the source's, and sentences on what was changed.
        left_out: fates of the source's tensors that it lacks.
    """

    def __init__(
        self,
        source: Checkpoint,
        made: Sequence[Made],
        config: dict[str, Any],
        aliases: Mapping[str, str],
        replaced_files: Mapping[str, Path],
        notes: tuple[str, ...],
        left_out: tuple[Fate, ...],
    ) -> None:
        self.made = {each.spec.name: each for each in made}
        self.aliases, self.left_out = aliases, left_out
        homes = {name: i for i, file in enumerate(source.files) for name in file.specs}
        files = [_FittedFile(file.path, file.metadata, self) for file in source.files]
        for each in made:
            home = -1 if each.adapter is not None else homes[each.source]
            home = homes.get(each.spec.name, home)
            files[home].specs[each.spec.name] = each.spec
        super().__init__(source, files)
        self.config, self.replaced_files = config, replaced_files
        self.notes = (*source.notes, *notes)
        self.says = functools.partial(class_says, config, self.specs)

    def brings(self, name: str) -> bool:
        """Whether a tensor is an adapter's."""
        return self.made[name].adapter is not None

    def is_same(self, name: str) -> bool:
        """Whether a tensor is one of the source's, whatever its name."""
        each = self.made[name]
        return each.adapter is None and self.source.specs[each.source].shape == each.spec.shape

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Only these rows are read."""
        if self.is_same(name):
            return self.source.rows(self.made[name].source, matrix, start, stop)
        return super().rows(name, matrix, start, stop)

    def lies(self, name: str) -> tuple[Lying, ...]:
        """What the source, or the adapter, has for it."""
        each = self.made[name]
        if each.adapter is not None:
            file = each.adapter.file
            return (Lying(str(file.path), each.source, file.specs[each.source].nbytes),)
        return self.source.lies(each.source)

    def decoded_bytes(self, name: str) -> int:
        """What the source takes for it."""
        each = self.made[name]
        return 0 if each.adapter is not None else self.source.decoded_bytes(each.source)

    def quantization_noise(self, name: str) -> float:
        """The source's."""
        each = self.made[name]
        return 0.0 if each.adapter is not None else self.source.quantization_noise(each.source)

    def digest(self, known: Mapping[str, str]) -> str:
        """That of the source."""
        mine = {self.made[n].source: value for n, value in known.items() if self.is_same(n)}
        return self.source.digest(mine)

    def companions(self) -> tuple[list[Path], list[Path]]:
        """Those of the source."""
        return self.source.companions()


class _FittedFile:
    """One weight file of the view."""

    header = b""

    def __init__(self, path: Path, metadata: dict[str, str], view: FittedBase) -> None:
        self.path, self.metadata, self._view = path, metadata, view
        self.specs: dict[str, TensorSpec] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor; one of an adapter in its dtype there, not yet rounded."""
        each = self._view.made[name]
        if each.adapter is not None:
            return each.adapter.tensor(each.source)
        tensor = self._view.source.tensor(each.source)
        if self._view.is_same(name):
            return tensor
        found = tensor.new_zeros(each.spec.shape)
        kept = tensor.flatten()[: each.spec.numel]
        found.view(-1)[: kept.numel()] = kept
        return found

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes."""
        from lora_tools.formats.tensors import as_bytes

        each = self._view.made[name]
        if each.adapter is None:
            kept = self._view.source.raw(each.source)[: each.spec.nbytes]
            lacking = each.spec.nbytes - len(kept)
            return memoryview(bytes(kept) + bytes(lacking)) if lacking else kept
        return as_bytes(self.tensor(name).to(torch_dtype(each.spec.dtype)))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of a tensor's bytes [start, stop) back."""
        each = self._view.made[name]
        if each.adapter is None:
            self._view.source.release(each.source, start, stop)
