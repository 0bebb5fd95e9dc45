"""What must be remembered to undo a merge bit for bit: the elements that subtraction misses.

Let W be the base, W' the merged tensor as stored and p = inverse(W') the estimate of W in float32
or float64. Rounded to the stored dtype, p is W nearly everywhere. An element is *listed* where it
is not, or where it would not be for every p within the slack that another machine's arithmetic may
differ by; so the listing made here undoes the merge there. A listed element keeps the distance from
W' to W in units of the last place (the count of representable numbers between them), which is exact
whatever p is.

A listing is two byte strings: gaps between listed positions (bytes; 255 means 255 more), and the
distances split into byte planes, which compress well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_INT = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def ordered(x: torch.Tensor) -> torch.Tensor:
    """Floats as integers of the same size and order: neighbours differ by one."""
    bits = x.contiguous().view(_INT[x.element_size()])
    top = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ top, bits)


def from_ordered(n: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of ``ordered``."""
    top = torch.iinfo(n.dtype).max
    return torch.where(n < 0, n ^ top, n).view(dtype)


def listed(base: torch.Tensor, estimate: torch.Tensor, slack: torch.Tensor | float) -> torch.Tensor:
    """Which elements of ``base`` rounding ``estimate`` ± ``slack`` does not give back (flat)."""
    bits = base.view(_INT[base.element_size()])
    low = (estimate - slack).to(base.dtype).view(bits.dtype) != bits
    high = (estimate + slack).to(base.dtype).view(bits.dtype) != bits
    return (low | high).reshape(-1)


def encode(base: torch.Tensor, merged: torch.Tensor, where: torch.Tensor) -> tuple[bytes, bytes]:
    """Gaps and distances of the listed elements of one run."""
    at = where.nonzero().reshape(-1)
    # Wraps around on overflow, as decode does.
    distance = (ordered(base).reshape(-1)[at] - ordered(merged).reshape(-1)[at]).numpy()
    return _encode_gaps(at.numpy()), _split_planes(distance)


def decode(
    estimate: torch.Tensor, merged: torch.Tensor, gaps: bytes, distances: bytes
) -> torch.Tensor:
    """The base's run, exactly, in the dtype and shape of ``merged``."""
    result = estimate.to(merged.dtype).contiguous()
    at = torch.from_numpy(_decode_gaps(gaps))
    if at.numel():
        distance = torch.from_numpy(_join_planes(distances, merged.element_size()))
        exact = ordered(merged).reshape(-1)[at] + distance
        result.view(-1)[at] = from_ordered(exact, merged.dtype)
    return result


def _encode_gaps(at: npt.NDArray[Any]) -> bytes:
    gaps = np.diff(at, prepend=-1) - 1
    jumps = gaps // 255
    out = np.full(len(gaps) + int(jumps.sum()), 255, np.uint8)
    out[np.cumsum(jumps + 1) - 1] = gaps % 255
    return out.tobytes()


def _decode_gaps(data: bytes) -> npt.NDArray[Any]:
    raw = np.frombuffer(data, np.uint8)
    ends = raw != 255
    at: npt.NDArray[Any] = np.cumsum(raw, dtype=np.int64)[ends] + np.arange(int(ends.sum()))
    return at


def _split_planes(distance: npt.NDArray[Any]) -> bytes:
    """Byte planes, least significant first. Zigzag keeps small distances of both signs small."""
    width = distance.dtype.itemsize
    zigzag = (distance << 1) ^ (distance >> (8 * width - 1))
    return np.ascontiguousarray(zigzag.view(np.uint8).reshape(-1, width).T).tobytes()


def _join_planes(data: bytes, width: int) -> npt.NDArray[Any]:
    planes = np.frombuffer(data, np.uint8).reshape(width, -1)
    signed = np.ascontiguousarray(planes.T).view(f"<u{width}").reshape(-1)
    one = signed.dtype.type(1)
    restored = (signed >> one) ^ (~(signed & one) + one)
    distance: npt.NDArray[Any] = restored.view(f"<i{width}")
    return distance
