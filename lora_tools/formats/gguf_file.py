"""One GGUF file: fields, and tensors that are stored as numbers or as blocks.

The layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, counts, the
fields, then each tensor's name, dimensions (the fastest first), type and offset, then the data.

The reader exists beside the ``gguf`` package's own, which makes an object of every token of the
vocabulary (seconds), keeps all pages that were read, and believes the lengths that a file gives.
Which types there are, and how large their blocks, the package says.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, TensorNotFound, need
from lora_tools.formats.mapped import MappedFile
from lora_tools.formats.regular_files import MOST, open_file
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.tensors import of_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

MAGIC = b"GGUF"
MADE = "loratools."  # before the fields that say how a file was made
PLAIN = ("F32", "F16", "BF16", "F64")  # types that are dtypes of floats by the same name
_VERSIONS = (2, 3)
_SCALARS = "BbHhIif?"  # struct's letter of the types 0 to 7
_LONG_SCALARS = {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_LISTED = 10_000_000  # of a vocabulary and its merges
_LONGEST_LIST = 4096  # numbers of a list that is kept; vocabularies have more, and need not be
_MAX_DIMS = 8
_MAX_SIZE = 2**48


def package() -> Any:
    """The ``gguf`` package. Raises NotInstalled."""
    need("a GGUF file", "gguf", "gguf")
    import gguf

    return gguf


def is_gguf(path: Path) -> bool:
    """Whether a file is one, by its first bytes: in ollama's store none has a suffix."""
    with open_file(path) as file:
        return file.read(len(MAGIC)) == MAGIC


@functools.cache
def is_decoded(kind: str) -> bool:
    """Whether the package makes numbers of a type's blocks."""
    import numpy as np

    gguf = package()
    number = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8), number)
    except NotImplementedError:
        return False
    return True


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and as what.

    Attributes:
        kind: ggml's name of the type: F32, Q4_K, …
        shape: of its numbers, rows first.
        block: numbers of a block; nbytes: bytes of a block.
    """

    kind: str
    shape: tuple[int, ...]
    start: int
    block: int
    nbytes: int

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) // self.block * self.nbytes

    def spec(self, name: str) -> TensorSpec:
        """As it is stored: plain numbers in their dtype, rows of blocks as bytes."""
        if self.block == 1:
            return TensorSpec(name, self.kind, self.shape)
        return TensorSpec(
            name, "U8", (*self.shape[:-1], self.shape[-1] // self.block * self.nbytes)
        )


class GgufFile(Reopened):
    """A memory-mapped GGUF file, with the face of a ``TensorFile``. Opening it reads the header.

    Attributes:
        fields: its fields by name; of lists only short ones of numbers.
        stored: every tensor's place and type.

    Raises:
        CheckpointError: the header is malformed, or promises other than what the file holds.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.header = path, b""
        package()
        try:
            with open_file(path) as file:
                self.stamp = Stamp.of(file.fileno())
                if not self.stamp.nbytes:
                    raise CheckpointError("it is empty")
                self._map = MappedFile(file, path)
            head = _Header(self._map.view)
        except CheckpointError as error:
            raise CheckpointError(
                f"{path}: not a complete GGUF file, or not one that can be read ({error})"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None
        self.fields, self.stored = head.fields, head.tensors
        made = {k.removeprefix(MADE): v for k, v in self.fields.items() if k.startswith(MADE)}
        self.metadata = {k: v for k, v in made.items() if isinstance(v, str)}
        self.specs = {name: stored.spec(name) for name, stored in self.stored.items()}

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, without a copy."""
        stored = self._at(name)
        return self._map.view[stored.start : stored.start + stored.size]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as it is stored, without a copy. Never write to it."""
        return of_bytes(self.raw(name), self.specs[name])

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of the tensor's bytes [start, stop) back to the system."""
        stored = self._at(name)
        end = stored.size if stop is None else stop
        self._map.release(stored.start + start, stored.start + end)

    def _at(self, name: str) -> Stored:
        try:
            return self.stored[name]
        except KeyError:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}") from None


