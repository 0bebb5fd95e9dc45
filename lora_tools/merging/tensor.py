"""The work of ``merge`` on one tensor: copied through, or the effects on it added run by run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import NonFiniteError
from lora_tools.figures import Total
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import TensorSink
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.recorded import HashedWrites
from lora_tools.merging.plan import build_effects
from lora_tools.merging.targets import Target
from lora_tools.records import TensorSpec
from lora_tools.totals import SurvivalTotals

if TYPE_CHECKING:
    import torch

    from lora_tools.formats.sidecar import Packed
    from lora_tools.linalg.merge import Survival
    from lora_tools.linalg.reversible import Coded, Rows

_COPY_STEP = 8 << 20


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """Hashes of one tensor before and after, and what undoes the change."""

    base_hash: str
    out_hash: str
    listing: Packed | None = None
    survival: Survival | None = None


@dataclasses.dataclass(frozen=True)
class MergeTensor:
    """A task: merge one tensor of a checkpoint, writing it run by run, or copy it where nothing
    acts on it.

    Attributes:
        spec: of the output.
        nbytes: working memory.
        reversible: list what undoes the change.
        measured: find out how much of the change is left after rounding.
    """

    target: Target
    spec: TensorSpec
    nbytes: int = 0
    reversible: bool = False
    measured: bool = False

    @property
    def label(self) -> str:
        return self.spec.name

    def run(self, base: Checkpoint, sink: TensorSink, *_: object) -> MergedTensor:
        """Write the tensor. Raises NonFiniteError."""
        if _is_copied(self.target, base, self.spec):
            digest = copy_tensor(base, self.spec.name, sink)
            return MergedTensor(digest, digest)
        base_hash = base.stored_hash(self.target.base_name)
        out_hash, listing, survival = self._write(MergedRuns(self.target, base, self.spec), sink)
        base.release(self.target.base_name)
        return MergedTensor(base_hash, out_hash, listing, survival)

    def _write(
        self, runs: MergedRuns, sink: TensorSink
    ) -> tuple[str, Packed | None, Survival | None]:
        from lora_tools.formats.tensors import as_bytes

        dtype, out = torch_dtype(self.spec.dtype), HashedWrites(sink, self.spec.name)
        lister = _Lister(runs) if self.reversible else None
        survival = runs.survival() if self.measured else None
        for run in runs:
            merged = run.exact.to(dtype)
            check_finite(run.exact, merged, self.spec.name)
            out.write(as_bytes(merged))
            if survival is not None:
                survival.add(runs.read(run.start, run.stop), run.exact, merged)
            if lister is not None:
                lister.add(run, merged)
        return out.hexdigest(), lister.listing() if lister is not None else None, survival


def _is_copied(target: Target, base: Checkpoint, spec: TensorSpec) -> bool:
    """Whether the tensor ``spec`` of the output is the base's as it is."""
    dtype = base.specs[target.base_name].dtype
    return not target.parts and spec.dtype == dtype and spec.name == target.base_name


def copy_tensor(source: Checkpoint, name: str, sink: TensorSink) -> str:
    """Copy a tensor's bytes through; returns their hash."""
    raw, out = source.raw(name), HashedWrites(sink, name)
    for offset in range(0, raw.nbytes, _COPY_STEP):
        chunk = raw[offset : offset + _COPY_STEP]
        out.write(chunk)
        source.release(name, offset, offset + chunk.nbytes)
    return out.hexdigest()


def as_matrix(tensor: torch.Tensor, target: Target) -> torch.Tensor:
    """A tensor of any rank as the matrix (rows, cols) that it is worked on as, without a copy."""
    return tensor.reshape(target.matrix(tuple(tensor.shape)))


@dataclasses.dataclass(frozen=True)
class MergedRun:
    """Rows [start, stop) of a merged tensor before they are rounded."""

    start: int
    stop: int
    exact: torch.Tensor


