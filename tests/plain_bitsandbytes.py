"""bitsandbytes as it computes on most CPUs, whatever this one can do.

Seen in 0.50.2: on CPUs with AVX-512, ``dequantize_4bit`` goes wrong where a row is a multiple of 16
numbers and none of the block size; with BF16 as well, four-bit layers repack their weights on the
first call, and those without a multiple of 32 rows fail. What a test says of us must not depend on
that: here bitsandbytes decodes by its own plain operator, that of any device.
"""

from __future__ import annotations

import warnings

import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.backends.utils import _get_4bit_code
from bitsandbytes.nn import modules

_LIBRARY = torch.library.Library("bitsandbytes", "IMPL")


def _dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    code = _get_4bit_code(quant_type, A.device)
    packed = A.reshape(-1).view(torch.uint8)
    return _dequantize_4bit_compute(packed, absmax.float(), code, blocksize, shape, dtype)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of every override
    _LIBRARY.impl("dequantize_4bit", _dequantize_4bit, "CPU", allow_override=True)
modules.has_avx512bf16 = lambda: False  # type: ignore[attr-defined]
