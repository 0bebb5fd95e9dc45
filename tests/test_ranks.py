"""Each rank policy against its definition, the noise floor on planted deltas, the budget's law."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_tools.errors import UsageError
from lora_tools.linalg import noise
from lora_tools.linalg.delta import Delta
from lora_tools.linalg.ranks import (
    POLICIES,
    SHARED,
    RankRule,
    Spectrum,
    captured,
    marchenko_pastur_median,
    uniform,
)
from lora_tools.options import Ranks
from lora_tools.options.ranks import most_factors, rank_rule

values = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30).map(
    lambda s: torch.tensor(sorted(s, reverse=True), dtype=torch.float64)
)


def whole(S: torch.Tensor, shape: tuple[int, int] = (40, 60)) -> Spectrum:
    return Spectrum(S * S, float((S * S).sum()), True, shape)


@given(values, st.floats(0.01, 0.99))
def test_error_is_the_smallest_rank_within_it(S, most):
    r = POLICIES["error"](whole(S), most)
    rest = [float((S[k:] ** 2).sum() / (S * S).sum()) ** 0.5 for k in range(len(S) + 1)]
    assert rest[r] <= most * (1 + 1e-9)
    assert r == 1 or rest[r - 1] > most * (1 - 1e-9)


@given(values, st.floats(0.01, 0.99))
def test_ratio_and_threshold_count(S, t):
    assert POLICIES["ratio"](whole(S), t) == int((t * S[0] * (1 - 1e-15) < S).sum())
    assert POLICIES["threshold"](whole(S), t * float(S[0])) == POLICIES["ratio"](whole(S), t)
    assert POLICIES["threshold"](whole(S), 2 * float(S[0])) == 0


@given(values, st.floats(0.01, 1.0))
def test_cumulative_is_a_share_of_the_sum(S, t):
    r = POLICIES["cumulative"](whole(S), t)
    assert float(S[:r].sum()) >= t * float(S.sum()) * (1 - 1e-9)
    assert r == 1 or float(S[: r - 1].sum()) < t * float(S.sum()) * (1 + 1e-9)


def kohya(S: torch.Tensor, method: str, target: float) -> int:
    """What kohya's networks/resize_lora.py computes, in its own words: definitions to test by."""
    if method == "sv_ratio":
        index = int((S[0] / target < S).sum())
    else:
        part = S**2 if method == "sv_fro" else S
        goal = target**2 if method == "sv_fro" else target
        index = int(torch.searchsorted(part.cumsum(0) / part.sum(), goal)) + 1
    return max(1, min(index, len(S) - 1))


@pytest.mark.parametrize(
    ("method", "target"),
    [("sv_fro", 0.9), ("sv_fro", 0.5), ("sv_ratio", 10), ("sv_ratio", 2), ("sv_cumulative", 0.7)],
)
def test_the_names_of_kohya_choose_what_kohya_chooses(method, target):
    S = 1.0 / torch.arange(1, 65, dtype=torch.float64) ** 0.8
    assert POLICIES[method](whole(S), target) == kohya(S, method, target)


@given(values, st.integers(1, 29))
def test_a_partial_spectrum_never_decides_wrongly(S, known):
    """A policy that answers on part of a spectrum answers the same on all of it."""
    part = Spectrum((S * S)[:known], float((S * S).sum()), len(S) <= known, (40, 60))
    for name, value in (
        ("error", 0.5),
        ("ratio", 0.3),
        ("threshold", 1.0),
        ("cumulative", 0.8),
        ("gavish_donoho", 0.0),
    ):
        answer = POLICIES[name](part, value)
        assert answer is None or answer == POLICIES[name](whole(S), value), name


def test_gavish_and_donoho():
    """The paper's own numbers: ω(1) = 2.858, and 0.56β³ − 0.95β² + 1.82β + 1.43 within 0.02."""
    from lora_tools.linalg.ranks import _omega

    assert _omega(1.0) == pytest.approx(2.858, abs=1e-3)
    for beta in (0.05, 0.3, 0.7):
        polynomial = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
        assert _omega(beta) == pytest.approx(polynomial, abs=0.03)
    torch.manual_seed(0)
    E = torch.randn(400, 800, dtype=torch.float64)
    squared = torch.linalg.svdvals(E) ** 2 / 800
    assert float(squared.median()) == pytest.approx(marchenko_pastur_median(0.5), rel=0.01)
    signal = torch.randn(400, 5).double() @ torch.randn(5, 800).double()
    assert POLICIES["gavish_donoho"](whole(torch.linalg.svdvals(E + signal), (400, 800)), 0.0) == 5


