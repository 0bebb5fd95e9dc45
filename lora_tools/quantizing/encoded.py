"""A weight as its row's ``encode`` stores it: the way to write of every scheme without one of its
own in ``quantizing.pack``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult, TensorSpec
from lora_tools.sources.schemes.row import is_finite, matrix_of

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.sources.schemes.row import Parts


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None],
    back: torch.Tensor | None,
) -> TensorResult:
    """Quantize a flat tensor and write what its row makes of it, unless ``writer`` is None; into
    ``back`` (n,), if given, goes what a reader makes of that, in float32."""
    from lora_tools.formats.tensors import as_bytes

    assert item.packed is not None
    assert item.scheme is not None
    parts, specs = _encoded(item, x, buffers), item.packed.specs
    for part, tensor in parts.items() if writer is not None else ():
        assert writer is not None
        writer.write(specs[part].name, as_bytes(tensor))
    error, energy = _measured(item, x, parts, back)
    done(0, x.numel())
    bits = 8 * item.nbytes / x.numel()
    relative = math.sqrt(error / energy) if energy else 0.0
    return TensorResult(item.name, item.spec.shape, bits, relative, math.sqrt(energy))


def _encoded(item: Item, x: torch.Tensor, buffers: Buffers) -> dict[str, torch.Tensor]:
    """What is stored, but for scales of activations. Raises NonFiniteError."""
    import torch

    assert item.packed is not None
    assert item.scheme is not None
    assert item.scheme.encode is not None
    with buffers.lend(item.spec.shape, torch.float32) as wide:
        wide.view(-1).copy_(x)
        parts = item.scheme.encode(item.packed, wide)
    for part, tensor in list(parts.items())[1:]:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NonFiniteError(
                f"{item.packed.specs[part].name}: its numbers are so large that a scale overflows"
            )
    return parts


def _measured(
    item: Item, x: torch.Tensor, parts: Parts, back: torch.Tensor | None
) -> tuple[float, float]:
    """‖x̂ − x‖² and ‖x‖², x̂ read back in the dtype of x; unrounded it goes into ``back``, if that
    is given."""
    import torch

    from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs
    from lora_tools.linalg.svd import sum_of_squares

    assert item.packed is not None
    assert item.scheme is not None
    matrix = matrix_of(item.spec)
    rows, exact = x.view(matrix), None if back is None else back.view(matrix)
    errors, energies = [], []
    for start, stop in row_runs(*matrix, RUN_ELEMENTS):
        if exact is None:
            read = torch.empty(stop - start, matrix[1], dtype=x.dtype)
        else:
            read = exact[start:stop]
        item.scheme.decode(item.packed, parts, read, start)
        wide = rows[start:stop].float()
        energies.append(sum_of_squares(wide))
        errors.append(sum_of_squares(read.to(x.dtype).float() - wide))
    return math.fsum(errors), math.fsum(energies)


def anew(packed: PackedWeight, spec: TensorSpec) -> PackedWeight:
    """What is stored of the weight with other numbers: tensors of the same sizes."""
    return packed


def ways(item: Item, parts: Parts) -> Sequence[Item]:
    """There is one."""
    return [item]


def block(packed: PackedWeight) -> int:
    """A code's place depends on its own number, but for the rounding of its scale."""
    return 1
