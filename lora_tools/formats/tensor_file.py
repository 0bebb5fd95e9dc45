"""The protocol of a file of named tensors, and how such files are called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

# Of files of weights, whether they are read or not.
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".distcp",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".ot",
    ".onnx_data",
    ".tflite",
    ".mlmodel",
)


class TensorFile(Protocol):
    """What a checkpoint asks of one of its files."""

    path: Path
    header: bytes
    metadata: dict[str, str]
    specs: dict[str, TensorSpec]

    def tensor(self, name: str) -> torch.Tensor: ...
    def raw(self, name: str) -> memoryview: ...
    def release(self, name: str, start: int = 0, stop: int | None = None) -> None: ...