class MergedRuns:
    """A tensor seen as a matrix, with the effects on it: run of rows by run of rows, and formed
    anew whenever it is gone through."""

    def __init__(self, target: Target, base: Checkpoint, spec: TensorSpec) -> None:
        import torch

        from lora_tools.linalg.merge import TensorMerge, others_dtype, working_dtype

        self.shape = target.matrix(base.specs[target.base_name].shape)
        self._decoded = base.decoder(target.base_name, self.shape)
        self.source: torch.Tensor | None = None  # where it is decoded, run by run, in cache
        self._kept: tuple[int, int, torch.Tensor] | None = None  # the run that was decoded last
        dtype = torch.float32
        if self._decoded is None:
            self.source = as_matrix(base.tensor(target.base_name), target)
            dtype = self.source.dtype
        self._working = torch.promote_types(
            working_dtype(torch_dtype(spec.dtype)), others_dtype(dtype)
        )
        self.effects = build_effects(target, base.tensor)
        self.work = TensorMerge(self.effects, self.shape, self.read, self._working)

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the base in the working dtype, a copy."""
        if self._decoded is not None:
            if self._kept is None or self._kept[:2] != (start, stop):
                self._kept = start, stop, self._decoded(start, stop)
            return self._kept[2].to(self._working, copy=True)
        assert self.source is not None
        return self.source[start:stop].to(self._working, copy=True)

    def __iter__(self) -> Iterator[MergedRun]:
        from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs

        for start, stop in row_runs(*self.shape, RUN_ELEMENTS):
            yield self.run(start, stop)

    def run(self, start: int, stop: int) -> MergedRun:
        """Rows [start, stop), which are to be those of a run."""
        return MergedRun(start, stop, self.work.forward(self.read(start, stop), start, stop))

    def survival(self) -> Survival | None:
        """To measure with how much of a change is left; None where there is none to measure."""
        from lora_tools.linalg.merge import Survival

        return Survival() if self.effects else None


class _Lister:
    """Lists, run by run, what turns a merged tensor back into the base's."""

    def __init__(self, runs: MergedRuns) -> None:
        from lora_tools.linalg.merge import TensorMerge

        self._runs, self._coded = runs, list["Coded"]()
        # In float64 other machines' estimates differ by so little that hardly any is listed.
        wide = torch_dtype("F64")
        self._wide = TensorMerge(runs.effects, runs.shape, None, wide, runs.work.norms)

    def add(self, run: MergedRun, merged: torch.Tensor) -> None:
        from lora_tools.linalg import reversible as codec
        from lora_tools.linalg.runs import row_runs

        pieces = row_runs(*merged.shape)
        self._coded.append(
            codec.encode(self._rows(merged[a:b], run.start + a, run.start + b) for a, b in pieces)
        )

    def _rows(self, merged: torch.Tensor, start: int, stop: int) -> Rows:
        from lora_tools.linalg.reversible import Rows

        assert self._runs.source is not None
        rows = merged.to(self._wide.dtype, copy=True)
        slack = self._wide.slack(rows, start, stop)
        estimate = self._wide.estimate(rows, start, stop)
        return Rows(self._runs.source[start:stop], merged, estimate, slack)

    def listing(self) -> Packed:
        from lora_tools.formats.sidecar import Listing, Packed

        return Packed.of(Listing(tuple(self._coded), tuple(self._runs.work.norms)))


def survival_totals(survivals: Sequence[Survival]) -> SurvivalTotals:
    """What all of them come to: the share of the change that was kept, and the error beside it."""
    total = Total.of((s.wanted, s.error) for s in survivals)
    if not total.energy:
        return {}
    return {
        "delta_kept": math.fsum(s.moved for s in survivals) / total.energy,
        "delta_error": total.relative_error,
    }


def check_finite(exact: torch.Tensor, rounded: torch.Tensor, name: str) -> None:
    """Raises NonFiniteError for numbers of a merged tensor that are none as they were rounded."""
    import torch

    if not exact.numel() or not rounded.is_floating_point():
        return
    low, high = torch.aminmax(exact)  # NaN propagates and fails both comparisons
    limit = torch.finfo(rounded.dtype).max
    if not (float(low) >= -limit and float(high) <= limit) and not rounded.isfinite().all():
        raise NonFiniteError(
            f"{name}: the merged tensor holds an inf or a NaN in {rounded.dtype}; check the base "
            "and the adapter; a wider dtype holds more"
        )
