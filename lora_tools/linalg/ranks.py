"""Rank policies: how many singular directions to keep, one row each in one table.

A policy sees the leading squared singular values known so far and the whole energy ‖Δ‖²_F, which
is known exactly before any factorisation. It answers with a rank, or None where the values known
so far do not decide it yet and the decomposition must look deeper. A shared policy sees the spectra
of all modules and answers for each.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_tools.linalg.allocation import allocate

if TYPE_CHECKING:
    import torch

_TRACY_WIDOM = 3.2724  # the 99.9 % quantile of the Tracy–Widom law of order 1


@dataclasses.dataclass(frozen=True)
class Rounding:
    """What rounding to the stored dtypes can have put into Δ, as a random matrix E.

    Attributes:
        energy: the most it can be, E‖E‖²_F = Σ (ulp_tuned² + ulp_base²) / 12.
        edge: ‖E‖²_2 / ‖E‖²_F of such a matrix, see ``noise.edge``.
    """

    energy: float
    edge: float


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Leading squared singular values, descending (float64), of a matrix.

    ``total`` is ‖Δ‖²_F; ``complete`` says that no further value stands above rounding. ``shape``
    is that of the matrix, and ``rounding`` what its storage can have added to it; policies that
    need them say so.
    """

    squared: torch.Tensor
    total: float
    complete: bool
    shape: tuple[int, int] = (0, 0)
    rounding: Rounding | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """One way to choose a rank.

    Attributes:
        choose: from a spectrum and the policy's number to a rank, or None: look deeper.
        lowest, highest: what the number may be; ``open_low`` and ``open_high`` exclude the limit.
        whole: judges noise itself, on the spectrum as it is: none of it is left out beforehand.
        counts: says how many values stand above some level, and never fewer for larger values: so
            bounds of the leading values from below and from above that give the same rank decide
            it. A ``whole`` one that does not count needs every value.
    """

    choose: Callable[[Spectrum, float], int | None]
    lowest: float = 0.0
    highest: float = 1.0
    open_low: bool = True
    open_high: bool = False
    whole: bool = False
    counts: bool = False

    def __call__(self, spectrum: Spectrum, value: float) -> int | None:
        """The rank, or None where more of the spectrum must be known."""
        return self.choose(spectrum, value)

    def allows(self, value: float) -> bool:
        """Whether the number is one that this policy knows."""
        low = self.lowest < value if self.open_low else self.lowest <= value
        high = value < self.highest if self.open_high else value <= self.highest
        return low and high and math.isfinite(value)

    @property
    def range(self) -> str:
        """What the number may be, in words."""
        low = f"above {self.lowest:g}" if self.open_low else f"of at least {self.lowest:g}"
        if math.isinf(self.highest):
            return low
        return f"{low} and {'below' if self.open_high else 'up to'} {self.highest:g}"


def fixed(spectrum: Spectrum, rank: float) -> int | None:
    """``rank`` directions, fewer where the matrix has fewer."""
    known = len(spectrum.squared)
    if known >= rank or spectrum.complete:
        return min(known, int(rank))
    return None


def energy(spectrum: Spectrum, share: float) -> int | None:
    """The smallest r with Σ_{i≤r} σ_i² ≥ share · ‖Δ‖²_F."""
    captured = spectrum.squared.cumsum(0)
    # A share of 1 is met at rounding level: the energy of a complete spectrum is all there is.
    rank = int((captured < share * spectrum.total).sum()) + 1
    known = len(spectrum.squared)
    if rank <= known:
        return rank
    return known if spectrum.complete else None


def error(spectrum: Spectrum, most: float) -> int | None:
    """The smallest r with ‖Δ − Δ_r‖_F ≤ most · ‖Δ‖_F (Eckart–Young: the rest of the energy)."""
    return energy(spectrum, 1 - most * most)


def threshold(spectrum: Spectrum, value: float) -> int | None:
    """All directions with σ > value."""
    above = int((spectrum.squared > value * value).sum())
    return above if spectrum.complete or above < len(spectrum.squared) else None


def ratio(spectrum: Spectrum, share: float) -> int | None:
    """All directions with σ > share · σ₁."""
    return threshold(spectrum, share * float(spectrum.squared[0]) ** 0.5)


