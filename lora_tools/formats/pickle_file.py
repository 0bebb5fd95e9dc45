"""A PyTorch ``.bin``/``.pt`` file with the same face as ``SafetensorsFile``.

Opened only when the user allows it, with ``weights_only=True`` (no code is run) and memory-mapped
where the file is of the zip kind.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, TensorNotFound
from lora_tools.formats.dtypes import dtype_name
from lora_tools.formats.reopen import Reopened, Stamp
from lora_tools.formats.tensors import as_bytes
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


class PickleFile(Reopened):
    """Tensors of one pickle. Raises CheckpointError where it holds anything but tensors."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        self.header = b""
        self.metadata: dict[str, str] = {}
        try:
            self.stamp = Stamp.of(path)
            try:
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # a legacy, non-zip file cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises nearly anything on a malformed file
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: cannot be read with weights_only=True ({first})"
            ) from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
        ):
            raise CheckpointError(f"{path}: holds something other than named tensors")
        self._state: dict[str, torch.Tensor] = state
        self.specs = {name: self._spec(name, tensor) for name, tensor in state.items()}

    def _spec(self, name: str, tensor: torch.Tensor) -> TensorSpec:
        import torch

        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{self.path}: tensor {name!r} is not a plain, dense one")
        try:
            spec = TensorSpec(name, dtype_name(tensor.dtype), tuple(tensor.shape))
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: tensor {name!r}: {error}") from None
        if spec.nbytes > tensor.untyped_storage().nbytes():  # one number, repeated endlessly
            raise CheckpointError(
                f"{self.path}: tensor {name!r} promises {spec.nbytes} bytes and the file holds "
                f"{tensor.untyped_storage().nbytes()}"
            )
        return spec

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor. Never write to it."""
        try:
            return self._state[name].detach()
        except KeyError:
            raise TensorNotFound(f"{self.path}: no tensor {name!r}") from None

    def raw(self, name: str) -> memoryview:
        """The tensor's bytes in row-major order; a copy where it is stored otherwise."""
        return as_bytes(self.tensor(name))

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Nothing to give back: torch owns the mapping."""
