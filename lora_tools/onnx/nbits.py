"""What ONNX Runtime's MatMulNBits stores of a weight (N, K): whole numbers in blocks along a row,
a scale and a zero point for each; of four bits the even one is in the low half of a byte. The
numbers as they are read, and with rounding errors fed forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lora_tools.linalg import scaled_feedback
from lora_tools.linalg.error_feedback import Errors, Factor

FactorOf = Callable[[str, int], Factor | None]


def unpacked(parts: Sequence[Any], bits: int, rows: int, block: int) -> tuple[Any, Any, Any]:
    """Codes (rows, blocks · block) uint8, scales and zero points (rows, blocks) float32."""
    codes, scales, zeros = parts
    scales = scales.reshape(rows, -1)
    codes, zeros = codes.reshape(rows, -1), zeros.reshape(rows, -1)
    if bits == 4:
        codes, zeros = (
            np.stack((each & 15, each >> 4), -1).reshape(rows, -1) for each in (codes, zeros)
        )
    blocks = scales.shape[1]
    return codes[:, : blocks * block], scales, zeros[:, :blocks].astype(np.float32)


def values(parts: Sequence[Any], bits: int, rows: int, cols: int, block: int) -> Any:
    """(rows, cols) float32: scale · (q − zero point)."""
    codes, scales, zeros = unpacked(parts, bits, rows, block)
    whole = codes.astype(np.float32).reshape(*scales.shape, block)
    whole = (whole - zeros[:, :, None]) * scales[:, :, None]
    return np.ascontiguousarray(whole.reshape(rows, -1)[:, :cols])


def feed(W: Any, parts: Sequence[Any], bits: int, block: int, by: Factor) -> tuple[Any, Errors]:
    """Codes of W, as they are stored, whose errors make up for one another where that lessens the
    error of the layer's outputs; else those that are there.

    Args:
        W: (N, K) float32.
        parts: what ONNX Runtime's quantizer made of it, whose scales and zero points stay.
    """
    rows, cols = W.shape
    codes, scales, zeros = unpacked(parts, bits, rows, block)
    steps = torch.arange(1 << bits, dtype=torch.float32)
    grid = scaled_feedback.Grid(
        steps, torch.from_numpy(scales), (1, block), torch.from_numpy(zeros)
    )
    back = torch.from_numpy(values(parts, bits, rows, cols, block))
    out = torch.empty(rows, cols)
    errors = scaled_feedback.feed(torch.from_numpy(W), back, grid, by, out)
    if errors.fed >= errors.plain:
        return parts[0], errors.unfed()
    made = codes.copy()  # what fills the last block stays
    made[:, :cols] = out.numpy()
    if bits == 4:
        made = made[:, ::2] | made[:, 1::2] << 4
    return made, errors
