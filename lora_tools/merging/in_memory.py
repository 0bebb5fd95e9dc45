"""Tensors merged into memory, where they are worked on and not written."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import MergedRuns, MergeTensor
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_tools.linalg.merge import Survival


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


def survival_of(
    written: torch.Tensor, target: Target, source: Checkpoint, spec: TensorSpec
) -> Survival | None:
    """How much of a merge's change is left in ``written`` (rows, cols), which stands for its sum;
    None where the tensor has another shape than the source's."""
    runs = MergedRuns(target, source, spec)
    survival = runs.survival()
    if survival is not None:
        for run in runs:
            survival.add(runs.read(run.start, run.stop), run.exact, written[run.start : run.stop])
        source.release(target.base_name)
    return survival
