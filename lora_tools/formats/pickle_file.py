"""A PyTorch ``.bin``/``.pt`` file with the same face as ``SafetensorsFile``.

Opened only when the user allows it, with ``weights_only=True`` (no code is run) and memory-mapped
where the file is of the zip kind and holds its tensors as they are.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, TensorNotFound, first_line
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.regular_files import open_file
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.safetensors_file import MAX_NAME
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec
from lora_tools.watch.files import Watched

if TYPE_CHECKING:
    import torch


# A compressed file is unfolded in memory: this much, or so many times its size, is no bomb.
_UNFOLDED = 1 << 30
_RATIO = 16


class PickleFile(Reopened):
    """Tensors of one pickle. Raises CheckpointError where it holds anything but tensors."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        self.header = b""
        self.metadata: dict[str, str] = {}
        try:
            self.stamp = Stamp.of(path)
            with open_file(path) as file:
                self._watched = Watched(path, file.fileno())
            members = _members(path)
            if members is not None and (compressed := _is_compressed(members)):
                _refuse_bomb(path, members, self.stamp.nbytes)
            mapped = members is not None and not compressed
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except CheckpointError:
            raise
        except Exception as error:  # torch.load raises nearly anything on a malformed file
            raise CheckpointError(
                f"{path}: cannot be read with weights_only=True ({first_line(error)})"
            ) from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
        ):
            raise CheckpointError(f"{path}: holds something other than named tensors")
        self._state: dict[str, torch.Tensor] = state
        self.specs = {name: self._spec(name, tensor) for name, tensor in state.items()}
        if mapped:
            self._guard()

    def _guard(self) -> None:
        """torch has mapped the file once, and each storage is a part of that."""
        storages = [tensor.untyped_storage() for tensor in self._state.values()]
        begin = min((each.data_ptr() for each in storages if each.nbytes()), default=0)
        end = max((each.data_ptr() + each.nbytes() for each in storages), default=0)
        self._watched.guard(self, begin, end - begin)

    def _spec(self, name: str, tensor: torch.Tensor) -> TensorSpec:
        import torch

        if len(name) > MAX_NAME:
            said = f"tensor {name[:50]!r}…: a name of {len(name):,} characters"
            raise CheckpointError(f"{self.path}: {said}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{self.path}: tensor {name!r} is not a plain, dense one")
        try:
            spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error}") from None
        if spec.nbytes > tensor.untyped_storage().nbytes():  # one number, repeated endlessly
            raise CheckpointError(
                f"{self.path}: tensor {name!r} should have {spec.nbytes} bytes, but the file holds "
                f"{tensor.untyped_storage().nbytes()}"
            )
        return spec

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it."""
        self._watched.used()
        try:
            return self._state[name].detach()
        except KeyError:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}") from None

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes in row-major order; a copy where it is stored otherwise."""
        return as_bytes(self.tensor(name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing to give back: torch owns the mapping."""


def refuse_compressed(paths: Iterable[Path]) -> None:
    """Raises CheckpointError for a compressed file among these: transformers (5.23) maps it as if
    it were none, and loads garbage."""
    for path in paths:
        members = _members(path) if path.suffix in (".bin", ".pt", ".pth") else None
        if members is not None and _is_compressed(members):
            raise CheckpointError(
                f"{path}: compressed, and transformers does not load that correctly; convert it to "
                f"safetensors first: loratools dequantize {path.parent} -o OUT --allow-pickle"
            )


def _members(path: Path) -> list[zipfile.ZipInfo] | None:
    """What is in a file of the zip kind; None of a legacy one."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # what torch goes by
            return None
        with zipfile.ZipFile(file) as archive:
            return archive.infolist()


def _is_compressed(members: list[zipfile.ZipInfo]) -> bool:
    """Whether some are. torch (2.13) maps these, too, and takes their bytes for numbers. Other
    tools than it make them: ``zip``, 7z."""
    return any(member.compress_type != zipfile.ZIP_STORED for member in members)


def _refuse_bomb(path: Path, members: list[zipfile.ZipInfo], nbytes: int) -> None:
    """Raises CheckpointError for a file that would unfold to far more than its size."""
    unfolded = sum(member.file_size for member in members)
    if unfolded > max(_UNFOLDED, _RATIO * nbytes):
        raise CheckpointError(
            f"{path}: {nbytes:,} bytes, which decompress to {unfolded:,} (at most {_UNFOLDED:,} "
            f"bytes, or {_RATIO} times the file's size, are read); unpack it, and zip it again "
            "without compression (zip -0 -r)"
        )