class _Header:
    """What stands before the data. Raises CheckpointError for any lie."""

    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0
        if self._take(4) != MAGIC:
            raise CheckpointError("it does not begin with GGUF")
        version = self._number("I")
        if version not in _VERSIONS:
            raise CheckpointError(
                f"version {version:#x}; only versions 2 and 3 can be read, in little-endian files"
            )
        count, fields = self._number("Q"), self._number("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(fields):
            name = self._string()
            if name in self.fields:
                raise CheckpointError(f"field {name!r} is there twice")
            self.fields[name] = self._value(self._number("I"))
        self._sizes = _sizes()
        self.tensors: dict[str, Stored] = {}
        for _ in range(count):
            name, stored = self._tensor()
            if name in self.tensors:
                raise CheckpointError(f"tensor {name!r} is there twice")
            self.tensors[name] = stored
        self._place()

    def _place(self) -> None:
        """Offsets count from where the data begins, which is aligned."""
        step = self.fields.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step & (step - 1):
            raise CheckpointError(f"general.alignment is {step!r}, but must be a power of two")
        begin = -(-self._at // step) * step
        for name, given in self.tensors.items():
            placed = dataclasses.replace(given, start=begin + given.start)
            if placed.start + placed.size > len(self._view):
                raise CheckpointError(
                    f"tensor {name!r} ends at byte {placed.start + placed.size}, but the file has "
                    f"{len(self._view)}; it may be truncated: download it again"
                )
            self.tensors[name] = placed

    def _tensor(self) -> tuple[str, Stored]:
        name, dims = self._string(), self._number("I")
        if dims > _MAX_DIMS:
            raise CheckpointError(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(self._number("Q") for _ in range(dims))[::-1]
        if max(shape, default=0) > _MAX_SIZE:
            raise CheckpointError(
                f"tensor {name!r} is {list(shape)}, which is too large for any file"
            )
        kind, offset = self._number("I"), self._number("Q")
        if kind not in self._sizes:
            raise CheckpointError(
                f"tensor {name!r} is of type {kind}, which this version of the gguf package does "
                "not know: pip install -U gguf"
            )
        named, block, nbytes = self._sizes[kind]
        row = shape[-1] if shape else 1
        if row % block:
            raise CheckpointError(f"tensor {name!r}: rows of {row} are not blocks of {block}")
        return name, Stored(named, shape, offset, block, nbytes)

    def _skip(self, n: int) -> None:
        if n > len(self._view) - self._at:
            self._take(n)
        self._at += n

    def _take(self, n: int) -> bytes:
        if n > len(self._view) - self._at:
            raise CheckpointError(
                f"its header ends beyond the file's {len(self._view)} bytes; is it truncated?"
            )
        self._at += n
        return bytes(self._view[self._at - n : self._at])

    def _number(self, letter: str) -> Any:
        [value] = struct.unpack("<" + letter, self._take(struct.calcsize("<" + letter)))
        return value

    def _string(self) -> str:
        size = self._number("Q")
        if size > MOST:
            raise CheckpointError(f"a string of {size:,} bytes; at most {MOST:,} are read")
        return self._take(size).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._list(self._number("I"), self._number("Q"))
        return self._number(_letter(kind))

    def _list(self, kind: int, count: int) -> list[Any] | None:
        """A list of numbers that is short; else None, with nothing of it kept."""
        if count > _MOST_LISTED:
            raise CheckpointError(f"a list of {count:,}; at most {_MOST_LISTED:,} are read")
        if kind == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
            return None
        letter = _letter(kind)  # of no list of lists: nothing writes any
        data = self._take(count * struct.calcsize("<" + letter))
        return list(struct.unpack(f"<{count}{letter}", data)) if count <= _LONGEST_LIST else None


def _letter(kind: int) -> str:
    if kind in _LONG_SCALARS:
        return _LONG_SCALARS[kind]
    if kind < len(_SCALARS):
        return _SCALARS[kind]
    raise CheckpointError(f"a field of the unknown type {kind}")


def _sizes() -> dict[int, tuple[str, int, int]]:
    """ggml's number of each type → its name, numbers and bytes of a block."""
    gguf = package()
    return {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