# ------------------------------------------------------------------------------------ noise floor


@pytest.mark.parametrize("shape", [(300, 300), (200, 800)], ids=str)
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_the_edge_of_unequal_variances(shape, spread):
    """Against the largest singular value of such noise, which comes up to it from below."""
    m, n = shape
    torch.manual_seed(0)
    a, b = (spread * torch.randn(m)).exp().double(), (spread * torch.randn(n)).exp().double()
    E = torch.randn(m, n).double() * a.sqrt()[:, None] * b.sqrt()
    seen = float(torch.linalg.matrix_norm(E, 2)) ** 2 / float(a.sum() * b.sum())
    assert 0.99 * seen <= noise.edge(a, b) <= 1.1 * seen
    assert noise.edge(a, b) == pytest.approx(noise.edge(7 * b, a / 3), rel=1e-4)
    if not spread:
        assert noise.edge(a, b) == pytest.approx((m**0.5 + n**0.5) ** 2 / (m * n), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_spacing_is_the_distance_to_the_next_number(dtype):
    torch.manual_seed(0)
    x = torch.cat((torch.randn(1000), torch.tensor([1.0, -1.0, 0.5, 0.0]))).to(dtype)
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.double())
    wanted = info.eps * torch.pow(2.0, (exponent - 1).double())
    wanted[x == 0] = info.tiny * info.eps
    assert torch.equal(noise.spacing(x).double(), wanted)


def spectrum_of(tuned: torch.Tensor, base: torch.Tensor) -> Spectrum:
    delta = Delta(tuned, base)
    D = torch.empty(delta.shape)
    rounding = delta.fill(D, rounding=True).rounding
    squared = torch.linalg.svdvals(D.double()) ** 2
    return Spectrum(squared, float(squared.sum()), True, delta.shape, rounding)


def low_rank(m: int, n: int, r: int, norm: float) -> torch.Tensor:
    D = torch.randn(m, r) @ torch.randn(r, n)
    return D * (norm / D.norm())


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (1024, 256)], ids=str)
def test_the_noise_floor_finds_the_planted_rank(shape, dtype, on_grid):
    torch.manual_seed(1)
    W = 0.02 * torch.randn(shape)
    base = W.to(dtype) if on_grid else W
    for size in (1e-3, 3e-3, 1e-2):
        tuned = (base.float() + low_rank(*shape, 16, size * float(W.norm()))).to(dtype)
        spectrum = spectrum_of(tuned, base)
        assert POLICIES["noise_floor"](spectrum, 0.0) == 16
        if size == 1e-3 and dtype == torch.bfloat16:
            assert POLICIES["energy"](spectrum, 0.9) > 100
            if on_grid:  # the delta is mostly zeros, and the simple edge would hide directions
                assert float((tuned == base).float().mean()) > 0.7
                edge = spectrum.rounding.energy / 2 * (shape[0] ** 0.5 + shape[1] ** 0.5) ** 2
                assert float(spectrum.squared[15]) < edge / (shape[0] * shape[1])


def test_the_noise_floor_with_rows_and_columns_of_unequal_scale():
    """Where the optimal threshold for white noise sees some fifty directions too many."""
    torch.manual_seed(1)
    W = 0.02 * torch.randn(512, 512)
    W = W * (0.4 * torch.randn(512, 1)).exp() * (0.4 * torch.randn(1, 512)).exp()
    tuned = (W + low_rank(512, 512, 16, 1e-2 * float(W.norm()))).bfloat16()
    spectrum = spectrum_of(tuned, W)
    assert POLICIES["noise_floor"](spectrum, 0.0) == 16
    assert POLICIES["gavish_donoho"](spectrum, 0.0) > 40


@pytest.mark.parametrize("kind", ["power", "flat"])
def test_the_noise_floor_cuts_no_delta_of_high_rank(kind):
    torch.manual_seed(1)
    n = 384
    W = 0.02 * torch.randn(n, n)
    i = torch.arange(1, n + 1).float()
    U, V = torch.linalg.qr(torch.randn(n, n))[0], torch.linalg.qr(torch.randn(n, n))[0]
    D = (U * (i**-0.6 if kind == "power" else torch.ones(n))) @ V.T
    D *= 0.05 * W.norm() / D.norm()
    spectrum = spectrum_of((W.bfloat16().float() + D).bfloat16(), W.bfloat16())
    r = POLICIES["noise_floor"](spectrum, 0.0)
    assert float(spectrum.squared[:r].sum()) > 0.99 * spectrum.total
    assert r > 0.7 * n
    # The tail alone, without what is known of rounding, would cut it.
    unbounded = Spectrum(
        spectrum.squared,
        spectrum.total,
        True,
        (n, n),
        type(spectrum.rounding)(math.inf, spectrum.rounding.edge),
    )
    assert POLICIES["noise_floor"](unbounded, 0.0) < r / 2


