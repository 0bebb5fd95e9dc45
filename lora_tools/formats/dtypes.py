"""safetensors' dtype names ↔ torch's dtypes, and the names people type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.records import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_ALIASES = {
    "bf16": "BF16", "bfloat16": "BF16", "fp16": "F16", "float16": "F16", "half": "F16",
    "f16": "F16", "fp32": "F32", "float32": "F32", "f32": "F32", "fp64": "F64", "float64": "F64",
    "f64": "F64",
}  # fmt: skip
FLOAT_NAMES = ("bfloat16", "float16", "float32", "float64")


def parse_float_dtype(name: str) -> str:
    """``bfloat16``, ``bf16``, ``float32``… → safetensors' name. Raises UsageError."""
    dtype = _ALIASES.get(name.lower().removeprefix("torch."))
    if dtype is None:
        raise UsageError(f"dtype {name!r} is not one of {', '.join(FLOAT_NAMES)}")
    return dtype


def torch_name(dtype: str) -> str:
    """``bf16`` → ``bfloat16``, as configs spell it. Raises UsageError."""
    wanted = parse_float_dtype(dtype)
    return next(name for name in FLOAT_NAMES if parse_float_dtype(name) == wanted)


def torch_dtype(name: str) -> torch.dtype:
    """safetensors' name → torch dtype. Raises CheckpointError where this torch has none."""
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"this version of torch has no dtype for {name!r}")
    return dtype


def dtype_name(dtype: torch.dtype | str) -> str:
    """torch dtype, or its dotted name → safetensors' name. Raises CheckpointError."""
    wanted = str(dtype).removeprefix("torch.")
    for name, own in _TORCH_NAMES.items():
        if own == wanted:
            return name
    raise CheckpointError(f"safetensors has no name for {dtype}")


def widest(*names: str) -> str:
    """The float dtype with the most precision among the given ones."""
    return max(names, key=FLOAT_DTYPES.index)
