"""Laws of the decompositions: Eckart–Young, certificates, exact low rank, fixed signs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tools.linalg import svd
from lora_tools.linalg.ranks import POLICIES, RankRule, Rounding, Spectrum
from lora_tools.linalg.ritz import missing_energy, upper_values
from lora_tools.linalg.svd import HALF_LOSS, _gram, iterates, sketched, truncated
from lora_tools.linalg.truncation import TruncatedSVD, Wanted, sum_of_squares

SHAPES = [(300, 700), (700, 300), (512, 512), (320, 2000)]


def planted(kind: str, m: int, n: int, seed: int = 0) -> torch.Tensor:
    """A float32 matrix whose spectrum is flat, a power law, or low rank with or without noise."""
    torch.manual_seed(seed)
    k = min(m, n)
    U, V = torch.linalg.qr(torch.randn(m, k))[0], torch.linalg.qr(torch.randn(n, k))[0]
    i = torch.arange(1, k + 1).float()
    noise = torch.randn(m, n) / (m**0.5 + n**0.5)
    sigma = {
        "power 0.4": i**-0.4,
        "power 0.6": i**-0.6,
        "power 1": 1 / i,
        "steep": 0.7**i,
        "steps": torch.where(i <= 20, 4.0, torch.where(i <= 60, 1.0, 0.01)),
        "one value": torch.where(i <= 40, 1.0, 0.0),
        "three values": torch.where(i <= 25, 1.0, torch.where(i <= 65, 0.9, 0.5)),
        "one value over a tail": torch.where(i <= 30, 1.0, 0.8 * i**-0.2),
        "flat": torch.zeros(k),
        "rank 16 + noise": torch.where(i <= 16, 7 - 0.3 * i, torch.zeros(k)),
    }[kind]
    if kind in ALIKE:  # exactly
        A = torch.zeros(m, n)
        A.diagonal().copy_(sigma)
        return A[torch.randperm(m)][:, torch.randperm(n)]
    A = (U * sigma) @ V.T
    return A + noise if kind in ("flat", "rank 16 + noise") else A


ALIKE = ["one value", "three values", "one value over a tail"]  # more often than a block is wide
KINDS = ["power 0.4", "power 0.6", "power 1", "steep", "steps", "flat", "rank 16 + noise", *ALIKE]


def best(A: torch.Tensor, r: int) -> float:
    """Σ_{i≤r} σ_i² by LAPACK in float64."""
    return float((torch.linalg.svdvals(A.double())[:r] ** 2).sum())


def residual(A: torch.Tensor, svd: TruncatedSVD) -> float:
    product = (svd.U.double() * svd.S) @ svd.Vh.double()
    return float((A.double() - product).square().sum())


@pytest.mark.sweep(6)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_iteration_is_within_its_tolerance_and_its_bound_holds(kind, shape):
    A = planted(kind, *shape)
    for tolerance in (1e-2, 1e-3, 1e-5):
        svd = truncated(A, RankRule("rank", 24), tolerance=tolerance)
        optimum = best(A, svd.rank)
        assert svd.captured <= optimum * (1 + 1e-6)
        assert optimum - svd.captured <= tolerance * optimum
        assert optimum - svd.captured <= svd.gain + 1e-6 * optimum
        # The Frobenius identity: what is captured and what is left make the whole.
        assert residual(A, svd) == pytest.approx(svd.total - svd.captured, abs=2e-6 * svd.total)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["power 0.4", "power 0.6", "power 1", "steps", "flat"])
def test_a_sketch_in_half_precision_keeps_the_tolerance(kind, shape):
    A = planted(kind, *shape)
    svd = sketched(
        A.bfloat16(), RankRule("rank", 16), total=sum_of_squares(A), tolerance=1e-3, noise=0, seed=0
    )
    if svd is None:
        # Nothing to hold on to, or values too alike: the exact method takes over.
        assert kind in ("flat", "steps")
        return
    V = torch.linalg.qr(svd.Vh.double().T)[0]
    captured = float((A.double() @ V).square().sum())  # what a fit to these directions holds
    optimum = best(A, 16)
    assert captured >= optimum * (1 - 1e-3)
    assert optimum - captured <= svd.gain
    assert svd.gain >= HALF_LOSS * svd.total


@pytest.mark.parametrize("shape", [(70, 500), (500, 70), (128, 128), (40, 900)], ids=str)
@pytest.mark.parametrize("kind", ["power 0.6", "steep", "flat"])
def test_exact_methods_are_optimal(kind, shape):
    A = planted(kind, *shape)
    svd = truncated(A, RankRule("rank", 12), exact=True)
    assert svd.method in ("dense", "gram")
    assert svd.captured == pytest.approx(best(A, svd.rank), rel=1e-6)
    assert torch.allclose(svd.U.T @ svd.U, torch.eye(svd.rank), atol=1e-5)
    assert torch.allclose(svd.Vh @ svd.Vh.T, torch.eye(svd.rank), atol=1e-5)


def test_what_the_gram_matrix_loses():
    """Squared in float64, singular values below 1.5e-8 of the first are lost: less than float32
    input can hold. Squared in float32, those below 3e-4 would be: that is why it is not."""
    torch.manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(100, 100).double())[0],
        torch.linalg.qr(torch.randn(300, 100).double())[0],
    )
    sigma = 10.0 ** -torch.linspace(0, 6, 100).double()
    A = ((U * sigma) @ V.T).float()
    svd = _gram(A, Wanted(RankRule("rank", 80), Spectrum(A[:0, 0], sum_of_squares(A), True)))
    true = torch.linalg.svdvals(A.double())
    assert svd.rank == 80  # σ_80 is 1.5e-5 of the first
    assert torch.allclose(svd.S, true[:80], rtol=1e-3)
    in_float32 = torch.linalg.eigvalsh(A @ A.T).flip(0).clamp(min=0).sqrt().double()
    assert not torch.allclose(in_float32[:80], true[:80], rtol=0.5)


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(300, 500), (900, 200), (30, 50)], ids=str)
def test_exact_low_rank_is_found_exactly(shape, scale):
    torch.manual_seed(1)
    A = torch.randn(shape[0], 7) @ torch.randn(7, shape[1]) * scale
    for exact in (False, True):
        svd = truncated(A, RankRule("rank", 24), exact=exact)
        assert svd.rank == 7
        assert residual(A, svd) <= (1e-6 * svd.total**0.5) ** 2 * 4
    assert truncated(A, RankRule("energy", 1.0)).rank == 7


def test_the_worked_example():
    """torch.manual_seed(0), W = randn(10, 2) @ randn(2, 10), x = randn(10)."""
    torch.manual_seed(0)
    W, x = torch.randn(10, 2) @ torch.randn(2, 10), torch.randn(10)
    svd = truncated(W, RankRule("rank", 10))
    y = torch.tensor(
        [3.3896, 1.0296, 1.5606, -2.3891, -0.4213, -2.4668, -4.4379, -0.0375, -3.2790, -2.9361]
    )
    root = svd.S.sqrt().float()
    B, A = svd.U * root, root[:, None] * svd.Vh
    assert svd.rank == 2
    assert torch.allclose(W @ x, y, atol=5e-5)
    assert torch.allclose(B @ (A @ x), y, atol=5e-5)
    assert (W.numel(), A.numel() + B.numel()) == (100, 40)


@pytest.mark.parametrize("shape", [(200, 400), (400, 200), (20, 30)], ids=str)
def test_signs_are_fixed_and_the_seed_decides_the_bits(shape):
    A = planted("power 0.6", *shape)
    rule = RankRule("rank", 8)
    one, two = truncated(A, rule), truncated(A, rule)
    assert torch.equal(one.U, two.U)
    assert torch.equal(one.Vh, two.Vh)
    peaks = one.U.gather(0, one.U.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()
    minus = truncated(-A, rule)
    assert torch.allclose(minus.U, one.U, atol=1e-4)
    assert torch.allclose(minus.Vh, -one.Vh, atol=1e-4)


def test_zero_and_tiny_matrices():
    zero = truncated(torch.zeros(5, 7), RankRule("rank", 3))
    assert (zero.rank, zero.method, zero.U.shape, zero.Vh.shape) == (0, "none", (5, 0), (0, 7))
    one = truncated(torch.full((1, 1), -2.0), RankRule("rank", 3))
    assert (one.rank, float(one.S)) == (1, 2.0)


def test_noise_is_not_kept_but_a_change_is_never_nothing():
    torch.manual_seed(0)
    A = torch.randn(200, 5) @ torch.randn(5, 300) + 1e-3 * torch.randn(200, 300)
    edge = 1e-3 * (200**0.5 + 300**0.5)
    assert truncated(A, RankRule("rank", 24), noise=1.05 * edge).rank == 5
    assert truncated(A, RankRule("rank", 24)).rank == 24
    assert truncated(A, RankRule("rank", 24), noise=1e9).rank == 1


@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40),
    share=st.floats(0.01, 1.0),
    known=st.integers(1, 40),
)
def test_energy_is_the_smallest_rank_with_that_share(values, share, known):
    squared = torch.tensor(sorted(values, reverse=True)).double()
    total = float(squared.sum())
    whole = Spectrum(squared, total, True)
    rank = POLICIES["energy"](whole, share)
    assert rank is not None
    assert float(squared[:rank].sum()) >= share * total * (1 - 1e-12)
    assert float(squared[: rank - 1].sum()) < share * total
    partial = POLICIES["energy"](Spectrum(squared[:known], total, False), share)
    assert partial == (rank if rank <= known else None)


@given(st.integers(1, 64), st.integers(1, 64), st.booleans())
def test_fixed_rank_is_a_cap(wanted, known, complete):
    spectrum = Spectrum(torch.ones(known).double(), float(known), complete)
    rank = POLICIES["rank"](spectrum, wanted)
    assert rank == (min(wanted, known) if known >= wanted or complete else None)


def test_max_rank_caps_energy():
    A = planted("power 0.4", 300, 500)
    free, capped = (truncated(A, RankRule("energy", 0.5, cap)) for cap in (None, 20))
    assert free.rank > 20
    assert capped.rank == 20
    assert free.captured >= 0.5 * free.total * (1 - 1e-3)
    assert RankRule("energy", 0.5, 20).ceiling(300, 500) == 20
    assert RankRule("rank", 400).ceiling(300, 500) == 300


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0.2, 0.5, 1.0, 2.0]))
def test_the_ritz_bound_covers_what_is_missing(seed, r, decay):
    """Against the truth, on any converged enough subspace of a random symmetric problem."""
    torch.manual_seed(seed)
    A = torch.linalg.qr(torch.randn(80, 80).double())[0] * (torch.arange(1, 81).double() ** -decay)
    H = A @ A.T
    Q = torch.linalg.qr(
        torch.cat(
            [torch.linalg.matrix_power(H, p) @ torch.randn(80, 10).double() for p in range(4)], 1
        )
    )[0]
    theta, W = torch.linalg.eigh(Q.T @ H @ Q)
    theta, W = theta.flip(0), W.flip(1)
    residuals = (H @ Q @ W - Q @ W * theta).square().sum(0)
    missing = float(torch.linalg.eigvalsh(H).flip(0)[:r].sum() - theta[:r].sum())
    assert missing <= missing_energy(theta, residuals, r) + 1e-9 * float(theta.sum())


def test_iterates_only_where_it_pays():
    assert iterates((4096, 11008), RankRule("rank", 32), exact=False)
    assert not iterates((4096, 11008), RankRule("rank", 32), exact=True)
    assert not iterates((192, 576), RankRule("rank", 32), exact=False)
    assert not iterates((64, 10**6), RankRule("rank", 1), exact=False)


# ------------------------------------------------------------------- rules that count, by iteration


def spiked(m: int, n: int, spikes: list[float], seed: int, decay: float = 0.0) -> torch.Tensor:
    """Noise of norm about √m + √n, its rows uneven by ``decay``, and directions above it."""
    noise = torch.Generator().manual_seed(seed)
    A = torch.randn(m, n, generator=noise, dtype=torch.float64)
    A *= torch.arange(1, m + 1).double()[:, None] ** -decay
    U = torch.linalg.qr(torch.randn(m, len(spikes), generator=noise, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, len(spikes), generator=noise, dtype=torch.float64)).Q
    return (A + (U * torch.tensor(spikes, dtype=torch.float64)) @ V.T).float()


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(400, 400), (320, 900), (900, 320)], ids=str)
def test_rules_that_count_decide_by_bounds_as_by_all_values(shape, decay, monkeypatch, full):
    """And mostly do so by iteration, or this shows nothing."""
    monkeypatch.setattr(svd, "_LARGE", 64)
    iterated = 0
    for seed in range(6) if full else (0, 2, 5):
        scale = 4 * sum(side**0.5 for side in shape)
        spikes = [scale / (1 + 0.4 * i) for i in range(3 * seed)]
        A = spiked(*shape, spikes, seed, decay)
        S = torch.linalg.svdvals(A.double())
        # What the noise of this matrix can be, told exactly.
        rounding = Rounding(
            float(shape[0] * shape[1]), (sum(d**0.5 for d in shape)) ** 2 / (shape[0] * shape[1])
        )
        for policy, value in (
            ("noise_floor", 0.0),
            ("ratio", 0.35),
            ("threshold", float(S[5] + S[6]) / 2),
        ):
            rule = RankRule(policy, value)
            found = truncated(A, rule, rounding=rounding, seed=seed)
            exact = truncated(A, rule, rounding=rounding, exact=True)
            assert found.rank == exact.rank, (policy, seed)
            iterated += found.method == "krylov"
            if found.method == "krylov" and found.rank:
                assert float(exact.captured - found.captured) <= found.gain + 1e-6 * exact.captured
    assert iterated > (6 if full else 3)


@pytest.mark.parametrize("seed", range(4))
def test_upper_values_are_upper_bounds(seed):
    """Of the values at the edge of a bulk, where an iteration converges slowest."""
    m, n, block, steps = 200, 500, 8, 6
    A = spiked(m, n, [400.0, 200.0, 90.0], seed).double()
    noise = torch.Generator().manual_seed(seed)
    Y = A @ torch.randn(n, block, generator=noise, dtype=torch.float64)
    basis = Y
    for _ in range(steps - 1):
        Y = torch.linalg.qr(A @ (A.T @ Y)).Q
        basis = torch.cat((basis, Y), 1)
    Q = torch.linalg.qr(basis).Q
    theta, W = torch.linalg.eigh(Q.T @ A @ A.T @ Q)
    theta, W = theta.flip(0), W.flip(1)
    R = A @ (A.T @ (Q @ W)) - (Q @ W) * theta
    upper = upper_values(theta, R.square().sum(0), steps, block, n)
    true = torch.linalg.svdvals(A).square()
    assert bool((true[:6] <= upper[:6]).all())
    assert bool((theta[:6] <= true[:6] * (1 + 1e-9)).all())
    assert float(upper[3] / true[3]) < 1.6, "and not without worth"


@pytest.mark.parametrize("policy", ["gavish_donoho", "cumulative", "energy"])
def test_all_values_first_and_then_the_directions(policy, monkeypatch):
    monkeypatch.setattr(svd, "_LARGE", 128)
    A = spiked(200, 300, [300.0, 200.0, 150.0], 1)
    for value in (0.05, 0.3, 0.9):
        rule = RankRule(policy, value)
        found = truncated(A, rule)
        exact = truncated(A, rule, exact=True)
        S = torch.linalg.svdvals(A.double())
        assert (
            found.rank
            == exact.rank
            == POLICIES[policy](Spectrum(S * S, float((S * S).sum()), True, (200, 300)), value)
        )
        assert found.captured >= float((S[: found.rank] ** 2).sum()) * (1 - 1e-3)
        rest = A.double() - (found.U.double() * found.S) @ found.Vh.double()
        assert float(rest.square().sum()) == pytest.approx(
            found.total - found.captured, rel=1e-4, abs=1e-6 * found.total
        )
