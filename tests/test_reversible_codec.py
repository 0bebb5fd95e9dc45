"""``linalg.reversible``: the order of floats, and listings that round-trip."""

from __future__ import annotations

import hashlib
import itertools
import weakref
from collections.abc import Iterator

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


def ordered(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reversible.turned(bits(x).numpy()))


def from_ordered(n: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(reversible.turned(n.numpy())).view(dtype)


def floats(dtype: torch.dtype, patterns: list[int]) -> torch.Tensor:
    """Floats of those bit patterns."""
    size = dtype.itemsize
    return torch.from_numpy(np.array(patterns, f"u{size}").view(f"i{size}")).view(dtype)


def _encoded(
    base: torch.Tensor, merged: torch.Tensor, estimate: torch.Tensor, slack: torch.Tensor
) -> reversible.Coded:
    return reversible.encode([reversible.Rows(base, merged, estimate, slack)])


def arrays(dtype: torch.dtype, count: int) -> st.SearchStrategy[torch.Tensor]:
    """Any bit patterns: denormals, infinities and NaNs among them."""
    some = st.integers(0, 2 ** (8 * dtype.itemsize) - 1)
    return st.lists(some, min_size=count, max_size=count).map(lambda p: floats(dtype, p))


@pytest.mark.parametrize("dtype", HALVES)
def test_order_of_every_half_precision_number(dtype: torch.dtype) -> None:
    everything = floats(dtype, list(range(1 << 16)))
    n = ordered(everything)
    assert n.dtype == torch.int16
    assert len(n.unique()) == 1 << 16
    assert torch.equal(bits(from_ordered(n, dtype)), bits(everything))
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
    n = ordered(x)
    assert torch.equal(bits(from_ordered(n, dtype)), bits(x))
    for i in range(8):
        for j in range(8):
            if x[i] < x[j]:
                assert n[i] < n[j]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_of_a_strided_tensor(dtype: torch.dtype) -> None:
    x = torch.randn(5, 7).to(dtype).T
    assert torch.equal(from_ordered(ordered(x), dtype), x)


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(data=st.data(), rows=st.integers(1, 5), cols=st.integers(1, 9))
def test_round_trip_whatever_the_numbers(
    dtype: torch.dtype, data: st.DataObject, rows: int, cols: int
) -> None:
    """Every bit comes back, of NaNs too, however far off the estimate is."""
    base, merged = (data.draw(arrays(dtype, rows * cols)).view(rows, cols) for _ in range(2))
    estimate = data.draw(arrays(dtype, rows * cols)).double().view(rows, cols)
    slack = torch.full_like(estimate, data.draw(st.sampled_from([0.0, 1e-9, 1.0])))
    coded = _encoded(base, merged, estimate, slack)
    found = reversible.decode([estimate], merged, coded)
    assert found.shape == (rows, cols)
    assert found.dtype == dtype
    assert torch.equal(bits(found), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(
    seed=st.integers(0, 99),
    change=st.sampled_from([0.0, 1e-3, 0.2, 3.0, 1e4]),
    off=st.sampled_from([0.0, 0.01, 0.6, 3.0, 40.0]),
    slack=st.sampled_from([0.0, 1e-12, 1e-7, 1e-3]),
)
def test_any_estimate_within_the_slack_will_do(
    dtype: torch.dtype, seed: int, change: float, off: float, slack: float
) -> None:
    """Numbers of all sizes, subnormal ones and zeros too, merged with errors of so many units."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> torch.Tensor:
        return torch.randn(300, generator=generator, dtype=torch.float64)

    info = torch.finfo(dtype)
    base = (0.1 * drawn() * 10 ** (3 * drawn()).clamp(-30, 2)).to(dtype)
    base[:20], base[20:23] = (info.smallest_normal * drawn()[:20]).to(dtype), 0.0
    base[23:26] = -0.0
    delta = change * 0.1 * drawn()
    exact = (base.double() + delta).to(dtype)
    merged = (exact.double() * (1 + off * info.eps * drawn())).to(dtype)
    estimate = merged.double() - delta
    coded = _encoded(base, merged, estimate, torch.full_like(estimate, slack))
    for shift in (-slack, -slack / 3, 0.0, slack / 7, slack):
        found = reversible.decode([estimate + shift], merged, coded)
        assert torch.equal(bits(found), bits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.given(
    seed=st.integers(0, 99),
    cuts=st.sets(st.integers(1, 39)),
    change=st.sampled_from([0.01, 1.0, 50.0]),
    slack=st.sampled_from([0.0, 1e-12, 1e-3]),
)
def test_in_which_pieces_rows_come_does_not_matter(
    dtype: torch.dtype, seed: int, cuts: set[int], change: float, slack: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(40, 50, generator=generator).to(dtype)
    delta = change * torch.randn(40, 50, generator=generator, dtype=torch.float64)
    merged = (base.double() + delta).to(dtype)
    estimate = merged.double() - delta
    whole = reversible.Rows(base, merged, estimate, torch.full_like(estimate, slack))
    pieces = zip(*(x.tensor_split(sorted(cuts)) for x in whole), strict=True)
    assert reversible.encode(itertools.starmap(reversible.Rows, pieces)) == _encoded(*whole)


@pytest.mark.parametrize(
    ("dtype", "sha256"),
    [
        (torch.bfloat16, "28e0b7822b31eb55"),
        (torch.float16, "e708cd11c20effb8"),
        (torch.float32, "3b1857ec8fd3e3cb"),
        (torch.float64, "f1abd5580395dc41"),
    ],
)
def test_the_bytes_of_sidecars_made_so_far(dtype: torch.dtype, sha256: str) -> None:
    """Recorded of version 2 as it was when a run was coded in one piece."""
    n = torch.arange(6000, dtype=torch.float64).view(60, 100)
    base = ((n * 37 % 1009 - 504) / 64).to(dtype)
    delta = (n * 101 % 2003 - 1001) / 256
    merged = (base.double() + delta).to(dtype)
    merged[::7, ::5] *= 1.0625
    estimate, slack = merged.double() - delta, merged.double().abs() * 2**-40
    slack[3] = 1
    whole = reversible.Rows(base, merged, estimate, slack)
    pieces = zip(*(x.split(11) for x in whole), strict=True)
    coded = reversible.encode(itertools.starmap(reversible.Rows, pieces))
    assert hashlib.sha256(b"".join(coded)).hexdigest().startswith(sha256)


def test_what_is_wide_is_held_of_one_piece_at_a_time() -> None:
    """Estimate and slack take four times the room of what is merged, or more."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def pieces() -> Iterator[reversible.Rows]:
        nonlocal most
        for _ in range(6):
            base, merged = torch.randn(2, 4, 8).bfloat16()
            wide = [torch.randn(4, 8, dtype=torch.float64) for _ in range(2)]
            alive.update(wide)
            most = max(most, len(alive))
            yield reversible.Rows(base, merged, *wide)

    reversible.encode(pieces())
    assert most <= 4, "those of the piece before are let go once the next one is there"


def test_the_sign_of_zero_counts() -> None:
    base = torch.tensor([0.0, -0.0, 0.0, -0.0], dtype=torch.float32)
    estimate = torch.tensor([-0.0, 0.0, 0.0, -0.0], dtype=torch.float64)
    coded = _encoded(base, base, estimate, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(bits(reversible.decode([estimate], base, coded)), bits(base))


def test_ranks_are_a_count_of_nearer_numbers() -> None:
    off = np.arange(-9, 10)
    for up in (True, False):
        side = np.full(19, up)
        rank = reversible._rank(off, side)
        assert sorted(rank) == list(range(19))
        assert np.array_equal(reversible._off(rank, side), off)
        towards = 1 if up else -1
        assert np.array_equal(off[np.argsort(rank)][:4], np.array([0, 1, -1, 2]) * towards)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_exponent_is_that_of_the_unit_in_the_last_place(dtype: torch.dtype) -> None:
    x = floats(dtype, list(range(1 << 16)))
    x = x[x.isfinite() & (x.abs() < torch.finfo(dtype).max)]
    n = ordered(x.abs())
    unit = from_ordered(n + 1, dtype).double() - x.abs().double()
    found = reversible._exponent(reversible._bits(x), dtype)
    smallest = unit.min().log2()
    assert torch.equal(torch.from_numpy(found).double() - 1, unit.log2() - smallest)


def test_what_is_kept_is_what_rounding_left_open() -> None:
    """Nothing where the unit of the merged number is the base's; k bits where it is 2ᵏ times."""
    base = torch.tensor([1.0, 1.0078125, -1.0, 3.0], dtype=torch.bfloat16)
    merged = torch.tensor([1.5, 2.0, -6.0, 5.0], dtype=torch.bfloat16)
    exact = torch.zeros(4, dtype=torch.float64)
    k = reversible._open_bits(reversible._bits(base), reversible._bits(merged), base.dtype)
    assert k.tolist() == [0, 1, 2, 1]
    estimate = base.double() + torch.tensor([0.001, 0.005, -0.01, 0.0])
    coded = _encoded(base, merged, estimate, exact)
    assert coded.gaps == b""
    assert coded.excess == b""
    assert len(coded.within) == 2, "three bits of the lowest and one of the next, in two planes"
    assert torch.equal(reversible.decode([estimate], merged, coded), base)


@pytest.mark.parametrize(
    "change",
    [
        {"within": b""},
        {"within": bytes(3)},
        {"excess": bytes(5)},
        {"gaps": b"\x05", "distances": bytes(2)},
        {"gaps": b"\x01"},
    ],
)
def test_what_is_not_of_the_run_is_refused(change: dict[str, bytes]) -> None:
    base = torch.tensor([1.0, 1.0078125, -1.0, 3.0], dtype=torch.bfloat16)
    merged = torch.tensor([1.5, 2.0, -6.0, 5.0], dtype=torch.bfloat16)
    coded = _encoded(base, merged, base.double(), torch.zeros(4, dtype=torch.float64))
    changed = coded._replace(excess=bytes(1))._replace(**change)
    with pytest.raises(ValueError, match=r"bytes of|a listing that is not of 4 elements"):
        reversible.decode([base.double()], merged, changed)


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
def test_all_listed(dtype: torch.dtype) -> None:
    """An estimate that says nothing: every element keeps its distance from the merged one."""
    base, merged = torch.randn(3, 600).to(dtype), torch.randn(3, 600).to(dtype)
    nothing, slack = torch.zeros(3, 600, dtype=torch.float64), torch.full((3, 600), 9.0).double()
    coded = _encoded(base, merged, nothing, slack)
    assert len(coded.distances) == 1800 * dtype.itemsize
    assert coded.excess == coded.within == b""
    assert torch.equal(reversible.decode([nothing], merged, coded), base)


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
