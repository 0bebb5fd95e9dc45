"""Eight bits per number and a scale a row, LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), to
the bit what bitsandbytes 0.50 computes on a CPU."""

from __future__ import annotations

import torch

from lora_tools.errors import NonFiniteError
from lora_tools.linalg.runs import row_runs

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
    codes, absmax = torch.empty(x.shape, dtype=torch.int8), torch.zeros(len(x))
    for start, stop in row_runs(*x.shape) if x.numel() else ():
        half = x[start:stop].to(torch.float16)
        most = half.abs().amax(1).float()
        if not bool(torch.isfinite(most).all()):
            raise NonFiniteError(
                "a number is too large for float16, which LLM.int8() rounds to first"
            )
        scales = torch.where(most > 0, LARGEST / most, 0.0)
        codes[start:stop] = torch.round(half * scales[:, None])
        absmax[start:stop] = most
    return codes, absmax
