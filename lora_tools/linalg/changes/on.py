"""What a change is made on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]  # of a module, by part
# (the tensors, numbers of the config, what it is on) -> the change, or two factors of it
Change = Callable[[Tensors, Mapping[str, Any], "On"], "torch.Tensor | Product"]


def places(indices: torch.Tensor, values: torch.Tensor | None = None) -> torch.Tensor:
    """Indices as torch takes them, one for each of the values. Raises ValueError."""
    found = indices.long()
    if found.numel() and int(found.min()) < 0:
        raise ValueError("an index below 0")
    if values is not None and found.shape[-1:] != values.shape:
        raise ValueError("not one index for each value")
    return found


@dataclasses.dataclass(frozen=True)
class Product:
    """A change that is scale · left (out, r) @ right (r, in · ∏kernel)."""

    left: torch.Tensor
    right: torch.Tensor
    scale: float = 1.0

    @property
    def T(self) -> Product:
        """That of a weight stored (in, out)."""
        return Product(self.right.T, self.left.T, self.scale)

    def matrix(self) -> torch.Tensor:
        """The product itself."""
        product: torch.Tensor = self.left @ self.right
        return product if self.scale == 1.0 else product * self.scale


@dataclasses.dataclass(frozen=True)
class On:
    """A layer that is changed.

    Attributes:
        shape: of the weight, (out, in, *kernel), of an embedding (tokens, dim); () where the
            tensors say it.
        given: its weight in this shape, and its bias, where the change depends on them.
        given_bias: (out,).
    """

    shape: tuple[int, ...] = ()
    given: torch.Tensor | None = None
    given_bias: torch.Tensor | None = None

    def is_small(self, rank: int) -> bool:
        """Whether factors of this rank take much less room, in float64, than a matrix of the shape
        does, and a decomposition by them less time."""
        out, inside = self.shape[0], math.prod(self.shape[1:])
        return 6 * (out + inside) * rank <= out * inside

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as (out, in · ∏kernel)."""
        return self.weight.flatten(1)

    @property
    def weight(self) -> torch.Tensor:
        """The weight. Raises ValueError where there is none."""
        if self.given is None:
            raise ValueError("the base's weight is not at hand")
        return self.given

    @property
    def bias(self) -> torch.Tensor:
        """The bias. Raises ValueError where there is none."""
        if self.given_bias is None:
            raise ValueError("the base's bias is not at hand")
        return self.given_bias
