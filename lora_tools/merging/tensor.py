"""The work of ``merge`` on one tensor: copied through, or the effects on it added run by run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import xxhash

from lora_tools.errors import NonFiniteError
from lora_tools.figures import Total
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.merging.plan import build_effects
from lora_tools.merging.targets import Target
from lora_tools.records import TensorSpec

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.sidecar import Listing
    from lora_tools.linalg.merge import Survival

_COPY_STEP = 8 << 20


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """Hashes of one tensor before and after, and what undoes the change."""

    base_hash: str
    out_hash: str
    listing: Listing | None = None
    survival: Survival | None = None


Write = Callable[[str, memoryview, int], None]


def copy_tensor(source: Checkpoint, name: str, write: Write) -> str:
    """Copy a tensor's bytes through; returns their hash."""
    raw, state = source.raw(name), xxhash.xxh3_128()
    for offset in range(0, raw.nbytes, _COPY_STEP):
        chunk = raw[offset : offset + _COPY_STEP]
        state.update(chunk)
        write(name, chunk, offset)
        source.release(name, offset, offset + chunk.nbytes)
    return state.hexdigest()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a tensor is worked on in."""
    from lora_tools.linalg.merge import working_dtype

    return working_dtype(dtype)


def as_matrix(tensor: torch.Tensor, target: Target) -> torch.Tensor:
    """A tensor of any rank as the matrix (rows, cols) that it is worked on as, without a copy."""
    return tensor.reshape(target.matrix(tuple(tensor.shape)))


def merge_tensor(
    target: Target,
    base: Checkpoint,
    spec: TensorSpec,
    write: Write,
    reversible: bool = False,
    measured: bool = False,
    stand_in: torch.Tensor | None = None,
) -> MergedTensor:
    """Merge one tensor, writing it run by run, or copy it where nothing acts on it.

    Args:
        measured: find out how much of the change is left after rounding; ``stand_in`` (rows, cols)
            is what was written, where that is not the rounded sum.
    """
    from lora_tools.formats.tensors import as_bytes
    from lora_tools.linalg import reversible as codec
    from lora_tools.linalg.lora import rows_per_run
    from lora_tools.linalg.merge import Survival, TensorMerge

    stored = base.specs[target.base_name]
    if not target.parts and spec.dtype == stored.dtype and spec.name == target.base_name:
        digest = copy_tensor(base, target.base_name, write)
        return MergedTensor(digest, digest)
    base_hash = hashing.tensor_hash(base.raw(target.base_name))
    dtype = torch_dtype(spec.dtype)
    source = as_matrix(base.tensor(target.base_name), target)
    working = working_dtype(source.dtype)

    def read(start: int, stop: int) -> torch.Tensor:
        return source[start:stop].to(working, copy=True)

    effects = build_effects(target)
    if spec.shape != stored.shape:  # saved whole with another vocabulary
        source = as_matrix(
            target.parts[0].weighted.adapter.tensor(str(target.parts[0].source)), target
        )
    shape = (source.shape[0], source.shape[1])
    work = TensorMerge(effects, shape, read, working)
    # An estimate in float64 keeps the listing of a float32 base short.
    wide = (
        work
        if dtype.itemsize < 4
        else TensorMerge(effects, shape, None, torch_dtype("F64"), work.norms)
    )
    state, runs, offset = xxhash.xxh3_128(), [], 0
    survival = Survival() if measured and effects and spec.shape == stored.shape else None
    step = rows_per_run(shape)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        exact = work.forward(read(start, stop), start, stop)
        merged = exact.to(dtype)
        _check_finite(exact, merged, spec.name)
        data = as_bytes(merged)
        write(spec.name, data, offset)
        state.update(data)
        if survival is not None:
            written = merged if stand_in is None else stand_in[start:stop]
            survival.add(read(start, stop), exact, written)
        if reversible:
            slack = wide.slack(merged.to(wide.dtype), start, stop)
            estimate = wide.estimate(merged.to(wide.dtype, copy=True), start, stop)
            where = codec.listed(source[start:stop], estimate, slack)
            runs.append(codec.encode(source[start:stop], merged, where))
        offset += data.nbytes
    base.release(target.base_name)
    listing = _listing(runs, work.norms) if reversible else None
    return MergedTensor(base_hash, state.hexdigest(), listing, survival)


def survival_totals(survivals: Sequence[Survival]) -> dict[str, float]:
    """What all of them come to: the share of the change that was kept, and the error beside it."""
    total = Total.of((s.wanted, s.error) for s in survivals)
    if not total.energy:
        return {}
    return {
        "delta_kept": math.fsum(s.moved for s in survivals) / total.energy,
        "delta_error": total.relative_error,
    }


def _listing(runs: list[tuple[bytes, bytes]], norms: Sequence[torch.Tensor]) -> Listing:
    from lora_tools.formats.sidecar import Listing

    return Listing(tuple(runs), tuple(norms))


def _check_finite(exact: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    import torch

    if not exact.numel() or not rounded.is_floating_point():
        return
    low, high = torch.aminmax(exact)  # NaN propagates and fails both comparisons
    limit = torch.finfo(rounded.dtype).max
    if not (float(low) >= -limit and float(high) <= limit) and not rounded.isfinite().all():
        raise NonFiniteError(
            f"{name}: the merged tensor holds an inf or a NaN in {rounded.dtype}; check the base "
            "and the adapter, or choose a wider --dtype"
        )