def cumulative(spectrum: Spectrum, share: float) -> int | None:
    """The smallest r with Σ_{i≤r} σ_i ≥ share · Σ σ_i: the nuclear norm's share."""
    if not spectrum.complete:
        return None
    sums = spectrum.squared.sqrt().cumsum(0)
    # Rounding of the sum must not ask for one more than there is.
    return min(int((sums < share * sums[-1]).sum()) + 1, len(sums))


def gavish_donoho(spectrum: Spectrum, value: float = 0.0) -> int | None:
    """All directions with σ > ω(β) · median(σ), β = short / long side: the optimal hard threshold
    for white noise of unknown level (Gavish & Donoho 2014, arXiv 1305.5870, section 2.3)."""
    if not spectrum.complete:
        return None
    short, long = sorted(spectrum.shape)
    values = spectrum.squared.sqrt()
    middle = [short // 2, (short - 1) // 2]  # of all min(m, n) values: those not known are 0
    median = sum(float(values[i]) if i < len(values) else 0.0 for i in middle) / 2
    return int((values > _omega(short / long) * median).sum())


def _omega(beta: float) -> float:
    """λ*(β) / √μ_β: the optimal threshold in units of the noise, over the median of the noise's
    singular values."""
    inner = beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)
    return math.sqrt((2 * (beta + 1) + 8 * beta / inner) / marchenko_pastur_median(beta))


