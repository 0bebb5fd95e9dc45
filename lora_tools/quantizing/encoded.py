"""A weight as its row's ``encode`` stores it: the way to write of every scheme without one of its
own in ``quantizing.pack``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult, TensorSpec
from lora_tools.sources.schemes.row import is_finite

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.sources.schemes.row import Parts


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None] = lambda start, stop: None,
    back: torch.Tensor | None = None,
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
    error, energy = _measured(item, x, parts)
    done(0, x.numel())
    if back is not None:
        item.scheme.decode(item.packed, parts, back.view(_matrix(item.spec)), 0)
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


def _measured(item: Item, x: torch.Tensor, parts: Parts) -> tuple[float, float]:
    """‖x̂ − x‖² and ‖x‖², x̂ read back in the dtype of x."""
    import torch

    from lora_tools.linalg.svd import sum_of_squares

    assert item.packed is not None
    assert item.scheme is not None
    rows = x.view(_matrix(item.spec))
    errors, energies = [], []
    for start, stop in _runs(item.spec):
        back = torch.empty(stop - start, rows.shape[1], dtype=x.dtype)
        item.scheme.decode(item.packed, parts, back, start)
        wide = rows[start:stop].float()
        energies.append(sum_of_squares(wide))
        errors.append(sum_of_squares(back.float().sub_(wide)))
    return math.fsum(errors), math.fsum(energies)


def _matrix(spec: TensorSpec) -> tuple[int, int]:
    """(rows, cols) that a row decodes a weight as."""
    cols = spec.shape[-1] if len(spec.shape) > 1 else 1
    return spec.numel // max(cols, 1), cols


def _runs(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    from lora_tools.linalg.lora import rows_per_run

    shape = _matrix(spec)
    step = rows_per_run(shape)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def anew(packed: PackedWeight, spec: TensorSpec) -> PackedWeight:
    """What is stored of the weight with other numbers: tensors of the same sizes."""
    return packed


def ways(item: Item, parts: Parts) -> Sequence[Item]:
    """There is one."""
    return [item]


def block(packed: PackedWeight) -> int:
    """A code's place depends on its own number, but for the rounding of its scale."""
    return 1
