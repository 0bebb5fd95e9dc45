"""How much a tensor changed, whatever becomes of it: what a total has to count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

# A checkpoint, and what it has of the tensor.
Side = tuple[Checkpoint, TensorSpec | None]
_STEP = 1 << 24  # elements that are read at a time


def measured(ours: Side, theirs: Side) -> tuple[float, float]:
    """(‖tuned − base‖²_F, ‖base‖²_F) of a tensor of both sides or of one, by its runs of rows.

    Rows that one side only has, of a vocabulary that was resized, and a tensor that only the tuned
    side has count with all of their energy: they came out of nothing, or went into it. The change
    is infinite where a side holds an inf or a NaN that changed; (NaN, NaN) where a side is no
    float, and so has no energy.
    """
    (base, old), (tuned, new) = ours, theirs
    specs = [spec for spec in (old, new) if spec is not None]
    if not all(spec.is_float for spec in specs):
        return math.nan, math.nan
    common = min(map(_rows, specs)) if len(specs) == 2 else 0
    change = before = 0.0
    if old is not None and new is not None:
        from lora_tools.linalg.delta import Delta

        both = _runs(base, old, 0, common), _runs(tuned, new, 0, common)
        for W, T in zip(*both, strict=True):
            energies = Delta(T, W).measure()
            change, before = change + energies.delta, before + energies.base
    gone = _energy(base, old, common)
    change += gone + _energy(tuned, new, common)
    return change if math.isfinite(change) else math.inf, before + gone


def _rows(spec: TensorSpec) -> int:
    """Of the matrix that it is seen as; of a vector, its elements."""
    return math.prod(spec.shape[: max(len(spec.shape) - 1, 1)])


def _runs(side: Checkpoint, spec: TensorSpec, start: int, stop: int) -> Iterator[torch.Tensor]:
    """Rows [start, stop), some at a time."""
    if not spec.numel:
        return
    rows = _rows(spec)
    cols = spec.numel // rows
    step, row = max(_STEP // cols, 1), spec.nbytes // rows
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield side.rows(spec.name, (rows, cols), first, last)
        side.release(spec.name, first * row, last * row)


def _energy(side: Checkpoint, spec: TensorSpec | None, start: int) -> float:
    """‖·‖²_F of the rows from ``start`` on."""
    from lora_tools.linalg.truncation import sum_of_squares

    if spec is None:
        return 0.0
    runs = _runs(side, spec, start, _rows(spec))
    return math.fsum(sum_of_squares(run if run.itemsize > 4 else run.float()) for run in runs)
