"""IA³ on stored weights: which dimension of a tensor its vector multiplies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError
from lora_tools.formats.adapters.peft import Adapter, Multiplier
from lora_tools.linalg.layouts import LAYOUTS, Layout
from lora_tools.merging.orientation import FLAG, contradicted, is_transposed
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.checkpoint import Checkpoint
    from lora_tools.merging.targets import BaseOutline


def multiplier_layout(
    adapter: Adapter, source: Multiplier, spec: TensorSpec, base: Checkpoint | BaseOutline
) -> Layout | None:
    """How the weight is stored; None of a bias.

    Raises:
        MismatchError: the vector does not fit it, or only the other way than it is said to be
            stored: PEFT's config says of all layers what one of them is.
    """
    transposed = len(spec.shape) == 2 and is_transposed(spec, base, adapter)
    layout = LAYOUTS["conv1d" if transposed else "linear"]
    length = math.prod(adapter.shape(source.key))
    is_bias = len(spec.shape) == 1
    dim = 0 if is_bias else _dimension(source, layout)
    fits = spec.is_float and spec.shape[dim] == length
    other = spec.shape[-1 - dim] if len(spec.shape) == 2 else 0
    if not fits and spec.is_float and other == length and FLAG in adapter.config:
        raise contradicted(spec, adapter, transposed)
    if not fits:
        raise MismatchError(
            f"{spec.name}: base is {spec.dtype} {spec.shape}, {adapter.path} multiplies {length} "
            f"{'in' if source.on_input else 'out'}puts; is this the base it was trained on?"
        )
    return None if is_bias else layout


def _dimension(source: Multiplier, layout: Layout) -> int:
    return int(source.on_input != layout.transposed)


def factor(
    vector: torch.Tensor, source: Multiplier, layout: Layout | None, spec: TensorSpec
) -> torch.Tensor:
    """The vector as a column, or as a row, of the tensor seen as a matrix."""
    vector = vector.reshape(-1)
    if layout is not None and _dimension(source, layout) == 0:
        return vector[:, None]
    return vector.repeat_interleave(math.prod(spec.shape[2:]))[None, :]
