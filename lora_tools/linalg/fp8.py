"""Numbers rounded to floats of eight bits (E4M3, E5M2: arXiv 2209.05433) times scales of blocks,
and what that costs; the way back is ``linalg.scaled.times_scales``.

An inf or a NaN in a block makes its scale one: callers look at the scales.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lora_tools.linalg.noise import codes_noise, errors_by_code
from lora_tools.linalg.runs import row_runs
from lora_tools.linalg.scaled import absmax, by_blocks


def encode_blocks(
    x: torch.Tensor,
    block: tuple[int, int],
    codes: torch.dtype,
    scales: torch.dtype,
    powers: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x in eight bits with a scale for each block, as transformers 5.23 makes them
    (``integrations.finegrained_fp8.Fp8Quantize``) where blocks divide x; a ragged last block is one
    by itself, as in DeepSeek-V3's own ``weight_dequant``, and numbers near 1e-38 stay finite.

    A block's numbers are multiplied by largest / absmax, and 1 / (largest / absmax) is stored,
    rounded up to a power of two where ``powers``, and to nearest in other dtypes than float32; the
    numbers are then divided by what is stored. A block of zeros has the scale 1.

    Args:
        x: (rows, cols) float32.
        codes: an eight-bit float dtype.
        scales: the dtype of the scales; ``float8_e8m0fnu`` holds powers of two only.
        out: takes the codes, if it is given.

    Returns:
        The codes (rows, cols), and the scales (⌈rows / block[0]⌉, ⌈cols / block[1]⌉); W is their
        product.
    """
    most = absmax(x, block)
    forward = (torch.finfo(codes).max / most).clamp_(max=torch.finfo(torch.float32).max)
    forward = torch.where(most == 0, 1.0, forward)
    stored = 1.0 / forward
    if powers or scales == torch.float8_e8m0fnu:
        tiny = torch.finfo(torch.float32).tiny
        stored = torch.pow(2.0, torch.ceil(torch.log2(stored.clamp(min=tiny))))
    if powers or scales != torch.float32:
        stored = stored.to(scales)
        forward = 1.0 / stored.float()
    return _rounded(torch.mul, x, forward, block, codes, out), stored


def encode_divided(
    x: torch.Tensor,
    block: tuple[int, int],
    codes: torch.dtype,
    scales: torch.dtype,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``encode_blocks``, as compressed-tensors 0.20 and ModelOpt round, which differs in the
    last bits: scale = absmax / largest, rounded to its dtype, and x is divided by it.

    The scale of zeros is that dtype's eps, as compressed-tensors has it.
    """
    stored = (absmax(x, block) / torch.finfo(codes).max).to(scales)
    stored = torch.where(stored == 0, torch.finfo(scales).eps, stored.float()).to(scales)
    return _rounded(torch.div, x, stored, block, codes, out), stored


def rounding_loss(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> float:
    """``noise.codes_noise`` of eight-bit floats.

    Args:
        codes: (rows, cols) of such a dtype.
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉).
    """
    values = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return codes_noise(codes.view(torch.uint8), errors_by_code(values), scales, block)


def _rounded(
    operate: Callable[..., torch.Tensor],
    x: torch.Tensor,
    scales: torch.Tensor,
    block: tuple[int, int],
    codes: torch.dtype,
    rounded: torch.Tensor | None = None,
) -> torch.Tensor:
    """x times or by its scales, to nearest. The largest are brought within the range before: torch
    makes NaNs of them."""
    largest = torch.finfo(codes).max
    rounded = torch.empty(x.shape, dtype=codes) if rounded is None else rounded
    for start, stop in row_runs(*x.shape):
        run = x[start:stop]
        scaled = by_blocks(operate, run, scales, block, start, torch.empty_like(run))
        rounded[start:stop] = scaled.clamp_(-largest, largest)
    return rounded
