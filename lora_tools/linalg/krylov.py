"""Randomized block Krylov iteration (Musco & Musco 2015, arXiv 1504.05477, algorithm 2; Golub,
Luk & Overton 1981 for the recurrence), which stops by its own measure of what is still to gain.

Two facts make the measure cheap. For an orthonormal Q, ‖A − QQᵀA‖²_F = ‖A‖²_F − ‖QᵀA‖²_F exactly,
so the captured energy is known and not estimated. And the next Krylov block, which is needed to go
on anyway, holds the residuals of the current Ritz pairs, which bound the energy still missing.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_tools.linalg.ranks import Spectrum
from lora_tools.linalg.ritz import Columns, hidden_energy, missing_energy, project_out, upper_values
from lora_tools.linalg.truncation import EPS, TruncatedSVD, Wanted

_BLOCK = 16  # the narrowest block at which a float32 product runs near full speed
GRAM = 8  # below this many times the rank the Gram matrix costs less than iterating
_STRAY = 1e-2  # what the directions kept may still miss, over the next value, when that is bounded


def krylov(A: torch.Tensor, wanted: Wanted, tolerance: float, seed: int) -> TruncatedSVD | None:
    """The leading directions of ``A`` (m, n) with m ≤ n; None where iterating would cost more than
    an exact method.

    Args:
        tolerance: of the energy at the chosen rank, relative.
        seed: of the random start.
    """
    m, n = A.shape
    space = _Space(A, wanted.total, seed)
    # Where the spectrum is looked at first: a fixed rank takes about this many dimensions.
    look_at = min(2 * wanted.least(m, n) + 2 * space.block, m // 2)
    while True:
        exhausted = space.expand(1e-5 if wanted.rule.counts else tolerance)
        if exhausted or (space.size > 0 and space.size >= min(look_at, m // 2 - space.block)):
            pairs = _Pairs(space, wanted, complete=exhausted)
            if pairs.rank is not None and not exhausted:
                if wanted.rule.counts and GRAM * pairs.rank > m:
                    return None
                if pairs.rank < space.size:
                    pairs.bound(tolerance)
            if pairs.enough:
                return pairs.triplets()
            look_at = max(look_at, pairs.look_at)
        if 2 * (space.size + space.block) > m:
            return None
        space.accept()


class _Space:
    """An orthonormal basis Q (m, k) of [AΩ, (AAᵀ)AΩ, …] and Z = AᵀQ / ‖A‖.

    Products with A are made in A's dtype, the rest in float32, the small k × k problem in float64.
    All are scaled by a power of two to be near 1, whatever the size of A: float32 would not hold
    the squares of 1e-25, nor of 1e25.

    Attributes:
        T: QᵀAAᵀQ (k, k), float64.
        E: what the next block has beyond Q, in the coordinates of that block.
        left: energy of A beyond Q.
    """

    def __init__(self, A: torch.Tensor, total: float, seed: int) -> None:
        m, n = A.shape
        self.A, self.total, self.block = A, total, min(_BLOCK, m)
        self.unit = 2.0 ** -(math.frexp(total)[1] // 2)  # about 1 / ‖A‖
        self._random = torch.Generator().manual_seed(seed)
        self._near_1 = self._start()
        # Z'Z squares singular values: only float64 keeps those that float32 products resolve.
        self.wide = torch.float64 if A.dtype == torch.float32 else torch.float32
        like = self._near_1
        self.Q, self.Z = (
            Columns(like.new_empty(m, 0)),
            Columns(like.new_empty(n, 0, dtype=self.wide)),
        )
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.left = total

    @property
    def size(self) -> int:
        """Dimensions of the basis so far."""
        return self.Q.all.shape[1]

    def _start(self) -> torch.Tensor:
        columns = torch.randn(self.A.shape[1], self.block, generator=self._random)
        return columns.to(self.A.device) * self.unit

    def _product(self) -> torch.Tensor:
        # This way round is faster than A @ X.
        return (self._near_1.T.to(self.A.dtype) @ self.A.T).T.float()

    def expand(self, tolerance: float) -> bool:
        """Make the block that comes next. True where there is none: Q spans A's range, up to this
        energy, relative."""
        product = self._product()
        self._next, self.E = torch.linalg.qr(project_out(product, self.Q.all))
        # Only rounding is left of a product: Q holds an invariant subspace, and must not grow by
        # noise. It is the whole range, unless energy is left: of singular values that occur often.
        if not self.size or float(self.E.norm()) > 16 * EPS * float(product.norm()):
            return False
        self.left = self.total - float(self.T.trace())
        if self.left <= tolerance * self.total:
            return True
        self._near_1 = self._start()
        self._next = torch.linalg.qr(project_out(self._product(), self.Q.all)).Q
        return False

    def accept(self) -> None:
        """Take that block into the basis."""
        # Once more after normalising: what is left may have lost its digits to the first time.
        Y = torch.linalg.qr(project_out(self._next, self.Q.all)).Q
        X = (Y.T.to(self.A.dtype) @ self.A).float().T * self.unit
        self._near_1 = X * self.unit
        self.Q.append(Y)
        self.Z.append(X)
        cross = (self.Z.all.T @ X.to(self.wide)).double().cpu() / self.unit / self.unit
        self.T = torch.cat((torch.cat((self.T, cross[: -self.block]), 1), cross.T), 0)


class _Pairs:
    """The Ritz pairs of a space, and whether those that are wanted have been found.

    Attributes:
        rank: how many are wanted; None where more of the spectrum must be known to tell.
        enough: whether they are within the tolerance.
        look_at: how large the space should be when it is looked at again.
    """

    def __init__(self, space: _Space, wanted: Wanted, *, complete: bool) -> None:
        self._space, self._wanted, self.enough = space, wanted, complete
        lam, W = torch.linalg.eigh(space.T)
        self._values, self._W = lam.flip(0).clamp(min=0), W.flip(1)
        self._known = wanted.spectrum(self._values, complete=complete)
        self.rank = wanted.decide(self._known) if complete else wanted.rank(self._known)
        self._gain = max(space.left, 0.0)
        self.look_at = 5 * space.size // 4 if wanted.rule.counts else 0

    def bound(self, tolerance: float) -> None:
        """Bound the energy that is missing at the rank, and with it ``enough``."""
        space, rule, values, rank = self._space, self._wanted.rule, self._values, self.rank
        assert rank is not None
        last = self._W[-space.block :]
        residual = (space.E.double().cpu() / space.unit / space.unit @ last).square().sum(0)
        self._gain = missing_energy(values, residual, rank)
        self._gain += hidden_energy(values, rank, space.block)
        allowed, sure = tolerance * self._captured, True
        if rule.counts:
            allowed = min(allowed, _STRAY * float(values[rank]))
            steps = space.size // space.block
            upper = upper_values(values, residual, steps, space.block, space.A.shape[1])
            above = rule(self._wanted.spectrum(upper, complete=False))
            sure = above == rule(self._known)
        self.enough = self._gain <= allowed and sure
        # A block lowers the bound some six times near the end: look again when it may do.
        ahead = math.log(self._gain / allowed, 6) if self._gain and allowed else 0
        self.look_at = max(self.look_at, space.size + space.block * math.ceil(max(ahead, 1)))

    @property
    def _captured(self) -> float:
        return float(self._values[: self.rank].sum())

    def triplets(self) -> TruncatedSVD:
        """The directions that are wanted."""
        space, wanted, rank, values = self._space, self._wanted, self.rank, self._values
        assert rank is not None
        S = values[:rank].sqrt()
        W = self._W[:, :rank].to(space.A.device)
        U = space.Q.all @ W.float()
        Vh = (space.Z.all @ (W / (S * space.unit).to(space.A.device)).to(space.wide)).T.float()
        gain = min(self._gain, max(wanted.total - self._captured, 0.0))
        return TruncatedSVD(
            U, S, Vh, wanted.total, self._captured, gain, "krylov", self._spectrum(rank)
        )

    def _spectrum(self, rank: int) -> Spectrum:
        """What is known for certain: values beyond the rank have not converged, but for the one by
        which a rule that counts has decided."""
        known = self._known
        last = rank + (self._wanted.rule.counts and rank < len(known.squared))
        complete = known.complete and last == len(known.squared)
        return dataclasses.replace(known, squared=self._values[:last], complete=complete)
