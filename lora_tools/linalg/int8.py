"""Eight bits a number and a scale a row, LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), to
the bit what bitsandbytes 0.50 computes on a CPU."""

from __future__ import annotations

import torch

from lora_tools.errors import NonFiniteError

LARGEST = 127
_STEP = 7.874015718698502e-3  # bitsandbytes' 1 / 127


def dequantize_rows(codes: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """``int8_vectorwise_dequant``, rounded once into ``out``.

    Args:
        codes: (rows, cols) int8.
        absmax: (rows,) float32.
        out: (rows, cols) of any float dtype.
    """
    x = out if out.dtype == torch.float32 else torch.empty(codes.shape)
    x.copy_(codes).mul_(absmax[:, None]).mul_(_STEP)
    return out if x is out else out.copy_(x)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``int8_vectorwise_quant`` of the matrix in float16, as ``Linear8bitLt`` gives it.

    Returns:
        (rows, cols) int8 codes, and (rows,) float32 the largest magnitude of each row; the codes of
        a row of zeros are 0.

    Raises:
        NonFiniteError: x holds what is no number in float16.
    """
    half = x.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise NonFiniteError("a number is too large for float16, which LLM.int8() rounds to first")
    if not half.numel():
        return half.to(torch.int8), half.new_zeros(len(half), dtype=torch.float32)
    absmax = half.abs().amax(1).float()
    scales = torch.where(absmax > 0, LARGEST / absmax, 0.0)
    return torch.round(half * scales[:, None]).to(torch.int8), absmax
