"""The base restored out of a merged checkpoint: the work of ``unmerge``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import (
    CheckpointError,
    LoraToolsError,
    MismatchError,
    NonFiniteError,
    UnsupportedAdapter,
)
from lora_tools.formats import digest as hashing
from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard, TensorSink
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.recorded import HashedWrites
from lora_tools.formats.safetensors_file import parse_header, strict_json
from lora_tools.formats.sidecar import NAME as SIDECAR_NAME
from lora_tools.formats.sidecar import Sidecar
from lora_tools.merging.plan import MergePlan, adapter_digest, build_effects
from lora_tools.merging.rewrite import Rewrite
from lora_tools.merging.targets import BaseOutline, Target
from lora_tools.merging.tensor import as_matrix, copy_tensor
from lora_tools.records import Report, TensorSpec
from lora_tools.sources.class_says import class_says
from lora_tools.sources.weighted import Weighted, digests_and_weights, settings_of
from lora_tools.totals import UnmergeTotals

if TYPE_CHECKING:
    import torch

_CHANGED = "the merged checkpoint, or an adapter's config, was changed after the merge"


@dataclasses.dataclass(frozen=True)
class Restored:
    """Hash of a restored tensor, and of an inexact one ‖·‖² of the bound on its error."""

    hash: str
    energy: float = 0.0
    bound: float = 0.0


def digests_like(recorded: Sequence[str], weighted: Sequence[Weighted]) -> list[str]:
    """The adapters' digests, to compare with recorded ones, which are all of one kind.

    Raises:
        MismatchError: of a kind that cannot be formed.
    """
    with hashing.using(hashing.kind_of(recorded[0]) if recorded else hashing.used()):
        return [adapter_digest(w.adapter) for w in weighted]


def check_recorded(merged: Checkpoint, weighted: Sequence[Weighted]) -> None:
    """Without a sidecar, what the metadata says was merged. Raises MismatchError."""
    recorded = merged.files[0].metadata.get("adapter_digests", "").split()
    if not recorded:
        return
    settings = merged.files[0].metadata.get("adapter_settings", "").split()
    given = digests_and_weights(digests_like(recorded, weighted), weighted).split()
    for mine, each in zip(given, weighted, strict=True):
        if mine in recorded and len(settings) == len(recorded):
            known = [s for d, s in zip(recorded, settings, strict=True) if d == mine]
            if settings_of([each]) not in known:
                raise MismatchError(
                    f"{each.path}: its config has other numbers (alpha, …) than when it was merged "
                    f"into {merged.path}; give the adapter as it was, or pass --allow-other-base "
                    "to subtract it anyway"
                )
        if mine not in recorded:
            raise MismatchError(
                f"{each.path}: the metadata of {merged.path} says that other adapters or weights "
                f"were merged ({', '.join(recorded)}); pass --allow-other-base to subtract it "
                "anyway"
            )


def check_adapters(memory: Sidecar, weighted: Sequence[Weighted]) -> None:
    """The adapters given must be those merged, in their order and with their weights."""
    used = memory.adapters
    digests = digests_like([d for d, _ in used], weighted)
    given = [(d, w.weight) for d, w in zip(digests, weighted, strict=True)]
    if given == used:
        return
    if sorted(given) == sorted(used):
        raise MismatchError("the adapters were merged in another order; give them in that order")
    if [d for d, _ in given] == [d for d, _ in used]:
        weights = ", ".join(f"{w:g}" for _, w in used)
        raise MismatchError(
            f"the adapters were merged with the weights {weights}; give ADAPTER=WEIGHT"
        )
    raise MismatchError(
        f"{memory.path}: made with {len(used)} adapter(s) that differ from those given; if an "
        "adapter was changed since, it cannot undo the merge"
    )


def base_outline(merged: Checkpoint, memory: Sidecar) -> tuple[BaseOutline, list[Shard]]:
    """The base's names, shapes and files as the sidecar remembers them."""
    specs: dict[str, TensorSpec] = {}
    shards = []
    for name, header in sorted(memory.headers().items()):
        mine, _, metadata = parse_header(header, None)
        specs.update(mine)
        shards.append(Shard(name, tuple(mine.values()), metadata, header))
    _check_files(memory, shards)
    config = merged.config
    if "config.json" in memory.files():
        config = strict_json(memory.files()["config.json"])
    says = functools.partial(class_says, config, specs)
    return BaseOutline(merged.path, specs, config, says=says), shards


