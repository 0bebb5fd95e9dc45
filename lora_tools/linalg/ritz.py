"""What a block Krylov iteration knows on the way: bounds from Ritz values and their residuals."""

from __future__ import annotations

import math

import torch

_TIE = 2e-3  # singular values squared that are closer than this, relative, count as one
_MISS = 1e-9  # the probability with which a bound from the random start may fail


def project_out(Y: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
    """The part of Y's columns orthogonal to Q's."""
    return Y - Q @ (Q.T @ Y) if Q.shape[1] else Y


def missing_energy(squared: torch.Tensor, residual: torch.Tensor, r: int) -> float:
    """Upper bound on Σ_{i≤r} σ_i(A)² − Σ_{i≤r} θ_i from Ritz values and residuals.

    θ_i are Ritz values of AAᵀ (descending, more than r of them), ρ_i² = ‖(AAᵀ − θ_i)u_i‖² their
    squared residuals. Let μ bound the part of AAᵀ orthogonal to the first r Ritz vectors. Then
    each σ_i² exceeds θ_i by at most min(ρ_i, ρ_i² / (θ_i − μ)) (Parlett, The Symmetric Eigenvalue
    Problem, 11.7); μ is taken as θ_{r+1} + ρ_{r+1}.
    """
    rho = residual.clamp(min=0).sqrt()
    mu = float(squared[r] + rho[r])
    gap = (squared[:r] - mu).clamp(min=1e-300)
    return float(torch.minimum(rho[:r], residual[:r] / gap).sum())


def hidden_energy(squared: torch.Tensor, r: int, block: int) -> float:
    """Upper bound on what directions that the iteration cannot see hold beyond the r found ones.

    From a block of b columns no more than b directions of one singular value are found, to
    rounding. So where b found ones (descending, squared) are alike, there may be any number of
    others: as many as would take the places of all that come after them.
    """
    alike = range(min(r, len(squared) - block + 1))
    return max(
        (
            float((squared[i] - squared[i:r]).sum())
            for i in alike
            if squared[i + block - 1] >= (1 - _TIE) * squared[i]
        ),
        default=0.0,
    )


def upper_values(
    squared: torch.Tensor, residual: torch.Tensor, blocks: int, block: int, cols: int
) -> torch.Tensor:
    """Upper bounds of σ_i² from Ritz values and residuals as in ``missing_energy``.

    σ_i² ≤ θ_i + ρ_i; and after q = ``blocks`` steps from b = ``block`` random vectors of length n =
    ``cols``, σ_i² ≤ θ_i / (1 − ε) with √ε = (ln(1.648 √n) − ln(p)/b) / (2q − 1), where the values
    before have converged, but for a probability p (Kuczyński & Woźniakowski 1992, "Estimating the
    largest eigenvalue by the power and Lanczos algorithms with a random start", theorem 4.2: all b
    vectors would have to fail, each by itself).
    """
    root = (math.log(1.648 * cols**0.5) - math.log(_MISS) / block) / (2 * blocks - 1)
    upper = squared + residual.clamp(min=0).sqrt()
    if root < 1:
        upper = torch.minimum(upper, squared / (1 - root * root))
    return upper


class Columns:
    """A matrix that grows by columns, in memory that doubles."""

    def __init__(self, empty: torch.Tensor) -> None:
        self._store, self.all = empty, empty

    def append(self, columns: torch.Tensor) -> None:
        """Put columns on the right, converted to the matrix's dtype."""
        used = self.all.shape[1]
        wanted = used + columns.shape[1]
        if wanted > self._store.shape[1]:
            self._store = self.all.new_empty(self.all.shape[0], max(2 * used, 4 * columns.shape[1]))
            self._store[:, :used] = self.all
        self._store[:, used:wanted] = columns
        self.all = self._store[:, :wanted]
