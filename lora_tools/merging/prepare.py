"""A merge from its options to something that can be written anywhere: for ``merge``, and for the
verbs that merge on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_tools.engine import rates
from lora_tools.errors import UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard, lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import Prepared
from lora_tools.merging.checkpoint import merge_checkpoint, merge_tasks, refuse_fitted
from lora_tools.merging.fit import fit_base
from lora_tools.merging.jobs import rewriting_jobs
from lora_tools.merging.loadable import notes_on_loading, refuse_unloadable
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import MergePlan, plan_merge
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.options import Matching, Running, Storage
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import Weighted, input_bytes, open_weighted

Adapters = Sequence[str | Path | tuple[str | Path, float]]
SIDECAR = ".sidecar"  # of a bare file
OUTSIDE = "outside the transformer"


def copied_modules(source: Checkpoint) -> Iterator[Fate]:
    """Fates of weights outside the transformer of a sentence-transformers folder, file by file."""
    if source.pipeline is not None:
        root = source.pipeline.root
        for path in source.pipeline.files():
            name, nbytes = path.relative_to(root).as_posix(), path.stat().st_size
            yield Fate(name, Action.COPY, OUTSIDE, nbytes)


def dtype_of(storage: Storage) -> str | None:
    """safetensors' name of the dtype asked for. Raises UsageError."""
    return parse_float_dtype(storage.dtype) if storage.dtype else None


def limit_of(storage: Storage, source: Checkpoint) -> int | None:
    """Most bytes of a file. Raises UsageError, also where there is one file in any case."""
    if storage.shard_size is None:
        return None
    if not source.is_folder:
        raise UsageError("--shard-size needs a folder; a bare file stays one file")
    if source.models:
        raise UsageError("--shard-size: the models of a pipeline keep their files")
    return parse_size(storage.shard_size)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A checkpoint that another is made of, adapters to be added, and what becomes of each tensor.

    Attributes:
        given: the checkpoint as it was named; role: what the report calls it.
    """

    given: str
    role: str
    source: Checkpoint
    adapters: Sequence[Weighted]
    plan: MergePlan
    allow_other_base: bool = False

    def report(
        self, verb: str, fates: Sequence[Fate], totals: dict[str, int], command: str
    ) -> Report[Any]:
        """The report of the plan; where the output goes, and whether it is made, is not known."""
        return Report(
            verb,
            tool_version(),
            (Input(self.role, self.given), *(Input("adapter", w.as_given) for w in self.adapters)),
            "",
            False,
            (*fates, *copied_modules(self.source)),
            totals=dict(totals),
            notes=(*self.plan.notes, *notes_on_loading(self.source)),
            command=command,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are read."""
        return self.source.stored.nbytes + input_bytes(self.adapters)

    def paths(self) -> tuple[Path, ...]:
        """All that is read."""
        return self.source.path, *(w.adapter.path for w in self.adapters)

    def rewrite(self, report: Report[Any], shards: Sequence[Shard], running: Running) -> Rewriting:
        """The job of writing these files, once it is known where."""
        return lambda out: Rewrite(
            report,
            self.source,
            self.adapters,
            self.plan,
            shards,
            out,
            running.jobs,
            running.progress,
            self.allow_other_base,
        )


Rewriting = Callable[[Path], Rewrite]


def plan_merging(
    base: str | Path,
    adapters: Adapters,
    matching: Matching,
    running: Running,
    needs_adapters: bool = True,
    pipelines: bool = False,
) -> Planned:
    """Open a base and adapters, and plan their merge. Headers only are read.

    Args:
        pipelines: the base may be a diffusers pipeline.

    Raises:
        UsageError: there is no adapter where one is needed; nothing is read then.
        LoraToolsError: they cannot be read, or do not fit.
    """
    if needs_adapters and not adapters:
        raise UsageError("no ADAPTER; give at least one, or --dtype to change only the dtype")
    source = open_checkpoint(base, running.allow_pickle, pipelines=pipelines)
    weighted: list[Weighted] = []
    if adapters:
        weighted = open_weighted(adapters, running.allow_pickle, source, matching.allow_unmatched)
    source = fit_base(source, weighted, matching.allow_unmatched)
    plan = plan_merge(source, weighted, matching.allow_unmatched)
    return Planned(str(base), "base", source, weighted, plan, matching.allow_other_base)


def prepare_merge(
    planned: Planned, storage: Storage, running: Running, command: str, reversible: bool = False
) -> Prepared:
    """The merged checkpoint: W + Σ weight · (its effect on W), rounded once.

    Args:
        reversible: with a sidecar by which ``unmerge`` gives the base back.

    Raises:
        UsageError: what cannot be, such as four bits that a sidecar should give back.
    """
    base, wanted = planned.source, dtype_of(storage)
    limit = limit_of(storage, base)
    if reversible:
        _refuse_irreversible(planned, wanted)
    specs = out_specs(planned.plan, wanted)
    refuse_unloadable(base, planned.plan, specs)
    shards = lay_out(base, specs, limit)
    shards = signed(shards, command, planned.adapters)
    nbytes = sum(shard.nbytes for shard in shards)
    report = planned.report("merge", planned.plan.fates(), {"bytes": nbytes}, command)
    job = planned.rewrite(report, shards, running)
    bare = () if base.is_folder else (SIDECAR,)
    return Prepared(
        report,
        planned.paths(),
        nbytes,
        planned.nbytes,
        lambda out: merge_checkpoint(job(out), reversible),
        passes=rates.MERGE_REVERSIBLE if reversible else rates.MERGE,
        jobs=lambda: rewriting_jobs(
            ((t, (t.target,), (t.spec,)) for t in merge_tasks(base, planned.plan, specs)),
            base,
            shards,
            report.plan,
        ),
        beside=bare if reversible else (),
        dropped=() if reversible else bare,
        pipeline=base.pipeline,
        is_folder=base.is_folder,
        copied=base.copied(),
    )


def merge_for_now(
    base: str | Path,
    adapters: Adapters,
    out: Path,
    dtype: str | None,
    running: Running,
    allow_unmatched: bool = False,
) -> None:
    """Write a merged checkpoint to be read and removed again, whatever base its adapters name."""
    matching = Matching(allow_unmatched=allow_unmatched, allow_other_base=True)
    planned = plan_merging(base, adapters, matching, running, needs_adapters=not dtype)
    storage = Storage(dtype=dtype)
    command = command_of("merge", storage, matching)
    prepare_merge(planned, storage, running, command).write(out)


def refuse_quantized_undo(base: Checkpoint) -> None:
    """Raises UsageError for a base whose stored numbers no sidecar gives back."""
    if base.scheme is not None:
        raise UsageError(f"--reversible: a BASE in {base.scheme.title} cannot be restored")


def _refuse_irreversible(planned: Planned, wanted: str | None) -> None:
    base = planned.source
    refuse_quantized_undo(base)
    if base.models:
        raise UsageError(
            f"--reversible: {base.path} is a pipeline, and a sidecar is for one model; merge into "
            f"the folder of one model, such as {base.path / next(iter(base.models))}"
        )
    if wanted and any(s.is_float and s.dtype != wanted for s in base.specs.values()):
        raise UsageError("--reversible keeps the base's dtypes: leave --dtype out")
    refuse_fitted(base)