def _check_files(memory: Sidecar, shards: Sequence[Shard]) -> None:
    """Raises CheckpointError where the base's files would not be found: by their names, or by the
    index that the sidecar holds."""
    where = {spec.name: shard.name for shard in shards for spec in shard.specs}
    if strange := [shard.name for shard in shards if not shard.name.endswith(".safetensors")]:
        raise CheckpointError(f"{memory.path}: {strange[0]!r} is not the name of a weight file")
    indexes = [name for name in memory.files() if name.endswith(".safetensors.index.json")]
    for name in indexes:
        index = strict_json(memory.files()[name])
        said = index.get("weight_map") if isinstance(index, dict) else None
        if said != where:
            raise CheckpointError(f"{memory.path}: its {name} contradicts its headers")
    if len(indexes) > 1:
        raise CheckpointError(f"{memory.path}: holds several indexes: {', '.join(indexes)}")


def check_merged(merged: Checkpoint, plan: MergePlan) -> None:
    """Raises MismatchError where the checkpoint is not what was merged."""
    for target in plan.targets:
        found = merged.specs.get(target.spec.name)
        if found != target.spec:
            raise MismatchError(
                f"{merged.path}: {target.spec} was merged, but now {found or 'nothing'} is there: "
                "the checkpoint was changed after the merge"
            )


def refuse_lossy(plan: MergePlan) -> None:
    """Raises UnsupportedAdapter for what cannot be undone without a sidecar."""
    for target in (*plan.targets, *plan.untied):
        for part in target.parts:
            if isinstance(part.source, ChangedModule) and part.source.kind.of_base:
                raise UnsupportedAdapter(
                    f"{target.spec.name}: cannot be undone without a sidecar "
                    f"({part.source.kind.title} depends on the old weight, which is lost); "
                    "`loratools merge --reversible` writes one"
                )
            if part.kind in ("dora", "saved", "rows", "ia3"):
                why = {
                    "dora": "DoRA needs the norms of the base, which are lost",
                    "ia3": "IA³ multiplied it, and dividing again would multiply the rounding",
                    "saved": "the adapter replaced it whole",
                    "rows": "the adapter replaced rows of it",
                }[part.kind]
                raise UnsupportedAdapter(
                    f"{target.spec.name}: cannot be undone without a sidecar ({why}); `loratools "
                    "merge --reversible` writes one"
                )
        if target in plan.untied:
            raise UnsupportedAdapter(
                f"{target.spec.name}: is tied to {target.base_name}, but the adapter changes only "
                "one of them, and merge would have separated them; another program made this "
                "checkpoint"
            )


def restore_tasks(plan: MergePlan) -> list[RestoreTensor]:
    """What is to be done on each tensor."""
    return [RestoreTensor(target) for target in plan.targets]


def unmerge_checkpoint(job: Rewrite, memory: Sidecar | None) -> Report[UnmergeTotals]:
    """Write the base out of ``job.source``, which was merged; with a sidecar its digest checks it,
    in the sidecar's own kind.

    Raises:
        MismatchError: what comes out is not the base that the sidecar names.
    """
    from lora_tools.engine import threads

    merged, targets = job.source, job.plan.targets
    kind = hashing.used() if memory is None else hashing.kind_of(memory.base_digest)
    with hashing.using(kind), job.writer() as writer:
        tasks = restore_tasks(job.plan)
        done = list(
            threads.run(tasks, (merged, memory), writer, jobs=job.jobs, progress=job.progress)
        )
        hashes = {t.spec.name: each.hash for t, each in zip(targets, done, strict=True)}
        digest = hashing.digest((target.spec for target in targets), hashes)
        if memory is not None and digest != memory.base_digest:
            raise MismatchError(
                f"the result is not the base ({digest} against {memory.base_digest}): {_CHANGED}"
            )
        files: Mapping[str, bytes] = memory.files() if memory is not None else {}
        index = next((name for name in files if name.endswith(".index.json")), None)
        writer.finish(
            merged,
            index or (merged.index_name if memory is None else None),
            files,
            leave=(SIDECAR_NAME,),
        )
    totals: UnmergeTotals = {
        **job.report.totals,
        "exact": memory is not None,
        "base_digest": digest,
    }
    if memory is None:
        energy = bound = 0.0
        for each in done:
            energy, bound = energy + each.energy, bound + each.bound
        totals["error_bound"] = math.sqrt(bound / energy) if energy else 0.0
    return dataclasses.replace(job.report, totals=totals)


