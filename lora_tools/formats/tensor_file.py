"""The protocol of a file of named tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


class TensorFile(Protocol):
    """What a checkpoint asks of one of its files."""

    path: Path
    header: bytes
    metadata: dict[str, str]
    specs: dict[str, TensorSpec]

    def tensor(self, name: str) -> torch.Tensor: ...
    def raw(self, name: str) -> memoryview: ...
    def release(self, name: str, start: int = 0, stop: int | None = None) -> None: ...
