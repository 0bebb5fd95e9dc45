"""``linalg.reversible``: the order of floats, and listings that round-trip."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lora_tools.linalg import reversible

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
HALVES = DTYPES[:2]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(INTEGERS[x.element_size()])


def floats(dtype: torch.dtype, patterns: list[int]) -> torch.Tensor:
    """Floats of those bit patterns."""
    size = dtype.itemsize
    return torch.from_numpy(np.array(patterns, f"u{size}").view(f"i{size}")).view(dtype)


def arrays(dtype: torch.dtype, count: int) -> st.SearchStrategy[torch.Tensor]:
    """Any bit patterns: denormals, infinities and NaNs among them."""
    some = st.integers(0, 2 ** (8 * dtype.itemsize) - 1)
    return st.lists(some, min_size=count, max_size=count).map(lambda p: floats(dtype, p))


@pytest.mark.parametrize("dtype", HALVES)
def test_order_of_every_half_precision_number(dtype: torch.dtype) -> None:
    everything = floats(dtype, list(range(1 << 16)))
    n = reversible.ordered(everything)
    assert n.dtype == torch.int16
    assert len(n.unique()) == 1 << 16
    assert torch.equal(bits(reversible.from_ordered(n, dtype)), bits(everything))
    numbers = ~everything.isnan()
    values, places = everything[numbers].double(), n[numbers].long()
    by_place = places.argsort()
    assert (values[by_place].diff() >= 0).all(), "the order of the floats"
    assert (places[by_place].diff() == 1).all(), "neighbours differ by one"
    zeros = values[by_place] == 0
    assert values[by_place][zeros].signbit().tolist() == [True, False], "-0.0 before 0.0"


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data())
def test_order_of_any_number(dtype: torch.dtype, data: st.DataObject) -> None:
    x = data.draw(arrays(dtype, 8))
    n = reversible.ordered(x)
    assert torch.equal(bits(reversible.from_ordered(n, dtype)), bits(x))
    for i in range(8):
        for j in range(8):
            if x[i] < x[j]:
                assert n[i] < n[j]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_a_strided_tensor(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype).T
    assert torch.equal(reversible.from_ordered(reversible.ordered(x), dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data(), rows=st.integers(1, 5), cols=st.integers(1, 9))
def test_round_trip_whatever_the_estimate(
    dtype: torch.dtype, data: st.DataObject, rows: int, cols: int
) -> None:
    """Listed elements come back bit for bit; the others are the estimate, rounded."""
    base, merged, estimate = (data.draw(arrays(dtype, rows * cols)) for _ in range(3))
    where = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(base), max_size=len(base))))
    shape = (rows, cols)
    coded = reversible.encode(base.view(shape), merged.view(shape), where)
    found = reversible.decode(estimate.view(shape), merged.view(shape), *coded)
    assert found.shape == shape
    assert found.dtype == dtype
    wanted = torch.where(where, bits(base), bits(estimate))
    assert torch.equal(bits(found).reshape(-1), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data(), slack=st.sampled_from([0.0, 1e-7, 1e-3]))
def test_what_is_not_listed_needs_no_listing(
    dtype: torch.dtype, data: st.DataObject, slack: float
) -> None:
    """Any estimate within the slack rounds to the base wherever the listing leaves it alone."""
    working = torch.float64 if dtype.itemsize >= 4 else torch.float32
    base = torch.randn(200, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    base = base.to(dtype)
    estimate = base.to(working) * (1 + 1e-3 * torch.randn(200, dtype=working))
    where = reversible.listed(base, estimate, slack)
    for shift in (-slack, -slack / 3, 0.0, slack / 3, slack):
        rounded = (estimate + shift).to(dtype)
        assert torch.equal(bits(rounded)[~where], bits(base)[~where])
    if slack == 0:
        assert torch.equal(where, bits(estimate.to(dtype)) != bits(base))


def test_the_sign_of_zero_counts() -> None:
    base = torch.tensor([0.0, -0.0], dtype=torch.float32)
    where = reversible.listed(base, torch.tensor([-0.0, 0.0], dtype=torch.float64), 0.0)
    assert where.tolist() == [True, True]


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 765])
@pytest.mark.parametrize("more", [[], [0], [255, 0, 510]])
def test_gaps(gap: int, more: list[int]) -> None:
    """Distances of exactly a byte, and of whole runs of 255."""
    at = np.cumsum(np.array([gap, *more]) + 1) - 1
    coded = reversible._encode_gaps(at)
    assert np.array_equal(reversible._decode_gaps(coded), at)
    assert len(coded) == sum(1 + g // 255 for g in (gap, *more))


@hypothesis.given(st.sets(st.integers(0, 5000)))
def test_any_positions(positions: set[int]) -> None:
    at = np.array(sorted(positions), dtype=np.int64)
    assert np.array_equal(reversible._decode_gaps(reversible._encode_gaps(at)), at)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chosen", ["none", "all", "last"])
def test_none_and_all_listed(dtype: torch.dtype, chosen: str) -> None:
    base, merged = torch.randn(3, 600).to(dtype), torch.randn(3, 600).to(dtype)
    where = torch.full((1800,), chosen == "all")
    where[-1] |= chosen == "last"
    gaps, distances = reversible.encode(base, merged, where)
    assert len(distances) == int(where.sum()) * dtype.itemsize
    if chosen == "none":
        assert gaps == b""
    found = reversible.decode(merged.double(), merged, gaps, distances).reshape(-1)
    assert torch.equal(found, torch.where(where, base.reshape(-1), merged.reshape(-1)))


@pytest.mark.parametrize("width", [2, 4, 8])
@hypothesis.given(data=st.data())
def test_byte_planes(width: int, data: st.DataObject) -> None:
    top = 2 ** (8 * width - 1)
    numbers = data.draw(st.lists(st.integers(-top, top - 1) | st.sampled_from([-top, top - 1, -1])))
    given = np.array(numbers, dtype=f"i{width}")
    planes = reversible._split_planes(given)
    assert np.array_equal(reversible._join_planes(planes, width), given)
    small = reversible._split_planes(np.array([-1, 1, 0, -2], dtype=f"i{width}"))
    assert small[4:] == bytes(4 * (width - 1)), "small distances of both signs fill one plane"
