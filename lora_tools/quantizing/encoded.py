"""A weight as its row's ``encode`` stores it: the way to write of every scheme without one of its
own in ``quantizing.pack``."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import NonFiniteError
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.quantizing.feeding import Feeder, with_outputs
from lora_tools.quantizing.plan import Item
from lora_tools.records import TensorResult, TensorSpec
from lora_tools.sources.schemes.row import is_finite, matrix_of

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.sources.schemes.row import Parts


_BAND = 1 << 20  # numbers that are encoded at once, where so few can be


def pack(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    done: Callable[[int, int], None],
    read: Callable[[torch.Tensor], None] | None,
    ready: Callable[[int], None],
) -> TensorResult:
    """Quantize a flat tensor and write what its row makes of it, as ``quantizing.pack.Way``
    says."""
    item = _with_own_scale(item, x, ready)
    feeder = Feeder(item) if item.feeding is not None else None
    bands = _bands(item, x, writer, buffers, ready, feeder)
    error, energy = _measured(item, x, bands, done, buffers, read)
    bits = 8 * item.nbytes / x.numel()
    relative = math.sqrt(error / energy) if energy else 0.0
    result = TensorResult(item.name, item.spec.shape, bits, relative, math.sqrt(energy))
    return result if feeder is None else with_outputs(result, feeder.errors)


def _with_own_scale(item: Item, x: torch.Tensor, ready: Callable[[int], None]) -> Item:
    """The item with the scale of all its numbers, where its row has one, and may encode it by rows
    once that is known."""
    packed: Any = item.packed
    assert item.scheme is not None
    if getattr(packed, "shared", 0.0) is not None or item.scheme.shared_for(packed, 1.0) is None:
        return item
    ready(x.numel())
    shared = item.scheme.shared_for(packed, _largest(x))
    return dataclasses.replace(item, packed=dataclasses.replace(packed, shared=shared))


def _largest(x: torch.Tensor) -> float:
    """The largest magnitude of a flat tensor; NaN where it holds one."""
    import torch

    low, high = torch.aminmax(x)
    return float(torch.maximum(-low, high))


@dataclasses.dataclass(frozen=True)
class _Band:
    """Rows [start, stop) of a weight, encoded by themselves."""

    start: int
    stop: int
    parts: Parts


def _bands(
    item: Item,
    x: torch.Tensor,
    writer: Sink | None,
    buffers: Buffers,
    ready: Callable[[int], None],
    feeder: Feeder | None,
) -> Iterator[_Band]:
    """The weight in bands of few rows, where its row encodes them by themselves: they stay in cache
    until they are measured. Each is written before it is given. Raises NonFiniteError."""
    import torch

    assert item.packed is not None
    assert item.scheme is not None
    matrix = rows, cols = matrix_of(item.spec)
    unit = item.scheme.unit(item.packed)
    height = _BAND // cols if feeder is None else feeder.rows
    step = max(height // unit, 1) * unit if unit else rows
    shape = item.spec.shape if step >= rows else None
    written: Counter[str] = Counter()
    with buffers.lend((min(step, rows), cols), torch.float32) as room:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            ready(stop * cols)
            wide = room[: stop - start].copy_(x.view(matrix)[start:stop])
            packed = item.packed
            if item.before is not None:
                packed = item.scheme.keeping(packed, item.before, start, stop)
            parts: Parts = _encoded(item, packed, wide if shape is None else wide.view(shape))
            if feeder is not None:
                parts = feeder.feed(wide, parts)
            if writer is not None:
                _write(item.packed, parts, writer, written)
            yield _Band(start, stop, parts)


def _write(packed: PackedWeight, parts: Parts, writer: Sink, written: Counter[str]) -> None:
    """Write what is stored of some rows behind what is ``written``, bytes by part."""
    from lora_tools.formats.tensors import as_bytes

    for part, tensor in parts.items():
        spec, data = packed.specs[part], as_bytes(tensor)
        if written[part] < spec.nbytes or not spec.nbytes:  # else it is of all rows
            writer.write(spec.name, data, written[part])
            written[part] += data.nbytes


def _encoded(item: Item, packed: PackedWeight, wide: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is stored, but for scales of activations. Raises NonFiniteError."""
    assert item.scheme is not None
    assert item.scheme.encode is not None
    parts = item.scheme.encode(packed, wide)
    for part, tensor in list(parts.items())[1:]:
        if tensor.is_floating_point() and not is_finite(tensor):
            raise NonFiniteError(
                f"{packed.specs[part].name}: its numbers are so large that a scale overflows"
            )
    return parts


def _measured(
    item: Item,
    x: torch.Tensor,
    bands: Iterator[_Band],
    done: Callable[[int, int], None],
    buffers: Buffers,
    read: Callable[[torch.Tensor], None] | None,
) -> tuple[float, float]:
    """‖x̂ − x‖² and ‖x‖², x̂ read back in the dtype of x; unrounded ``read`` takes it, if given."""
    import torch

    from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs, rows_per_run

    assert item.packed is not None
    assert item.scheme is not None
    matrix = rows, cols = matrix_of(item.spec)
    errors, energies = [], []
    band = next(bands)
    height, dtype = min(rows_per_run(matrix), rows), x.dtype if read is None else torch.float32
    with buffers.lend((height, cols), dtype) as room:
        for start, stop in row_runs(*matrix, RUN_ELEMENTS):
            run, at = room[: stop - start], start
            while at < stop:
                band = band if at < band.stop else next(bands)
                upto = min(stop, band.stop)
                part = run[at - start : upto - start]
                item.scheme.decode(item.packed, band.parts, part, at - band.start)
                at = upto
            first, last = start * cols, stop * cols
            if read is not None:
                read(run.view(-1))
            error, energy = _distances(run.view(-1), x[first:last])
            errors.append(error)
            energies.append(energy)
            done(first, last)
    return math.fsum(errors), math.fsum(energies)


def _distances(read: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    """‖x̂ − x‖² and ‖x‖² of a run (n,), x̂ being ``read`` in the dtype of x."""
    import torch

    from lora_tools.linalg.runs import row_runs
    from lora_tools.linalg.truncation import sum_of_squares

    errors, energies = [], []
    for start, stop in row_runs(len(x), 1):
        wide = x[start:stop].to(torch.float32, copy=True)
        energies.append(sum_of_squares(wide))
        back = read[start:stop].to(x.dtype).float()
        errors.append(sum_of_squares(torch.sub(back, wide, out=wide)))
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
