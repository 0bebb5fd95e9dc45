"""One safetensors file: a suspicious lazy reader.

The format (https://github.com/huggingface/safetensors): eight bytes of little-endian header
length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``,
then the data, without holes or overlaps.

The reader exists beside the ``safetensors`` package because a plan needs names and shapes without
importing torch, because pages that were read must be given back to the system (or resident memory
grows to the size of the model), and because input is hostile.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from lora_tools.errors import CheckpointError, TensorNotFound
from lora_tools.formats.json_file import parse
from lora_tools.formats.lfs import HEAD, refuse_pointer
from lora_tools.formats.mapped import MappedFile
from lora_tools.formats.regular_files import open_file
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.tensors import of_bytes
from lora_tools.records import DTYPE_BITS, TensorSpec

if TYPE_CHECKING:
    import torch

MAX_HEADER = 100_000_000  # the safetensors package's own limit
_MAX_DIMS = 64  # numpy's limit
_MAX_SIZE = 2**63 - 1  # torch's limit
MAX_NAME = 10_000  # characters of a tensor's name: patterns go over it again and again


def _pairs_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise CheckpointError(f"names {key!r} twice")
        seen[key] = value
    return seen


def strict_json(text: bytes | str) -> Any:
    """JSON in UTF-8 in which a repeated key is an error instead of the last one winning.

    Raises:
        CheckpointError: for that, and for whatever is not JSON.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        return parse(text, object_pairs_hook=_pairs_without_duplicates)
    except (ValueError, RecursionError) as error:  # a ValueError, too, is an endless number
        raise CheckpointError(f"not JSON ({error})") from None


def _parse_entry(name: str, entry: Any) -> tuple[TensorSpec, int, int]:
    if len(name) > MAX_NAME:
        raise CheckpointError(f"tensor {name[:50]!r}…: a name of {len(name):,} characters")
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        honest = (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= _MAX_DIMS
            and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in (*shape, begin, end))
            and math.prod(n for n in shape if n) <= _MAX_SIZE
            and begin <= end
        )
    except (TypeError, KeyError, ValueError):
        honest = False
    if not honest:
        raise CheckpointError(f"tensor {name!r}: malformed header entry {entry!r:.200}")
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"tensor {name!r}: unknown dtype {dtype!r}")
    spec = TensorSpec(name, dtype, tuple(shape))
    if spec.nbytes != end - begin:
        raise CheckpointError(
            f"tensor {name!r}: {dtype} {shape} needs {spec.nbytes} bytes, but the header says "
            f"{end - begin}"
        )
    return spec, begin, end


def parse_header(
    raw: bytes, data_size: int | None
) -> tuple[dict[str, TensorSpec], dict[str, int], dict[str, str]]:
    """Specs in the order of the data, offsets in it, and metadata. Raises CheckpointError on any
    lie.

    ``data_size`` is what the file holds behind the header; None where there is no file.
    """
    try:
        header = strict_json(raw)
    except CheckpointError as error:
        raise CheckpointError(f"the header: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError("the header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ is not a mapping of strings")
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    expected = 0
    extents = [_parse_entry(name, entry) for name, entry in header.items()]
    for spec, begin, end in sorted(extents, key=lambda e: (e[1], e[2])):
        if begin != expected:
            what = "overlaps the one before it" if begin < expected else "leaves a hole before it"
            raise CheckpointError(f"tensor {spec.name!r} {what} (at byte {begin} of the data)")
        specs[spec.name], offsets[spec.name] = spec, begin
        expected = end
    if data_size is not None and expected != data_size:
        raise CheckpointError(
            f"the header says {expected} bytes of data, but the file holds {data_size}; it may be "
            "truncated: download it again"
        )
    return specs, offsets, metadata


class SafetensorsFile(Reopened):
    """A memory-mapped safetensors file. Nothing is read but the header until a tensor is asked for.

    Raises:
        CheckpointError: the header is malformed, or promises other than what the file holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_file(path) as file:
                self.stamp = Stamp.of(file.fileno())
                self._read_header(file, self.stamp.nbytes)
                self._map = MappedFile(file, path)
        except CheckpointError as error:
            raise self._of_this(error) from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from None

    def _read_header(self, file: BinaryIO, size: int) -> None:
        """What the header says of a file of that size. Raises CheckpointError."""
        head = file.read(HEAD)
        refuse_pointer(self.path, head)
        length = int.from_bytes(head[:8], "little")
        if size < 8 or not 1 <= length <= min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"the first 8 bytes say that the header has {length} bytes, but the file has "
                f"{size}; it is truncated or not safetensors"
            )
        file.seek(8)
        self.header = file.read(length)
        self._start = 8 + length
        self.specs, self._offsets, self.metadata = parse_header(self.header, size - self._start)

    def _of_this(self, error: CheckpointError) -> CheckpointError:
        said = str(error)
        return CheckpointError(said if said.startswith(str(self.path)) else f"{self.path}: {said}")

    def extent(self, name: str) -> tuple[int, int]:
        """Where in the file the tensor's bytes begin and end."""
        try:
            begin = self._start + self._offsets[name]
        except KeyError:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}") from None
        return begin, begin + self.specs[name].nbytes

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes, without a copy."""
        begin, end = self.extent(name)
        return self._map.view[begin:end]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, without a copy. Never write to it."""
        return of_bytes(self.raw(name), self.specs[name])

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give the pages of the tensor's bytes [start, stop) back to the system.

        Reading them again is still possible.
        """
        begin, end = self.extent(name)
        self._map.release(begin + start, end if stop is None else begin + stop)
