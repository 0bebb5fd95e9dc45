"""A pytest plugin: bitsandbytes' four-bit functions with our kernels in place of its CPU ones.

    PYTHONPATH=tests pytest -p bitsandbytes_kernels PATH/TO/bitsandbytes/tests -k "4bit and cpu"

The wheel ships no tests; they lie in bitsandbytes' repository. Loading the plugin replaces the
operators ``quantize_4bit`` and ``dequantize_4bit`` for tensors on the CPU.
"""

from __future__ import annotations

import math

import bitsandbytes  # noqa: F401 - defines the operators
import torch

from lora_tools.linalg import codebooks, nf4

CALLS = {"quantize": 0, "dequantize": 0}
_LIBRARY = torch.library.Library("bitsandbytes", "IMPL")


def quantize_4bit(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator of that name."""
    CALLS["quantize"] += 1
    packed, absmax = nf4.quantize(A.reshape(-1), codebooks.CODEBOOKS[quant_type], blocksize)
    return torch.from_numpy(packed).view(quant_storage)[:, None], torch.from_numpy(absmax)


def dequantize_4bit(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: list[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The operator of that name."""
    CALLS["dequantize"] += 1
    packed = A.reshape(-1).view(torch.uint8).numpy()
    out = torch.empty(math.prod(shape), dtype=dtype)
    book = codebooks.CODEBOOKS[quant_type]
    return nf4.dequantize(packed, absmax.float().numpy(), book, blocksize, out).reshape(shape)


_LIBRARY.impl("quantize_4bit", quantize_4bit, "CPU", allow_override=True)
_LIBRARY.impl("dequantize_4bit", dequantize_4bit, "CPU", allow_override=True)


def pytest_terminal_summary(terminalreporter: object) -> None:
    """Say how often our kernels ran: none at all would show nothing."""
    terminalreporter.write_line(f"our kernels: {CALLS}")  # type: ignore[attr-defined]
