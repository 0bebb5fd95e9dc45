"""Truncated singular value decompositions of one matrix, each with its energy accounted for.

``truncated`` chooses: small matrices are decomposed exactly, large ones by randomized block Krylov
iteration (Musco & Musco 2015, arXiv 1504.05477, algorithm 2; Golub, Luk & Overton 1981 for the
recurrence), which stops by its own measure of what is still to be gained.

Two facts make the measure cheap. For an orthonormal Q, ‖A − QQᵀA‖²_F = ‖A‖²_F − ‖QᵀA‖²_F exactly,
so the captured energy is known and not estimated. And the next Krylov block, which is needed to go
on anyway, holds the residuals of the current Ritz pairs, which bound the energy still missing.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from lora_tools.linalg.ranks import RankRule, Rounding, Spectrum
from lora_tools.linalg.ritz import Columns, hidden_energy, missing_energy, project_out, upper_values

_BLOCK = 16  # the narrowest block at which a float32 product runs near full speed
_DENSE = 64  # up to this smaller side a dense SVD costs less than setting up anything else
_GRAM = 8  # below this many times the rank the Gram matrix costs less than iterating
_LARGE = 1024  # from this side on, iterating costs less than an exact method for rules that count
_STRAY = 1e-2  # what the directions kept may still miss, over the next value, when that is bounded
_SUBSET = 1024  # from this size on, LAPACK's subset of eigenvectors pays for importing scipy
SUM_RUN = 1 << 16  # numbers whose squares are summed in float32
_LEAST = 1e-26  # a sum of so many squares in float32 that none that counts can have been lost
HALF_LOSS = 2.0**-15  # energy, relative, that rounding matrix and basis to bfloat16 may hide
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


def truncated(
    A: torch.Tensor,
    rule: RankRule,
    *,
    total: float | None = None,
    tolerance: float = 1e-3,
    noise: float = 0.0,
    rounding: Rounding | None = None,
    depth: int = 0,
    exact: bool = False,
    seed: int = 0,
) -> TruncatedSVD:
    """The leading singular directions of ``A`` (m, n), as many as ``rule`` asks for.

    Args:
        rule: how many directions; asked again as more of the spectrum becomes known.
        total: ‖A‖²_F where it is known already.
        tolerance: stop once the energy found at the chosen rank is within this relative
            distance of the best possible.
        noise: singular values up to this are rounding of the input and are never kept (except
            the first: a matrix that is not zero has rank 1 at least). Ignored by rules that decide
            on the whole spectrum, which judge noise themselves.
        rounding: what such a rule must know of the input's storage.
        depth: directions to find at least, where there are as many, whatever the rule says.
        exact: decompose exactly whatever the size.
        seed: of the random start.

    Signs are fixed (the entry of largest magnitude in each left vector is positive).
    """
    total = sum_of_squares(A) if total is None else total
    nothing = Spectrum(torch.zeros(0, dtype=torch.float64), total, True, _shape(A), rounding)
    if total == 0:
        return TruncatedSVD(
            A.new_zeros(A.shape[0], 0),
            nothing.squared,
            A.new_zeros(0, A.shape[1]),
            0.0,
            0.0,
            0.0,
            "none",
            nothing,
        )
    wide = _wide(A)
    wanted = Wanted(rule, nothing, 0.0 if rule.whole else noise, depth)
    if wide.shape[0] <= _DENSE or A.dtype == torch.float64:
        found = _dense(wide, wanted)
    elif not iterates(A.shape, rule, exact, depth):
        found = _gram(wide, wanted, None if exact else tolerance, seed)
    else:
        found = _krylov(wide, wanted, tolerance, seed) or _gram(wide, wanted, tolerance, seed)
    return _oriented(found, A)


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


def iterates(
    shape: torch.Size | tuple[int, int], rule: RankRule, exact: bool, depth: int = 0
) -> bool:
    """Whether a float32 matrix of that shape is decomposed by iteration."""
    short = min(shape)
    few = max(rule.ceiling(*shape) if rule.policy == "rank" else 0, depth)
    if rule.whole and not (rule.counts and short >= _LARGE):
        return False
    return not exact and short > _DENSE and short >= _GRAM * few


def _shape(A: torch.Tensor) -> tuple[int, int]:
    return A.shape[0], A.shape[1]


def sketched(
    A: torch.Tensor,
    rule: RankRule,
    *,
    total: float,
    tolerance: float,
    noise: float,
    rounding: Rounding | None = None,
    seed: int,
) -> TruncatedSVD | None:
    """``truncated`` by iteration on a copy of the matrix in half precision, where the products with
    it are several times faster; None where the iteration does not get there.

    Rounding A to bfloat16, and the basis it is multiplied by, adds random matrices whose spectral
    norms are a small fraction of A's, and turns the leading subspace by as little: the energy of A
    along ``Vh`` is short by HALF_LOSS at most, far below any tolerance this serves. ``captured``
    itself is only good to some 1e-3, so the energy must be measured on A, and ``gain`` counts from
    what is measured along ``Vh``. It does not serve where the tail is as small as the rounding.
    """
    nothing = Spectrum(torch.zeros(0, dtype=torch.float64), total, True, _shape(A), rounding)
    found = _krylov(_wide(A), Wanted(rule, nothing, noise), tolerance, seed)
    if found is None:
        return None
    return _oriented(dataclasses.replace(found, gain=found.gain + HALF_LOSS * total), A)


def _wide(A: torch.Tensor) -> torch.Tensor:
    """A or its transpose: the side whose basis is kept orthonormal is the shorter one."""
    return A.T if A.shape[0] > A.shape[1] else A


def _oriented(svd: TruncatedSVD, A: torch.Tensor) -> TruncatedSVD:
    """The factors of ``_wide(A)`` as those of A, signs fixed."""
    if A.shape[0] > A.shape[1]:
        svd = dataclasses.replace(svd, U=svd.Vh.T, Vh=svd.U.T)
    return _fix_signs(svd)


def _fix_signs(svd: TruncatedSVD) -> TruncatedSVD:
    if not svd.rank:
        return svd
    peak = svd.U.gather(0, svd.U.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(svd.U.dtype)
    return dataclasses.replace(svd, U=svd.U * sign, Vh=svd.Vh * sign.T)


def top_directions(S: torch.Tensor, rule: RankRule) -> int:
    """The rank, at least 1, the rule chooses for a matrix whose singular values are all in S,
    descending."""
    squared = S.double().cpu().square()
    about = Spectrum(squared, float(squared.sum()), True)
    wanted = Wanted(rule, about)
    return max(wanted.decide(wanted.spectrum(squared, complete=True)), 1)


def _dense(A: torch.Tensor, wanted: Wanted) -> TruncatedSVD:
    """LAPACK's SVD in float64."""
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    S = S.cpu()
    known = wanted.spectrum(S * S, complete=True)
    r = wanted.decide(known)
    captured = float((S[:r] ** 2).sum())
    return TruncatedSVD(
        U[:, :r].to(A.dtype), S[:r], Vh[:r].to(A.dtype), wanted.total, captured, 0.0, "dense", known
    )


