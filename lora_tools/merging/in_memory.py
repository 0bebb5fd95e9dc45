"""Tensors merged into memory, where they are worked on and not written."""

from __future__ import annotations

import dataclasses
from collections import deque
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import MergedRun, MergedRuns, MergeTensor, check_finite
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

_LOOKED_AT = 1 << 16  # numbers at a time, in search of one that is changed
_FEW = 4  # runs, by which a tensor may be formed further than it is read back


class _Memory:
    """Takes the bytes of one tensor into a contiguous one."""

    def __init__(self, into: torch.Tensor) -> None:
        from lora_tools.formats.tensors import as_bytes

        assert into.is_contiguous()
        self._bytes = as_bytes(into)

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        self._bytes[offset : offset + data.nbytes] = data


def merge_into(out: torch.Tensor, target: Target, source: Checkpoint, spec: TensorSpec) -> str:
    """Fill ``out``, contiguous and of the shape and dtype of ``spec``, with the merged tensor;
    returns the hash of the one it was made of. Raises NonFiniteError."""
    return MergeTensor(target, spec).run(source, _Memory(out)).base_hash


def merged_in(target: Target, source: Checkpoint, dtype: str) -> tuple[torch.Tensor, str]:
    """The merged tensor in that dtype, and the hash of the one it was made of."""
    import torch

    spec = dataclasses.replace(target.spec, dtype=dtype)
    out = torch.empty(spec.shape, dtype=torch_dtype(dtype))
    return out, merge_into(out, target, source, spec)


def largest_in(target: Target, source: Checkpoint, spec: TensorSpec) -> float:
    """The largest magnitude of the merged tensor; NaN where it holds one."""
    import torch

    dtype = torch_dtype(spec.dtype)
    runs = (run.exact.to(dtype) for run in MergedRuns(target, source, spec))
    found = [run.abs().amax().float() for run in runs if run.numel()]
    source.release(target.base_name)
    return float(torch.stack(found).amax()) if found else 0.0


def changes(runs: MergedRuns) -> bool:
    """Whether any number of the sum is another one; looks no further than the first of them."""
    import torch

    from lora_tools.linalg.runs import row_runs

    return any(
        not torch.equal(runs.run(start, stop).exact, runs.read(start, stop))
        for start, stop in row_runs(*runs.shape, _LOOKED_AT)
    )


class MergeInMemory:
    """A merged tensor that is formed in memory as far as it is wanted, and then held against what
    was made of it. A few of its runs are kept between the two; others are formed twice."""

    def __init__(
        self, out: torch.Tensor, target: Target, source: Checkpoint, spec: TensorSpec
    ) -> None:
        """``out``: as ``merge_into`` has it."""
        import torch

        from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs

        self._runs, self._name = MergedRuns(target, source, spec), spec.name
        self._out = out.view(self._runs.shape)
        self._to_form = deque(row_runs(*self._runs.shape, RUN_ELEMENTS))
        self._to_compare = self._to_form.copy()
        self._kept: dict[int, tuple[MergedRun, torch.Tensor]] = {}
        self._room, self._waiting = torch.empty(0), 0  # a run that is not whole yet
        self.survival = self._runs.survival()

    def changes(self) -> bool:
        """As the function."""
        return changes(self._runs)

    def form(self, count: int) -> None:
        """Fill in the first ``count`` numbers, at least. Raises NonFiniteError."""
        cols = self._runs.shape[1]
        while self._to_form and self._to_form[0][0] * cols < count:
            start, stop = self._to_form.popleft()
            run = self._runs.run(start, stop)
            check_finite(run.exact, self._out[start:stop].copy_(run.exact), self._name)
            if self.survival is not None and len(self._kept) < _FEW:
                self._kept[start] = run, self._runs.read(start, stop)

    def compare(self, written: torch.Tensor) -> None:
        """See how much of the change is left in the next numbers, flat and in float32, of what
        stands for the sum."""
        import torch

        cols, at = self._runs.shape[1], 0
        while self._to_compare and at < len(written):
            start, stop = self._to_compare[0]
            size = (stop - start) * cols
            part = written[at : at + size - self._waiting]
            if len(part) < size:  # of a run, which is looked at as a whole
                if len(self._room) < size:
                    self._room = torch.empty(size)
                self._room[self._waiting : self._waiting + len(part)] = part
            at, self._waiting = at + len(part), self._waiting + len(part)
            if self._waiting == size:
                whole = part if len(part) == size else self._room[:size]
                self._compare_run(whole.view(stop - start, cols))

    def _compare_run(self, written: torch.Tensor) -> None:
        start, stop = self._to_compare.popleft()
        self._waiting = 0
        if self.survival is not None:
            kept = self._kept.pop(start, None)
            run, base = kept or (self._runs.run(start, stop), self._runs.read(start, stop))
            self.survival.add(base, run.exact, written)