@dataclasses.dataclass(frozen=True)
class RestoreTensor:
    """A task: restore one tensor of the base, run by run, out of a merged checkpoint and the
    sidecar, where there is one."""

    target: Target

    @property
    def label(self) -> str:
        return self.target.spec.name

    @property
    def nbytes(self) -> int:
        return self.target.spec.nbytes

    def run(
        self, sources: tuple[Checkpoint, Sidecar | None], sink: TensorSink, *_: object
    ) -> Restored:
        """Write the tensor. Raises NonFiniteError, CheckpointError, MismatchError."""
        from lora_tools.formats.tensors import as_bytes

        merged, memory = sources
        name = self.target.spec.name
        if not self.target.parts:
            return Restored(copy_tensor(merged, name, sink))
        out = HashedWrites(sink, name)
        with _damage_named(memory, name):
            runs = _RestoredRuns(self.target, merged, memory)
            for rows in runs:
                out.write(as_bytes(rows))
        merged.release(name)
        return Restored(out.hexdigest(), runs.energy, runs.bound)


@contextlib.contextmanager
def _damage_named(memory: Sidecar | None, tensor: str) -> Iterator[None]:
    """Whatever a listing that lies makes of torch and numpy is a CheckpointError."""
    try:
        yield
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        if memory is None or isinstance(error, LoraToolsError):
            raise
        text = " ".join(str(error).split())
        raise CheckpointError(
            f"{memory.path}: its data for {tensor} is damaged ({text:.100}); copy or download it "
            "again"
        ) from None


class _RestoredRuns:
    """The rows of a restored tensor seen as a matrix, run by run. Without a listing of the sidecar
    they are estimates: once they were gone through, ``energy`` is ‖·‖² and ``bound`` that of the
    bound on their error."""

    def __init__(self, target: Target, merged: Checkpoint, memory: Sidecar | None) -> None:
        from lora_tools.linalg.merge import TensorMerge, working_dtype

        self._name = target.spec.name
        self._source = as_matrix(merged.tensor(self._name), target)
        self._listing = (
            memory.listing(self._name, target.spec.numel) if memory is not None else None
        )
        stored = self._source.dtype
        in_double = memory is not None and not memory.is_first
        self._dtype = torch_dtype("F64") if in_double else working_dtype(stored)
        norms = self._listing.norms if self._listing is not None else ()
        self._shape = (self._source.shape[0], self._source.shape[1])
        self._work = TensorMerge(build_effects(target, None), self._shape, None, self._dtype, norms)
        self.energy = self.bound = 0.0

    def __iter__(self) -> Iterator[torch.Tensor]:
        from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs

        for i, (start, stop) in enumerate(row_runs(*self._shape, RUN_ELEMENTS)):
            rows = self._source[start:stop]
            if self._listing is not None:
                yield self._decoded(rows, start, self._listing.runs[i])
            else:
                estimate = self._work.estimate(rows.to(self._dtype, copy=True), start, stop)
                yield self._estimated(estimate.to(rows.dtype), rows, start, stop)

    def _decoded(self, rows: torch.Tensor, start: int, parts: tuple[bytes, ...]) -> torch.Tensor:
        """Those rows of the base, exactly."""
        from lora_tools.linalg import reversible as codec
        from lora_tools.linalg.runs import row_runs

        estimates = (
            self._work.estimate(rows[a:b].to(self._dtype, copy=True), start + a, start + b)
            for a, b in row_runs(*rows.shape)
        )
        try:
            return codec.decode(estimates, rows, codec.Coded(*parts))
        except (ValueError, IndexError) as error:
            raise MismatchError(
                f"{self._name}: the result is not the base ({error}): {_CHANGED}"
            ) from None

    def _estimated(
        self, base: torch.Tensor, rows: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """Those rows, and how far off they can be."""
        import torch

        from lora_tools.linalg.merge import others_dtype
        from lora_tools.linalg.truncation import sum_of_squares

        here = sum_of_squares(base.to(self._dtype))
        if not math.isfinite(here):
            raise NonFiniteError(
                f"{self._name}: holds an inf or a NaN once the adapters are subtracted; check the "
                "merged checkpoint and the adapters"
            )
        # Both roundings, of the merge and of this, are within half a unit in the last place;
        # the merge's sums were formed in what it, or whatever else merged, forms them in.
        unit = torch.finfo(rows.dtype).eps / 2 if rows.is_floating_point() else 0.0
        wide = rows.to(self._dtype)
        slack = self._work.slack(wide, start, stop, others_dtype(rows.dtype))
        summed = math.sqrt(sum_of_squares(slack))
        self.energy += here
        self.bound += (unit * (math.sqrt(sum_of_squares(wide)) + math.sqrt(here)) + summed) ** 2
        return base