def test_nothing_but_rounding_has_rank_zero():
    torch.manual_seed(1)
    W = 0.02 * torch.randn(300, 500)
    assert POLICIES["noise_floor"](spectrum_of(W.bfloat16(), W), 0.0) == 0


# ------------------------------------------------------------------------------------------ budget


@st.composite
def modules(draw):
    shapes = draw(
        st.lists(st.tuples(st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=6)
    )
    spectra = []
    for m, n in shapes:
        S = draw(st.lists(st.floats(1e-3, 1e2), min_size=min(m, n), max_size=min(m, n)))
        S = torch.tensor(sorted(S, reverse=True), dtype=torch.float64)
        spectra.append(whole(S, (m, n)))
    return spectra, [m + n for m, n in shapes]


@settings(max_examples=100, deadline=None)
@given(modules(), st.floats(0, 1))
def test_a_budget_never_loses_to_a_uniform_rank_and_keeps_its_size(given, share):
    spectra, costs = given
    size = int(share * sum(len(s.squared) * c for s, c in zip(spectra, costs, strict=True)))
    ranks = SHARED["budget"](spectra, costs, size)
    assert sum(r * c for r, c in zip(ranks, costs, strict=True)) <= size
    same = uniform(spectra, costs, size)
    assert captured(spectra, ranks) >= captured(spectra, same)


@settings(max_examples=60, deadline=None)
@given(modules(), st.floats(0, 1))
def test_a_budget_is_within_one_item_of_the_best(given, share):
    """The fractional optimum bounds every allocation of the size."""
    spectra, costs = given
    size = int(share * sum(len(s.squared) * c for s, c in zip(spectra, costs, strict=True)))
    items = sorted(
        (
            (float(v) / c, float(v), c)
            for s, c in zip(spectra, costs, strict=True)
            for v in s.squared
        ),
        reverse=True,
    )
    best, left, last = 0.0, size, 0.0
    for _, value, cost in items:
        part = min(left / cost, 1.0)
        best, left = best + part * value, left - part * cost
        if part < 1:
            last = value
            break
    ranks = SHARED["budget"](spectra, costs, size)
    assert captured(spectra, ranks) >= (best - last) * (1 - 1e-9)


def test_a_budget_asks_for_more_where_a_spectrum_ends():
    long = torch.tensor([9.0, 8.0], dtype=torch.float64)
    spectra = [Spectrum(long, 100.0, False, (10, 10)), whole(torch.tensor([1.0]).double())]
    assert SHARED["budget"](spectra, [20, 20], 60) == [None, 1]
    assert SHARED["budget"](spectra, [20, 20], 20) == [1, 0]


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rank": 4, "energy": 0.5}, "--rank and --energy exclude"),
        ({"error": 1.0}, "--error 1: a number of at least 0 and below 1"),
        ({"ratio": -0.1}, "--ratio"),
        ({"cumulative": 0.0}, "--cumulative 0: a number above 0 and up to 1"),
        ({"threshold": math.inf}, "--threshold"),
        ({"sv_ratio": 0.5}, "--sv-ratio 0.5: a number above 1 "),
        ({"noise_floor": True, "rank": 3}, "exclude"),
        ({"energy": math.nan}, "--energy"),
    ],
)
def test_numbers_that_a_policy_does_not_know(given, says):
    with pytest.raises(UsageError, match=says):
        rank_rule(Ranks(**given))


def test_the_budget_in_bytes_and_in_numbers():
    assert most_factors("50MB") == (50_000_000, True)
    assert most_factors("1.5MiB") == (1_572_864, True)
    assert most_factors("10M") == (10_000_000, False)
    assert most_factors("2500") == (2500, False)
    for text in ("", "M", "-3MB", "10 X", "0"):
        with pytest.raises(UsageError):
            most_factors(text)


def test_a_cap_holds_whatever_the_policy_says():
    S = torch.linspace(2, 1, 30).double()
    for name, value in (("energy", 1.0), ("ratio", 0.1), ("cumulative", 1.0)):
        assert RankRule(name, value, 5)(whole(S)) == 5
