"""Numbers out of the blocks of ggml's types, by the ``gguf`` package."""

from __future__ import annotations

import numpy as np
import torch

_AT_ONCE = 1 << 22  # numbers decoded in one go


def dequantize(rows: torch.Tensor, name: str, out: torch.Tensor) -> None:
    """Fill ``out`` (n, cols) with the numbers of ``rows`` (n, bytes of a row) uint8, in float32 and
    rounded once, bit for bit as ``gguf.quants.dequantize``."""
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    step = max(1, _AT_ONCE // max(out.shape[1], 1))
    with np.errstate(all="ignore"):  # what is not finite is found by who asked
        for start in range(0, out.shape[0], step):
            piece = np.ascontiguousarray(rows[start : start + step].numpy())
            out[start : start + step] = torch.from_numpy(gguf.quants.dequantize(piece, kind))


def half_from_interleaved(first: int, stop: int, rows: int, heads: int) -> torch.Tensor:
    """Where rows [first, stop) of a weight, whose rotary heads are two halves each, stand among
    ``rows`` that alternate between the halves."""
    half = rows // heads // 2
    wanted = torch.arange(first, stop)
    head, place = wanted // (2 * half), wanted % (2 * half)
    return head * 2 * half + place % half * 2 + place // half
