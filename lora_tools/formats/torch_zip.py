"""What ``torch.save`` writes, read from mapped memory: tensors as views of it, without torch until
one is asked for.

A zip of ``NAME/data.pkl`` (a pickle that refers to storages by number), ``NAME/data/0``, … and
``NAME/byteorder``, all stored uncompressed (torch's ``serialization.py``, since 1.6). The pickle is
read by ``inert_pickle``.
"""

from __future__ import annotations

import dataclasses
import io
import math
import zipfile
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, first_line
from lora_tools.formats.dtypes import dtype_name, torch_dtype
from lora_tools.formats.inert_pickle import Record, kind_of, read_pickle
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip
_LOCAL = 30  # bytes of a member's own header before its name


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """A tensor of such a file.

    Attributes:
        begin, end: where in the mapped bytes its storage's elements from its first one on lie.
        stride: in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    begin: int
    end: int

    def view(self, data: memoryview) -> torch.Tensor:
        """The tensor, without a copy. Never write to it."""
        import torch

        dtype = torch_dtype(self.dtype)
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=dtype)
        flat = torch.frombuffer(data[self.begin : self.end], dtype=torch.uint8)
        if flat.data_ptr() % dtype.itemsize:  # a chunk may begin at any byte of a file
            flat = flat.clone()
        return flat.view(dtype).as_strided(self.shape, self.stride)


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: str  # "" where the tensor says
    begin: int
    end: int


class _Window(io.RawIOBase):
    """Mapped bytes as a file to read, without a copy of them."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._data.nbytes}[whence]
        self._place = max(base + offset, 0)
        return self._place

    def readinto(self, buffer: Any) -> int:
        part = self._data[self._place : self._place + len(buffer)]
        buffer[: part.nbytes] = part
        self._place += part.nbytes
        return part.nbytes


def read_saved(data: memoryview) -> Any:
    """What was saved, with ``Record`` for what is not of Python's plain types; ``saved_tensor``
    makes something of those that are tensors.

    Args:
        data: the file, or the part of one.

    Raises:
        CheckpointError: it is no such file, or not all of one.
    """
    try:
        with zipfile.ZipFile(io.BufferedReader(_Window(data))) as archive:
            members = {info.filename: info for info in archive.infolist()}
            twice = len(members) != len(archive.infolist())
            heads = [name for name in members if name.partition("/")[2] == "data.pkl"]
            if len(heads) != 1 or twice:
                raise CheckpointError("not a file that torch.save writes (since torch 1.6)")
            root = heads[0].partition("/")[0]
            pickled = _bytes(data, members[heads[0]])
            order = members.get(f"{root}/byteorder")
            if order is not None and _bytes(data, order) != b"little":
                raise CheckpointError("saved on a machine of the other byte order")
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises nearly anything on malformed bytes
        raise CheckpointError(
            "not a file that torch.save writes (since torch 1.6), or not all of it "
            f"({first_line(error)})"
        ) from None

    def storage(pid: Any) -> _Storage:
        word, kind, key = pid[0], kind_of(pid[1]), pid[2]
        name = kind.rpartition(".")[2].removesuffix("Storage")
        if word != "storage" or not (name == "Untyped" or name in _STORAGES):
            raise CheckpointError(f"refers to {word!r} of {kind or pid[1]!r}")
        begin, end = _extent(data, members.get(f"{root}/data/{key}"))
        return _Storage(_STORAGES.get(name, ""), begin, end)

    return read_pickle(pickled, storage)


def _bytes(data: memoryview, info: zipfile.ZipInfo) -> bytes:
    begin, end = _extent(data, info)
    return bytes(data[begin:end])


def _extent(data: memoryview, info: zipfile.ZipInfo | None) -> tuple[int, int]:
    """Where a member's bytes lie. Raises CheckpointError."""
    if info is None:
        raise CheckpointError("the data of a storage is missing; is the file truncated?")
    head = bytes(data[info.header_offset : info.header_offset + _LOCAL])
    if len(head) != _LOCAL or head[:4] != b"PK\x03\x04" or info.compress_type or info.flag_bits & 1:
        raise CheckpointError(f"{info.filename}: not stored as torch.save does")
    begin = info.header_offset + _LOCAL + sum(head[26:30:2]) + 256 * sum(head[27:30:2])
    end = begin + info.file_size
    if end > data.nbytes:
        raise CheckpointError(f"{info.filename}: ends after the end of the file; is it truncated?")
    return begin, end


def saved_tensor(value: Any) -> SavedTensor | None:
    """A plain, dense tensor that ``read_saved`` found, or a Parameter of one; None of all else.

    Raises:
        CheckpointError: it promises more than its storage holds.
    """
    name = kind_of(value).removeprefix("torch._utils.") if isinstance(value, Record) else ""
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state") and value.args:
        return saved_tensor(value.args[0])
    if name not in ("_rebuild_tensor_v2", "_rebuild_tensor_v3"):
        return None
    try:
        storage, offset, shape, stride = value.args[:4]
        dtype = storage.dtype if name.endswith("2") else dtype_name(kind_of(value.args[6]))
        shape, stride = tuple(shape), tuple(stride)
        numbers = (offset, *shape, *stride)
        honest = len(shape) == len(stride) and all(type(n) is int and n >= 0 for n in numbers)
        size = TensorSpec("", dtype, (1,)).nbytes
        honest = honest and not (name.endswith("2") and any(value.args[6:]))  # a conjugate's view
    except (TypeError, ValueError, IndexError, KeyError, AttributeError):
        honest = False
    if not honest:
        raise CheckpointError("a tensor that torch.save does not write so")
    last = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else -1
    begin = storage.begin + offset * size
    end = begin + (last + 1) * size
    if end > storage.end:
        raise CheckpointError(
            f"a tensor of shape {list(shape)} needs more than its storage of "
            f"{storage.end - storage.begin} bytes"
        )
    if size * math.prod(shape) > storage.end - storage.begin:  # one number, repeated endlessly
        raise CheckpointError(
            f"a tensor of shape {list(shape)} uses the same stored numbers several times"
        )
    return SavedTensor(dtype, shape, stride, begin, end)
