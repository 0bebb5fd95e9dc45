"""Weights of a sentence-transformers folder outside its first module: for verbs that compare. Those
that write copy their files, since adapters act on the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint, View
from lora_tools.formats.pipelines import Pipeline
from lora_tools.formats.shards import Shards
from lora_tools.formats.wrapped_names import Renamed
from lora_tools.jobs import Lying
from lora_tools.sources.checkpoints import open_checkpoint

if TYPE_CHECKING:
    import torch


def other_modules(pipeline: Pipeline | None, allow_pickle: bool) -> Shards:
    """The tensors of the modules after the first, by the module's path and their own names:
    ``2_Dense.linear.weight``. Headers only are read.

    Raises:
        UnsafeInput: they are pickles and ``allow_pickle`` is false.
        CheckpointError: they cannot be read.
    """
    if pipeline is None:
        return Shards(Path(), ())
    files = [
        Renamed(file, {name: f"{prefix}.{name}" for name in file.specs})
        for prefix, folder in pipeline.held()
        for file in open_checkpoint(folder, allow_pickle).files
    ]
    return Shards(pipeline.root, files)


def whole(source: Checkpoint, allow_pickle: bool) -> Checkpoint:
    """The checkpoint with the tensors of all modules of its folder; itself where there are none.

    Raises:
        UnsafeInput, CheckpointError: as ``other_modules``.
    """
    others = other_modules(source.pipeline, allow_pickle)
    return WholePipeline(source, others) if others.specs else source


def open_whole(source: str | Path, allow_pickle: bool = False) -> Checkpoint:
    """``open_checkpoint``, with the tensors of all modules of a sentence-transformers folder, or of
    all models of a diffusers pipeline."""
    return whole(open_checkpoint(source, allow_pickle, pipelines=True), allow_pickle)


class WholePipeline(View):
    """``source``, and beside it the modules after the first.

    Attributes:
        others: what is not the source's. Its digest is the source's: adapters are made for that.
    """

    def __init__(self, source: Checkpoint, others: Shards) -> None:
        super().__init__(source, [source, *others.files])
        self.others, self.outside = others, frozenset(others.specs)

    def lies(self, name: str) -> tuple[Lying, ...]:
        """Where the source has it, or another module."""
        if name not in self.outside:
            return self.source.lies(name)
        return (Lying(str(self.home[name].path), name, self.specs[name].nbytes),)

    def decoded_bytes(self, name: str) -> int:
        """What the source takes for it."""
        return 0 if name in self.outside else self.source.decoded_bytes(name)

    def quantization_noise(self, name: str) -> float:
        """The source's."""
        return 0.0 if name in self.outside else self.source.quantization_noise(name)

    def rows(self, name: str, matrix: tuple[int, int], start: int, stop: int) -> torch.Tensor:
        """Only these rows are read."""
        if name in self.outside:
            return super().rows(name, matrix, start, stop)
        return self.source.rows(name, matrix, start, stop)

    def hash(self, name: str) -> str:
        """Hash of the tensor's bytes."""
        return super().hash(name) if name in self.outside else self.source.hash(name)

    def digest(self, known: Mapping[str, str]) -> str:
        """That of the source."""
        return self.source.digest({n: value for n, value in known.items() if n not in self.outside})
