"""Changes by patterns: few numbers laid out over the weight, as PEFT 0.21 does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lora_tools.errors import need
from lora_tools.linalg.changes.on import On, Tensors, places
from lora_tools.linalg.scaling import scaling

Numbers = Mapping[str, Any]


def _spread(values: torch.Tensor, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values at the places of a matrix that a seed gives."""
    order = torch.randperm(shape[0] * shape[1], generator=torch.Generator().manual_seed(seed))
    matrix = values.new_zeros(shape[0] * shape[1])
    matrix[order[: values.shape[0]]] = values
    return matrix.reshape(shape)


def fourierft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """FourierFT (arXiv 2405.03003): the real part of the inverse 2-D Fourier transform of a sparse
    spectrum. Its places are those of torch's generator."""
    spectrum = _spread(t["fourierft_spectrum"], on.shape, n["random_loc_seed"])
    delta: torch.Tensor = torch.fft.ifft2(spectrum).real
    return delta * float(n["scaling"])


def waveft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """WaveFT (arXiv 2505.12532): the inverse 2-D wavelet transform, one level, of a sparse spectrum
    in the middle of a matrix that is wider by what the filters take; or the sparse matrix itself.

    Raises:
        NotInstalled: PEFT, which has the wavelets' filters, is not there.
    """
    spectrum = t["waveft_spectrum"]
    sparse = _spread(spectrum, on.shape, n["random_loc_seed"])
    if not n["use_idwt"]:
        return sparse * float(n["scaling"])
    need("a WaveFT adapter", "waveft", "peft")
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet

    wavelet = Wavelet(n["wavelet_family"])
    more = WAVELET_REDUCTIONS[n["wavelet_family"]]
    padded = [size + extra + (size + extra) % 2 for size, extra in zip(on.shape, more, strict=True)]
    top, left = ((wide - size) // 2 for wide, size in zip(padded, on.shape, strict=True))
    whole = spectrum.new_zeros(padded)
    whole[top : top + on.shape[0], left : left + on.shape[1]] = sparse
    # PEFT takes what is fine along the columns for what is fine along the rows, and the other way.
    rows, cols = padded[0] // 2, padded[1] // 2
    bands = [[whole[:rows, :cols], whole[rows:, :cols]], [whole[:rows, cols:], whole[rows:, cols:]]]
    low, high = (torch.tensor(f, dtype=spectrum.dtype) for f in (wavelet.rec_lo, wavelet.rec_hi))
    sides = [_synthesis(torch.stack(pair), low, high) for pair in zip(*bands, strict=True)]
    result = _synthesis(torch.stack(sides).transpose(1, 2), low, high).T
    top, left = ((wide - size) // 2 for wide, size in zip(result.shape, on.shape, strict=True))
    return result[top : top + on.shape[0], left : left + on.shape[1]] * float(n["scaling"])


def _synthesis(bands: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """One level along the rows: what is coarse and what is fine (2, m, n) → (2m − taps + 2, n),
    without what lies beyond the ends."""
    filters, taps = torch.stack((low, high))[:, None], low.shape[0]  # (2, 1, taps)
    channels = bands.permute(2, 0, 1)  # (n, 2, m)
    wide = torch.nn.functional.conv_transpose1d(channels, filters, stride=2)[:, 0].T
    cut = (2 * taps - 3) // 2
    return wide[cut : wide.shape[0] - cut]


def c3a(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """C³A (arXiv 2407.19342): circulant blocks over the inputs' number; kernel (out/b, in/b, b)."""
    kernel = t["c3a_kernel"]
    rows, cols, size = kernel.shape
    around = torch.arange(size)
    # Row i, column j of a block: the kernel's entry j − i, around.
    blocks = kernel[:, :, (around[None, :] - around[:, None]) % size]
    return blocks.permute(0, 2, 1, 3).reshape(rows * size, cols * size) / (cols * size)


def shira(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """SHiRA (arXiv 2406.13175): a sparse matrix whose places the file holds; what stands twice at
    one place is summed."""
    rows, cols = places(t["shira_indices"], t["shira_weight"])
    matrix = t["shira_weight"].new_zeros(on.shape)
    return matrix.index_put_((rows, cols), t["shira_weight"], accumulate=True)


def supertuning(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """Super and Supra tuning: a sparse matrix whose places the file holds, and a LoRA beside."""
    values = t["supertuning_values"]
    at = places(t["supertuning_indices"], values)
    matrix = values.new_zeros(on.shape).reshape(-1).scatter_add_(0, at, values)
    delta = matrix.reshape(on.shape)
    if "supertuning_lora_A.weight" in t:
        A, B = t["supertuning_lora_A.weight"], t["supertuning_lora_B.weight"]
        delta = delta.addmm_(B, A, alpha=scaling(n["lora_alpha"], A.shape[0], False))
    return delta


def miss(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """MiSS (arXiv 2409.15371): one block (r, out), transposed, over and over along the inputs; the
    last time as much of it as there is room for. Of the "mini" kind the block itself repeats."""
    block = t["miss_block"]
    out, inside = on.shape
    block = block.repeat(1, out // block.shape[1])
    return block.T.repeat(1, -(-inside // block.shape[0]))[:, :inside]


def beft(t: Tensors, n: Numbers, on: On) -> torch.Tensor:
    """BEFT: a difference of the bias (out,)."""
    return t["beft_bias"].reshape(-1)
