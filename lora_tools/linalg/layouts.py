"""Layer kinds: how a layer's stored weight relates to its low-rank factors.

Every kind here stores its delta as one product ``left @ right`` of a (rows, r) and an (r, cols)
matrix; what differs is which factor is which. A kind is one row of the table.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class Layout:
    """One layer kind.

    Attributes:
        name: "linear", "conv1d" or "embedding".
        transposed: the weight is stored as (in, out): delta = lora_A.T @ lora_B.T.
        magnitude_dim: the dimension of the stored weight that DoRA's norm runs over. PEFT 0.21:
            one magnitude for each output of a Linear or Conv1D, for each column of an Embedding.
    """

    name: str
    transposed: bool
    magnitude_dim: int

    def stored_factors(
        self, lora_A: torch.Tensor, lora_B: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """lora_A (r, in), lora_B (out, r) → left (rows, r), right (r, cols) of the stored delta."""
        return (lora_A.T, lora_B.T) if self.transposed else (lora_B, lora_A)

    def lora_factors(
        self, left: torch.Tensor, right: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """left (rows, r), right (r, cols) → lora_A (r, in), lora_B (out, r), contiguous."""
        lora_A, lora_B = (left.T, right.T) if self.transposed else (right, left)
        return lora_A.contiguous(), lora_B.contiguous()

    def in_out(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """(in, out) of a stored weight of that shape."""
        return (shape[0], shape[1]) if self.transposed else (shape[1], shape[0])

    def per_output(self, magnitude: torch.Tensor) -> torch.Tensor:
        """A vector with one entry for each DoRA magnitude, shaped to scale the stored weight."""
        return magnitude.reshape(-1, 1) if self.magnitude_dim == 1 else magnitude.reshape(1, -1)


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("linear", transposed=False, magnitude_dim=1),
        Layout("conv1d", transposed=True, magnitude_dim=0),  # transformers' Conv1D of GPT-2
        Layout("embedding", transposed=True, magnitude_dim=0),
    )
}
