"""Tensors that are stored in parts, each a block of rows, columns or both, with the face of a
``TensorFile``: what distributed training leaves, one part for each process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, TensorNotFound
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.lfs import HEAD, refuse_pointer
from lora_tools.formats.mapped import MappedFile
from lora_tools.formats.regular_files import open_file
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Part:
    """A block of a tensor.

    Attributes:
        offsets: where in the tensor it begins, along each of its dimensions; sizes: its shape.
        file: the one that it lies in.
        begin, end: the bytes of that file that it is in, with whatever is around it.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def slices(self) -> tuple[slice, ...]:
        """The block's place in the tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offsets, self.sizes, strict=True))

    def meets(self, other: Part) -> bool:
        """Whether both hold one element."""
        pairs = zip(self.slices, other.slices, strict=True)
        return all(a.start < b.stop and b.start < a.stop for a, b in pairs)


class Assembled(Reopened):
    """A checkpoint whose tensors are put together of parts, one tensor at a time.

    A tensor of one part is a view of the file; others take the memory that they themselves need.

    Attributes:
        parts: of each tensor.
        part_files: all files that are read.
        notes: what of them is not read.

    Args:
        others: files that are read besides those of the parts.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        parts: Mapping[str, Sequence[Part]],
        others: Iterable[Path] = (),
    ) -> None:
        self.path, self.header = path, b""
        self.metadata: dict[str, str] = {}
        self.specs, self.parts = dict(specs), dict(parts)
        found = {part.file for mine in self.parts.values() for part in mine}
        self.part_files = sorted({path, *found, *others})
        stamps = [Stamp.of(each) for each in self.part_files]
        self.stamp = Stamp(sum(s.nbytes for s in stamps), sum(s.mtime_ns for s in stamps))
        self._maps: dict[Path, MappedFile] = {}

    def mapped(self, path: Path) -> MappedFile:
        """One of them. Raises CheckpointError, by the file's name."""
        if path not in self._maps:
            self._maps[path] = map_file(path)
        return self._maps[path]

    def part(self, name: str, part: Part) -> torch.Tensor:
        """A part as it is stored. Raises CheckpointError, by the tensor's name."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it.

        Raises:
            CheckpointError: a part is not of the dtype and shape that it should be.
        """
        import torch

        if name not in self.specs:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}")
        spec, whole = self.specs[name], None
        for part in self.parts[name]:
            piece = self.part(name, part)
            if part.sizes == spec.shape:
                return piece
            if whole is None:
                whole = torch.empty(spec.shape, dtype=piece.dtype)
            whole[part.slices] = piece
            del piece
            self.mapped(part.file).release(part.begin, part.end)
        if whole is None:
            whole = torch.empty(spec.shape, dtype=torch_dtype(spec.dtype))
        return whole

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes in row-major order."""
        return as_bytes(self.tensor(name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of all of a tensor's parts back, where they are mapped."""
        if start == 0:
            for part in self.parts.get(name, ()):
                self.mapped(part.file).release(part.begin, part.end)


def map_file(path: Path) -> MappedFile:
    """A file's bytes, mapped. Raises CheckpointError."""
    try:
        with open_file(path) as file:
            refuse_pointer(path, file.read(HEAD))
            return MappedFile(file, path)
    except (OSError, ValueError) as error:  # a ValueError: an empty one
        said = error.strerror if isinstance(error, OSError) else "an empty file"
        raise CheckpointError(f"{path}: {said or error}") from None


def check_parts(name: str, shape: Sequence[int], parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts of a tensor that hold something, each once.

    Raises:
        CheckpointError: they do not make up the tensor, every element once.
    """
    kept: dict[tuple[tuple[int, ...], tuple[int, ...]], Part] = {}
    for part in parts:
        inside = len(part.offsets) == len(part.sizes) == len(shape) and all(
            o + n <= size for o, n, size in zip(part.offsets, part.sizes, shape, strict=True)
        )
        if not inside:
            raise CheckpointError(
                f"{name}: a part of {list(part.sizes)} at {list(part.offsets)}, in "
                f"{part.file.name}, is outside the tensor of {list(shape)}"
            )
        if math.prod(part.sizes):
            kept.setdefault((part.offsets, part.sizes), part)
    _refuse_overlap(name, list(kept.values()))
    held = sum(math.prod(part.sizes) for part in kept.values())
    if held != math.prod(shape):
        raise CheckpointError(
            f"{name}: its parts hold {held} of the {math.prod(shape)} numbers of {list(shape)}; "
            "are all files there?"
        )
    return tuple(kept.values())


def _refuse_overlap(name: str, parts: list[Part]) -> None:
    """Along the dimension that is cut most, only parts that begin before one ends can meet it."""
    if len(parts) < 2:
        return
    places = range(len(parts[0].sizes))
    axis = max(places, key=lambda d: len({part.offsets[d] for part in parts}), default=0)
    open_ones: list[Part] = []
    for part in sorted(parts, key=lambda part: part.offsets[axis : axis + 1]):
        open_ones = [p for p in open_ones if p.slices[axis].stop > part.offsets[axis]]
        for other in open_ones:
            if part.meets(other):
                raise CheckpointError(
                    f"{name}: two parts overlap, at {list(other.offsets)} and "
                    f"{list(part.offsets)}, in {other.file.name} and {part.file.name}"
                )
        open_ones.append(part)