def _gram(
    A: torch.Tensor, wanted: Wanted, tolerance: float | None = None, seed: int = 0
) -> TruncatedSVD:
    """Exact, through the eigenvectors of the Gram matrix A·Aᵀ of the shorter side; with a tolerance
    the directions of a large one are iterated for, once all of its values have told how many.

    Squaring costs half the digits: singular values below √eps of the first are lost. In float64
    that is 1.5e-8 of the first, less than float32 input resolves, so the matrix is formed in
    float64. It costs m·n·min(m, n) against the dense SVD's several times that.
    """
    m = A.shape[0]
    G = torch.zeros(m, m, dtype=torch.float64, device=A.device)
    step = max(SUM_RUN * 16 // m, 1)
    for columns in torch.split(A, step, dim=1):
        wide = columns.double()
        for row in range(0, m, _LARGE):  # the lower triangle is all that is looked at
            some = wide[row : row + _LARGE]
            G[row : row + _LARGE, : row + _LARGE].addmm_(some, wide[: row + _LARGE].T)
    few = wanted.rule.policy == "rank" or wanted.rule.shared
    if few or m < _LARGE:
        squared, W = _top_eigh(G, min(wanted.least(*_shape(A)) + 1, m) if few else m)
        known = wanted.spectrum(squared, complete=not few or len(squared) == m)
        r = wanted.decide(known)
    else:  # eigenvalues alone cost a fifth
        squared = torch.linalg.eigvalsh(G).flip(0).clamp(min=0).cpu()
        known = wanted.spectrum(squared, complete=True)
        r = wanted.decide(known)
        few_enough = RankRule("rank", r)
        if r and tolerance is not None and iterates(_shape(A), few_enough, False):
            narrow = dataclasses.replace(wanted, rule=few_enough, depth=0)
            found = _krylov(A, narrow, tolerance, seed)
            if found is not None and found.rank == r:
                return dataclasses.replace(found, known=known)
        _, W = _top_eigh(G, r)
    U = W[:, :r].to(A.dtype)
    Z = U.T @ A
    S = torch.linalg.vector_norm(Z, dim=1, dtype=torch.float64).cpu()
    return TruncatedSVD(
        U,
        S,
        (Z.double() / S.to(Z.device)[:, None]).to(A.dtype),
        wanted.total,
        float((S * S).sum()),
        0.0,
        "gram",
        known,
    )


def _top_eigh(G: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` largest eigenvalues (descending, clamped at 0, on the CPU) and vectors."""
    n = G.shape[0]
    if G.device.type == "cpu" and n >= _SUBSET and count < n // 2:
        from scipy.linalg import eigh  # its subset costs a fraction of all eigenvectors

        values, vectors = eigh(G.numpy(), subset_by_index=[n - count, n - 1], overwrite_a=True)
        lam, W = torch.from_numpy(values), torch.from_numpy(vectors)
    else:
        lam, W = torch.linalg.eigh(G)
    return lam.flip(0).clamp(min=0).cpu(), W.flip(1)


def _krylov(A: torch.Tensor, wanted: Wanted, tolerance: float, seed: int) -> TruncatedSVD | None:
    """Randomized block Krylov iteration; None where it would cost more than an exact method.

    Q (m, k) is an orthonormal basis of [AΩ, (AAᵀ)AΩ, …], Z = AᵀQ / ‖A‖. Products
    with A are made in A's dtype, the rest in float32, the small k × k problem in float64. All are
    scaled by a power of two to be near 1, whatever the size of A: float32 would not hold the
    squares of 1e-25, nor of 1e25.
    """
    m, n = A.shape
    block = min(_BLOCK, m)
    start = torch.Generator().manual_seed(seed)
    unit = 2.0 ** -(math.frexp(wanted.total)[1] // 2)  # about 1 / ‖A‖
    X = torch.randn(n, block, generator=start).to(A.device)
    near_1 = X * unit
    # Z'Z squares singular values: only float64 keeps those that float32 products resolve.
    wide = torch.float64 if A.dtype == torch.float32 else torch.float32
    Q, Z = Columns(X.new_empty(m, 0)), Columns(X.new_empty(n, 0, dtype=wide))
    T = torch.zeros(0, 0, dtype=torch.float64)
    # Where the spectrum is looked at first: a fixed rank takes about this many dimensions.
    look_at = min(2 * wanted.least(m, n) + 2 * block, m // 2)
    while True:
        product = (near_1.T.to(A.dtype) @ A.T).T.float()  # this way round is faster than A @ X
        Y, E = torch.linalg.qr(project_out(product, Q.all))
        k = Q.all.shape[1]
        # Only rounding is left of a product: Q holds an invariant subspace, and must not grow by
        # noise. It is the whole range, unless energy is left: of singular values that occur often.
        exhausted = k > 0 and float(E.norm()) <= 16 * EPS * float(product.norm())
        if exhausted:
            left = wanted.total - float(T.trace())
            if left > (1e-5 if wanted.rule.counts else tolerance) * wanted.total:
                near_1 = torch.randn(n, block, generator=start).to(A.device) * unit
                Y = torch.linalg.qr(project_out((near_1.T.to(A.dtype) @ A.T).T.float(), Q.all)).Q
                exhausted = False
        if exhausted or (k > 0 and k >= min(look_at, m // 2 - block)):
            lam, W = torch.linalg.eigh(T)
            values, W = lam.flip(0).clamp(min=0), W.flip(1)
            known = wanted.spectrum(values, complete=exhausted)
            rank = wanted.rank(known)
            if exhausted:
                rank = wanted.decide(known)
                captured = float(values[:rank].sum())
                gain = max(left, 0.0)
                break
            if rank is not None and wanted.rule.counts and _GRAM * rank > m:
                return None
            if rank is not None and rank < k:
                residual = (E.double().cpu() / unit / unit @ W[-block:]).square().sum(0)
                gain = missing_energy(values, residual, rank) + hidden_energy(values, rank, block)
                captured = float(values[:rank].sum())
                allowed, sure = tolerance * captured, True
                if wanted.rule.counts:
                    allowed = min(allowed, _STRAY * float(values[rank]))
                    upper = upper_values(values, residual, k // block, block, n)
                    above = wanted.rule(wanted.spectrum(upper, complete=False))
                    sure = above == wanted.rule(known)
                if gain <= allowed and sure:
                    break
                # A block lowers the bound some six times near the end: look again when it may do.
                ahead = math.log(gain / allowed, 6) if gain and allowed else 0
                look_at = k + block * math.ceil(max(ahead, 1))
            if wanted.rule.counts:
                look_at = max(look_at, 5 * k // 4)
        if 2 * (k + block) > m:
            return None
        # Once more after normalising: what is left may have lost its digits to the first time.
        Y = torch.linalg.qr(project_out(Y, Q.all)).Q
        X = (Y.T.to(A.dtype) @ A).float().T * unit
        near_1 = X * unit
        Q.append(Y)
        Z.append(X)
        cross = (Z.all.T @ X.to(wide)).double().cpu() / unit / unit
        T = torch.cat((torch.cat((T, cross[:-block]), 1), cross.T), 0)
    S = values[:rank].sqrt()
    W = W[:, :rank].to(A.device)
    U = Q.all @ W.float()
    Vh = (Z.all @ (W / (S * unit).to(A.device)).to(wide)).T.float()
    gain = min(gain, max(wanted.total - captured, 0.0))
    # Values beyond the rank have not converged: they are no part of what is known, but for the one
    # by which a rule that counts has decided.
    last = rank + (wanted.rule.counts and rank < len(known.squared))
    known = dataclasses.replace(
        known, squared=values[:last], complete=known.complete and last == len(known.squared)
    )
    return TruncatedSVD(U, S, Vh, wanted.total, captured, gain, "krylov", known)
