"""Codes of few bits and scales of blocks, whatever format they are of."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_tools.linalg import e2m1, noise, scaled


@pytest.mark.parametrize(
    ("nearest", "values"),
    [(e2m1.nearest_e2m1, e2m1.values()), (e2m1.nearest_e2m3, e2m1.six_bit_values())],
)
def test_the_nearest_code(nearest: Any, values: torch.Tensor) -> None:
    """Of two that are as near, the even one; what is too large becomes the largest."""
    sizes = values[: len(values) // 2]
    for low, high in itertools.pairwise(range(len(sizes))):
        middle = float(sizes[low] + sizes[high]) / 2
        even = low if low % 2 == 0 else high
        for x, wanted in ((middle - 1e-3, low), (middle, even), (middle + 1e-3, high)):
            both = torch.tensor([x, -x])
            assert nearest(both).tolist() == [wanted, len(sizes) + wanted]
    assert nearest(torch.tensor([1e30, -1e30])).tolist() == [len(sizes) - 1, len(values) - 1]


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 40),
    block=st.tuples(st.integers(1, 5), st.integers(1, 17)),
)
def test_what_codes_cost(rows: int, cols: int, block: tuple[int, int]) -> None:
    """In blocks that divide nothing, an odd number of columns, and two codes at a time."""
    noisy = torch.Generator().manual_seed(rows * cols)
    codes = torch.randint(0, 16, (rows, cols), dtype=torch.uint8, generator=noisy)
    errors = torch.rand(16, dtype=torch.float64, generator=noisy)
    down, across = scaled.block_sizes((rows, cols), block).shape
    scales = torch.rand(down, across, generator=noisy)
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:rows, :cols]
    wanted = float((errors[codes.long()] * spread.double().square()).sum())
    assert noise.codes_noise(codes, errors, scales, block) == pytest.approx(wanted, rel=1e-5)
    shifted = torch.cat([codes.flatten()[:1], codes.flatten()])[1:].view(rows, cols)
    assert noise.codes_noise(shifted, errors, scales, block) == pytest.approx(wanted, rel=1e-5)
    counts = scaled.block_sizes((rows, cols), block)
    x = torch.randn(rows, cols, generator=noisy)
    assert int(counts.sum()) == rows * cols
    padded = torch.full((down * block[0], across * block[1]), 0.0)
    padded[:rows, :cols] = x
    each = padded.view(down, block[0], across, block[1])
    assert torch.equal(scaled.absmax(x, block), each.abs().amax((1, 3)))
