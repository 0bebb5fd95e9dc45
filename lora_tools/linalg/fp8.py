"""Numbers rounded to floats of eight bits (E4M3, E5M2: arXiv 2209.05433) times scales of blocks,
and what that costs; the way back is ``linalg.scaled.times_scales``.

An inf or a NaN in a block makes its scale one: callers look at the scales.
"""

from __future__ import annotations

import torch

from lora_tools.linalg.noise import errors_by_code
from lora_tools.linalg.scaled import times_scales

_ROWS = 1 << 18  # elements at a time where a table is looked up: its index is eight bytes each


def absmax(x: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The largest magnitude of each block, (⌈rows / block[0]⌉, ⌈cols / block[1]⌉) float32; the last
    blocks of a row and of a column may be ragged.

    Args:
        x: (rows, cols) float32.
    """
    (rows, cols), (high, wide) = x.shape, block
    high, wide = min(high, max(rows, 1)), min(wide, max(cols, 1))
    across = [part.abs().amax(1) for part in torch.split(x, wide, 1)]
    lines = torch.stack(across, 1)
    return lines if high == 1 else torch.stack([b.amax(0) for b in torch.split(lines, high)])


def encode_blocks(
    x: torch.Tensor,
    block: tuple[int, int],
    codes: torch.dtype,
    scales: torch.dtype,
    powers: bool = False,
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
    scaled = times_scales(x, forward, block, torch.empty_like(x))
    return _rounded(scaled, codes), stored


def encode_divided(
    x: torch.Tensor, block: tuple[int, int], codes: torch.dtype, scales: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``encode_blocks``, as compressed-tensors 0.20 and ModelOpt round, which differs in the
    last bits: scale = absmax / largest, rounded to its dtype, and x is divided by it.

    The scale of zeros is that dtype's eps, as compressed-tensors has it.
    """
    stored = (absmax(x, block) / torch.finfo(codes).max).to(scales)
    stored = torch.where(stored == 0, torch.finfo(scales).eps, stored.float()).to(scales)
    return _rounded(_divided(x, stored.float(), block), codes), stored


def rounding_loss(
    codes: torch.Tensor, scales: torch.Tensor | None, block: tuple[int, int]
) -> float:
    """The square of the Frobenius norm that rounding to these codes is expected to have cost
    (``noise.rounding_errors``).

    Args:
        codes: (rows, cols) of an eight-bit float dtype.
        scales: (⌈rows / block[0]⌉, ⌈cols / block[1]⌉); 1 where they are not given.
    """
    table = _errors(codes.dtype)
    cols = max(codes.shape[1], 1)
    step = max(_ROWS // cols, 1)
    total = 0.0
    for first in range(0, len(codes), step):
        at = codes[first : first + step].contiguous().view(torch.uint8)
        errors = table[at.int()]
        if scales is not None:
            times_scales(errors, scales, block, errors, first)
        total += float(torch.linalg.vector_norm(errors, dtype=torch.float64)) ** 2
    return total


def _errors(dtype: torch.dtype) -> torch.Tensor:
    """(256,) float32, the root mean square of what rounding to each code costs; 0 of no number."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    return errors_by_code(values).sqrt().float()


def _rounded(x: torch.Tensor, codes: torch.dtype) -> torch.Tensor:
    """To nearest, after the largest are brought within the range: torch makes NaNs of them."""
    largest = torch.finfo(codes).max
    return x.clamp_(-largest, largest).to(codes)


def _divided(x: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    (rows, cols), (high, wide) = x.shape, block
    by = scales.repeat_interleave(high, 0)[:rows] if high < rows else scales
    by = by.repeat_interleave(wide, 1)[:, :cols] if wide < cols else by
    return x / by
