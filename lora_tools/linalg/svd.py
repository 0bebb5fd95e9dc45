"""Truncated singular value decompositions of one matrix, each with its energy accounted for.

``truncated`` chooses: small matrices are decomposed exactly, large ones by block Krylov iteration.
"""

from __future__ import annotations

import dataclasses

import torch

from lora_tools.linalg.krylov import GRAM, krylov
from lora_tools.linalg.ranks import RankRule, Rounding, Spectrum
from lora_tools.linalg.truncation import SUM_RUN, TruncatedSVD, Wanted, sum_of_squares

_DENSE = 64  # up to this smaller side a dense SVD costs less than setting up anything else
_LARGE = 1024  # from this side on, iterating costs less than an exact method for rules that count
_SUBSET = 1024  # from this size on, LAPACK's subset of eigenvectors pays for importing scipy
HALF_LOSS = 2.0**-15  # energy, relative, that rounding matrix and basis to bfloat16 may hide


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
        found = krylov(wide, wanted, tolerance, seed) or _gram(wide, wanted, tolerance, seed)
    return _oriented(found, A)


def iterates(
    shape: torch.Size | tuple[int, int], rule: RankRule, exact: bool, depth: int = 0
) -> bool:
    """Whether a float32 matrix of that shape is decomposed by iteration."""
    short = min(shape)
    few = max(rule.ceiling(*shape) if rule.policy == "rank" else 0, depth)
    if rule.whole and not (rule.counts and short >= _LARGE):
        return False
    return not exact and short > _DENSE and short >= GRAM * few


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
    found = krylov(_wide(A), Wanted(rule, nothing, noise), tolerance, seed)
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
            found = krylov(A, narrow, tolerance, seed)
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
