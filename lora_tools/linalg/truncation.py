"""What is asked of a truncated decomposition, and what comes out of it."""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_tools.linalg.ranks import RankRule, Spectrum

SUM_RUN = 1 << 16  # numbers whose squares are summed in float32
_LEAST = 1e-26  # a sum of so many squares in float32 that none that counts can have been lost
EPS = torch.finfo(torch.float32).eps


@dataclasses.dataclass(frozen=True)
class TruncatedSVD:
    """A ≈ U · diag(S) · Vh with U (m, r), S (r) float64, Vh (r, n).

    Attributes:
        total: ‖A‖²_F.
        captured: the energy ΣS² of the r directions, as found.
        gain: upper bound on the energy that the best rank-r approximation holds beyond
            ``captured``. Zero for the exact methods, to rounding. For "krylov" it holds unless a
            direction was missed that outweighs the (r+1)-th found one: see ``hidden_energy``.
        method: "dense", "gram" or "krylov"; "none" for a zero matrix.
        known: the spectrum as far as it was computed, which may be further than r.
    """

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    total: float
    captured: float
    gain: float
    method: str
    known: Spectrum

    @property
    def rank(self) -> int:
        return len(self.S)

    def cut(self, r: int) -> TruncatedSVD:
        """The leading r of the directions found. What bounds the gain of all bounds that of some:
        each direction's own gain is not negative."""
        S = self.S[:r]
        return dataclasses.replace(
            self, U=self.U[:, :r], S=S, Vh=self.Vh[:r], captured=float((S * S).sum())
        )


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked of a decomposition: a rule, what it must know beside the values, the largest
    singular value that is noise, and how many directions are wanted at least."""

    rule: RankRule
    about: Spectrum
    noise: float = 0.0
    depth: int = 0

    @property
    def total(self) -> float:
        return self.about.total

    def least(self, rows: int, cols: int) -> int:
        """How many directions are wanted in any case."""
        fixed = self.rule.ceiling(rows, cols) if self.rule.policy == "rank" else 0
        return max(fixed, min(self.depth, rows, cols))

    def spectrum(self, squared: torch.Tensor, complete: bool) -> Spectrum:
        """What stands above rounding of ``squared`` (descending); complete if anything fell
        below."""
        # A float32 factorisation resolves singular values down to a few eps of the first.
        floor = max(self.noise, 8 * EPS * float(squared[0].clamp(min=0)) ** 0.5) ** 2
        kept = max(int((squared > floor).sum()), 1)
        return dataclasses.replace(
            self.about, squared=squared[:kept], complete=complete or kept < len(squared)
        )

    def rank(self, known: Spectrum) -> int | None:
        """How many directions to keep, or None: look deeper."""
        rank = 0 if self.rule.shared else self.rule(known)  # a shared rule decides later
        if rank is None or (len(known.squared) < self.depth and not known.complete):
            return None
        return min(max(rank, self.depth), len(known.squared))

    def decide(self, known: Spectrum) -> int:
        """The same where the spectrum is complete."""
        rank = self.rank(known)
        assert rank is not None, "a complete spectrum decides every rule"
        return rank


def sum_of_squares(x: torch.Tensor) -> float:
    """‖x‖²_F: float32 within runs of 65,536 elements, float64 across them, and within a run of
    numbers whose squares float32 cannot hold."""
    flat = x.reshape(-1)
    if flat.dtype != torch.float64 and flat.device.type == "cpu":
        return math.fsum(map(_squares_of_run, torch.split(flat, SUM_RUN)))
    return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2


def _squares_of_run(run: torch.Tensor) -> float:
    narrow = float(torch.dot(run, run))
    if _LEAST <= narrow < math.inf:
        return narrow
    wide = run.double()  # squares below 1e-38 are lost in float32, and those above 3e38 infinite
    return float(torch.dot(wide, wide))
