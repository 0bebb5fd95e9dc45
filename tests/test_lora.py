"""Factors and deltas: the error that is reported is that of what was written."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_tools.engine import threads
from lora_tools.engine.buffers import Buffers
from lora_tools.engine.tasks import Call
from lora_tools.engine.threads import run
from lora_tools.errors import UsageError
from lora_tools.linalg.delta import Delta
from lora_tools.linalg.lora import (
    Whole,
    balanced_factors,
    difference_energy,
    residual_energy,
    resize,
)
from lora_tools.linalg.ranks import RankRule
from lora_tools.linalg.runs import rows_per_run
from lora_tools.linalg.scaling import scaling
from lora_tools.linalg.svd import truncated
from tests.test_svd import planted

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@given(st.floats(0.1, 512), st.integers(1, 512))
def test_scaling(alpha, r):
    assert scaling(alpha, r, False) == alpha / r
    assert scaling(alpha, r, True) == pytest.approx(alpha / math.sqrt(r))


@pytest.mark.parametrize("scale", [1.0, 0.25, 7.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["power 0.6", "flat", "steep"])
def test_the_error_is_that_of_the_rounded_factors(kind, dtype, scale):
    A = planted(kind, 200, 330) * 0.01
    svd = truncated(A, RankRule("rank", 16))
    left, right, fit = balanced_factors(svd, Whole(A), scale, dtype)
    assert left.dtype == right.dtype == dtype
    written = scale * left.double() @ right.double()
    true = float((A.double() - written).square().sum())
    assert fit.error == pytest.approx(true, rel=1e-3, abs=1e-13 * svd.total)
    assert fit.captured >= svd.captured * (1 - 1e-5)  # the fit never loses


def test_the_fit_undoes_what_rounding_one_factor_cost():
    A = planted("power 1", 300, 400)
    svd = truncated(A, RankRule("rank", 32), exact=True)
    root = svd.S.sqrt().float()
    naive = (svd.U * root).bfloat16().double() @ (root[:, None] * svd.Vh).bfloat16().double()
    _, _, fit = balanced_factors(svd, Whole(A), 1.0, torch.bfloat16)
    assert fit.error < float((A.double() - naive).square().sum())


def test_residual_energy_by_runs():
    torch.manual_seed(0)
    A, left, right = torch.randn(50, 60_000), torch.randn(50, 3), torch.randn(3, 60_000)
    assert rows_per_run(A.shape) < 50
    true = float((A.double() - 0.5 * left.double() @ right.double()).square().sum())
    assert residual_energy(Whole(A), left, right, 0.5) == pytest.approx(true, rel=1e-6)


@given(st.integers(1, 9), st.integers(1, 30), st.integers(1, 30), st.integers(0, 999))
def test_resize_is_an_exact_svd_of_the_product(r, rows, cols, seed):
    torch.manual_seed(seed)
    left, right = torch.randn(rows, r), torch.randn(r, cols)
    U, S, Vh = resize(left, right)
    product = left.double() @ right.double()
    assert torch.allclose((U * S) @ Vh, product, atol=1e-10)
    assert len(S) == U.shape[1] == Vh.shape[0]
    k = min(r, rows, cols)
    assert torch.allclose(S[:k], torch.linalg.svdvals(product)[:k], atol=1e-10)


def test_difference_energy_without_the_products():
    torch.manual_seed(0)
    one = torch.randn(40, 5), torch.randn(5, 30), 0.5
    other = torch.randn(40, 3), torch.randn(3, 30), -2.0
    dense = [s * left.double() @ right.double() for left, right, s in (one, other)]
    true = float((dense[0] - dense[1]).square().sum())
    assert difference_energy(one, other) == pytest.approx(true, rel=1e-12)
    assert difference_energy(one, one) == pytest.approx(0, abs=1e-20)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("base", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("tuned", [*DTYPES, torch.float64], ids=str)
def test_delta_subtracts_in_float32_or_better(tuned, base):
    torch.manual_seed(0)
    W = torch.randn(70, 40_000)
    a, b = (W + 0.01 * torch.randn_like(W)).to(tuned), W.to(base)
    seen = []
    delta = Delta(a, b, lambda start, stop: seen.append((start, stop)))
    exact = a.double() - b.double()
    out = torch.empty(delta.shape, dtype=delta.dtype)
    energies = delta.fill(out)
    assert delta.dtype == (torch.float64 if torch.float64 in (tuned, base) else torch.float32)
    assert torch.allclose(out.double(), exact, atol=1e-7)
    assert energies.delta == pytest.approx(float(exact.square().sum()), rel=1e-5)
    assert energies.base == pytest.approx(float(b.double().square().sum()), rel=1e-5)
    assert seen[0][0] == 0
    assert seen[-1][1] == 70
    assert len(seen) > 1
    half = torch.empty(delta.shape, dtype=torch.bfloat16)
    assert delta.fill(half) == energies  # measured before rounding
    assert (energies.noise > 0) == ({tuned, base} <= {torch.float32, torch.float64})


def test_the_noise_edge_lies_just_above_the_rounding_of_a_float32_merge():
    torch.manual_seed(0)
    W = torch.randn(300, 500)
    planted_delta = 1e-2 * torch.randn(300, 4).double() @ torch.randn(4, 500).double()
    merged = (W.double() + planted_delta).float()
    out = torch.empty(300, 500)
    energies = Delta(merged, W).fill(out)
    S = torch.linalg.svdvals(out.double())
    assert S[4] < energies.noise < 3 * S[4]
    assert truncated(out, RankRule("rank", 32), noise=energies.noise).rank == 4


def tasks(work, items):
    """A task for each number, which takes as many bytes."""
    return [Call(work, (i,), str(i), i) for i in items]


def test_the_engine_keeps_order_and_stops_at_the_first_error():
    squares = tasks(lambda i, power: i**power, range(50))
    seen = []
    assert list(run(squares, (2,), None, jobs=3, progress=seen.append)) == [
        i * i for i in range(50)
    ]
    assert [p.label for p in seen] == [str(i) for i in range(50)]
    assert seen[-1].done == seen[-1].total
    done = []

    def work(i):
        if i == 3:
            raise ValueError("three")
        done.append(i)

    with pytest.raises(ValueError, match="three"):
        list(run(tasks(work, range(1000)), (), None, jobs=2))
    assert len(done) < 100
    with pytest.raises(UsageError, match="--jobs"):
        list(run(tasks(work, [1]), (), None, jobs=0))


@pytest.mark.parametrize(("free", "at_most"), [(400, 125), (10_000, 400)])
def test_the_engine_keeps_large_items_apart_where_memory_is_short(monkeypatch, free, at_most):
    monkeypatch.setattr(threads, "free_memory", lambda: free)
    inside, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(4 if at_most == 400 else 1)

    def work(size):
        nonlocal inside, most
        with lock:
            inside += size
            most = max(most, inside)
        together.wait(60)
        threading.Event().wait(0.002)
        with lock:
            inside -= size

    list(run(tasks(work, [100, 100, 100, 100, 10, 20, 5, 15]), (), None, jobs=4))
    assert most <= at_most
    assert most >= 100 * together.parties


def test_buffers_are_used_again():
    buffers = Buffers()
    with buffers.lend((4, 5), torch.float32) as first:
        assert first.shape == (4, 5)
        address = first.data_ptr()
    with buffers.lend((10,), torch.bfloat16) as second:
        assert second.data_ptr() == address
        with buffers.lend((3,), torch.float32) as third:
            assert third.data_ptr() != address
