"""Tensors ↔ the bytes that stand for them in a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tools.formats.dtypes import torch_dtype
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch


def of_bytes(raw: memoryview, spec: TensorSpec) -> torch.Tensor:
    """The tensor that these bytes are, without a copy. Never write to it."""
    import torch

    dtype = torch_dtype(spec.dtype)
    if not raw.nbytes:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).view(spec.shape)


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy where it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