@functools.cache
def marchenko_pastur_median(beta: float) -> float:
    """Median of the Marchenko–Pastur law of the aspect ratio ``beta`` in (0, 1]."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    steps = 1 << 14
    # x = centre − radius·cos t takes the square roots out of the ends of the density.
    centre, radius = (low + high) / 2, (high - low) / 2
    weights = []
    for i in range(steps):
        t = math.pi * (i + 0.5) / steps
        x = centre - radius * math.cos(t)
        weights.append(math.sin(t) ** 2 / x)
    half, summed = sum(weights) / 2, 0.0
    for i, weight in enumerate(weights):
        if summed + weight >= half:
            t = math.pi * (i + (half - summed) / weight) / steps
            break
        summed += weight
    return centre - radius * math.cos(t)


def noise_floor(spectrum: Spectrum, value: float = 0.0) -> int | None:
    """All leading directions that stand above what rounding can have put into Δ.

    Sequentially for r = 0, 1, …: direction r + 1 is noise if σ_{r+1} is not above the floor that
    ``noise_levels`` gives for r directions of signal.
    """
    below = spectrum.squared <= noise_levels(spectrum)
    if bool(below.any()):
        return int(below.nonzero()[0])
    return len(spectrum.squared) if spectrum.complete else None


def noise_levels(spectrum: Spectrum) -> torch.Tensor:
    """The squared floor under each singular value, if those before it are signal.

    The energy v_r that noise has, if r directions are signal, is the rest of the spectrum's,
    m n / ((m − r)(n − r)) Σ_{i>r} σ_i² (Kritchman & Nadler 2009, "Non-parametric detection of the
    number of signals", with the degrees of freedom of r directions), but no more than rounding to
    the stored dtypes can cause. The floor is v_r times the squared norm of a noise of energy 1 with
    Δ's row and column variances, and a margin for its fluctuation (Tracy–Widom, 99.9 %; Johnstone
    2001).
    """
    import torch

    rounding = spectrum.rounding
    assert rounding is not None, "what rounding can have added must be measured first"
    squared, (m, n) = spectrum.squared, spectrum.shape
    if spectrum.complete:  # summed from the small end, which the whole would swallow
        tail = squared.flip(0).cumsum(0).flip(0)
    else:
        tail = (spectrum.total - squared.cumsum(0) + squared).clamp(min=0)
    r = torch.arange(len(squared), dtype=torch.float64)
    noise = (tail / ((1 - r / m) * (1 - r / n))).clamp(max=rounding.energy)
    level: torch.Tensor = noise * rounding.edge * (1 + fluctuation(m, n))
    return level


def fluctuation(m: int, n: int) -> float:
    """How far, relative, the squared norm of an m × n noise may lie above its limit."""
    return float(_TRACY_WIDOM) * float((m**-0.5 + n**-0.5) ** (1 / 3) / (m**0.5 + n**0.5))


POLICIES: dict[str, Policy] = {
    "rank": Policy(fixed, 1, math.inf, open_low=False),
    "energy": Policy(energy),
    "error": Policy(error, open_low=False, open_high=True),
    "ratio": Policy(ratio, open_low=False, open_high=True, whole=True, counts=True),
    "cumulative": Policy(cumulative, whole=True),
    "threshold": Policy(threshold, 0, math.inf, open_low=False, whole=True, counts=True),
    "noise_floor": Policy(noise_floor, whole=True, counts=True),
    "gavish_donoho": Policy(gavish_donoho, whole=True),
    # kohya's names (sd-scripts, networks/resize_lora.py): sv_fro is a share of the norm, not of its
    # square, and sv_ratio divides σ₁.
    "sv_fro": Policy(lambda spectrum, share: energy(spectrum, share * share)),
    "sv_ratio": Policy(
        lambda spectrum, divisor: ratio(spectrum, 1 / divisor), 1, math.inf, whole=True, counts=True
    ),
    "sv_cumulative": Policy(cumulative, whole=True),
}


def budget(spectra: Sequence[Spectrum], costs: Sequence[int], size: int) -> list[int | None]:
    """Ranks for all modules at once, so that Σ rank · cost ≤ size and the energy left out is least.

    Greedy (``allocation``): always the next σ² / cost, and a module's gains only fall. Compared
    with the largest uniform rank of that size, which it can miss by the last item, and never worse.

    A rank is None where a module's whole known spectrum was taken: look deeper.
    """
    prices = [(s.squared / cost).tolist() for s, cost in zip(spectra, costs, strict=True)]
    each = [[cost] * len(known) for known, cost in zip(prices, costs, strict=True)]
    ranks = allocate(prices, each, size)
    if any(r == len(s.squared) and not s.complete for r, s in zip(ranks, spectra, strict=True)):
        return [
            None if r == len(s.squared) and not s.complete else r
            for r, s in zip(ranks, spectra, strict=True)
        ]
    same = uniform(spectra, costs, size)
    best = max(ranks, same, key=lambda ranks: captured(spectra, ranks))
    return list(best)


def uniform(spectra: Sequence[Spectrum], costs: Sequence[int], size: int) -> list[int]:
    """The largest rank that all modules can have within ``size``, as far as each has it."""
    ranks = [0] * len(spectra)
    for r in range(1, max((len(s.squared) for s in spectra), default=0) + 1):
        wider = [min(r, len(s.squared)) for s in spectra]
        if sum(k * cost for k, cost in zip(wider, costs, strict=True)) > size:
            break
        ranks = wider
    return ranks


def captured(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """The energy that these ranks hold, over all modules."""
    return math.fsum(float(s.squared[:r].sum()) for s, r in zip(spectra, ranks, strict=True))


SharedPolicy = Callable[[Sequence[Spectrum], Sequence[int], int], "list[int | None]"]
SHARED: dict[str, SharedPolicy] = {"budget": budget}


@dataclasses.dataclass(frozen=True)
class RankRule:
    """A policy by name, its one number, and a cap that holds whatever the policy says."""

    policy: str
    value: float
    max_rank: int | None = None

    def __call__(self, spectrum: Spectrum) -> int | None:
        """The rank, or None where more of the spectrum must be known."""
        rank = POLICIES[self.policy](
            self.capped(spectrum) if not self.whole else spectrum, self.value
        )
        if rank is None and self.counts and self.max_rank is not None:
            return self.max_rank if len(spectrum.squared) >= self.max_rank else None
        return rank if rank is None or self.max_rank is None else min(rank, self.max_rank)

    def capped(self, spectrum: Spectrum) -> Spectrum:
        """The spectrum as far as the cap lets it be used."""
        if self.max_rank is not None and len(spectrum.squared) > self.max_rank:
            return dataclasses.replace(
                spectrum, squared=spectrum.squared[: self.max_rank], complete=True
            )
        return spectrum

    @property
    def shared(self) -> bool:
        """Whether ranks are chosen for all modules at once."""
        return self.policy in SHARED

    @property
    def whole(self) -> bool:
        """Whether the policy judges noise itself."""
        return not self.shared and POLICIES[self.policy].whole

    @property
    def counts(self) -> bool:
        """Whether bounds of the leading values decide."""
        return not self.shared and POLICIES[self.policy].counts

    def ceiling(self, rows: int, cols: int) -> int:
        """The largest rank this rule can choose for a matrix of that shape."""
        limits = [rows, cols]
        if self.policy == "rank":
            limits.append(int(self.value))
        if self.max_rank is not None:
            limits.append(self.max_rank)
        return min(limits)
