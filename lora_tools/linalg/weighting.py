"""Weighting a matrix by the second moment of what it is multiplied with.

A layer's error on an input x is (Δ − BA)x, and E‖(Δ − BA)x‖² = ‖(Δ − BA)R^½‖²_F with R = E[xxᵀ].
The best BA of rank r is SVD_r(Δ·R^½)·R^-½: QERA's exact form (Zhang et al. 2024, arXiv 2410.06040,
theorem 1); with R reduced to its diagonal, its approximate form.
"""

from __future__ import annotations

import torch

_SMALLEST = 1e-6  # eigenvalues of R, relative to their mean, below which none is believed


class Weighting:
    """R^½ and its inverse, for matrices whose columns are the inputs.

    Args:
        moment: E[xxᵀ] (n, n), or its diagonal (n).

    Directions that no input has are given a weight of 10⁻³ of the mean one, so that the inverse
    exists and a change there is not lost.
    """

    def __init__(self, moment: torch.Tensor) -> None:
        wide = moment.double()
        self._full = wide.dim() == 2
        values, vectors = torch.linalg.eigh(wide) if self._full else (wide, wide)
        self._W: torch.Tensor = vectors
        mean = float(values.clamp(min=0).mean())
        self._values = values.clamp(min=_SMALLEST * mean if mean > 0 else 1.0)

    def _times(self, A: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = values.to(A.device, A.dtype)
        if not self._full:
            return A * values
        W = self._W.to(A.device, A.dtype)
        product: torch.Tensor = ((A @ W) * values) @ W.T
        return product

    def apply(self, A: torch.Tensor) -> torch.Tensor:
        """A (m, n) → A·R^½."""
        return self._times(A, self._values.sqrt())

    def undo(self, A: torch.Tensor) -> torch.Tensor:
        """A (m, n) → A·R^-½."""
        return self._times(A, self._values.rsqrt())

    def moment(self, A: torch.Tensor) -> torch.Tensor:
        """A (m, n) → A·R."""
        return self._times(A, self._values)
