"""``unmerge``: the base back out of a merged checkpoint, bit for bit where a sidecar lies by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from lora_tools.engine import rates
from lora_tools.errors import CheckpointError, MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard, lay_out
from lora_tools.formats.output import Prepared
from lora_tools.formats.regular_files import is_there
from lora_tools.formats.sidecar import Sidecar, sidecar_path
from lora_tools.merging.jobs import rewriting_jobs
from lora_tools.merging.plan import MergePlan, adapter_digest, plan_merge
from lora_tools.merging.prepare import Adapters, copied_modules
from lora_tools.merging.rewrite import Rewrite
from lora_tools.merging.undo import (
    base_outline,
    check_adapters,
    check_merged,
    check_recorded,
    refuse_lossy,
    restore_tasks,
    unmerge_checkpoint,
)
from lora_tools.options import Matching, Undoing
from lora_tools.provenance import tool_version
from lora_tools.records import Action, Fate, Input
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import Weighted, input_bytes, open_weighted
from lora_tools.verbs.frame import Call, verb


@verb
def unmerge(
    call: Call, merged: str | Path, adapters: Adapters, undoing: Undoing, matching: Matching
) -> Prepared:
    """Write to ``out`` the base that ``merged`` was made of.

    With the sidecar that ``merge(reversible=True)`` wrote, the result is the base bit for bit, and
    is checked against the base's digest before it appears. Without, the adapters' deltas are
    subtracted and the report's ``error_bound`` states the most that rounding can have lost:
    ‖result − base‖_F ≤ error_bound · ‖result‖_F.

    Args:
        merged: a checkpoint folder, a safetensors file or a hub id.
        adapters: those merged: ``path``, ``"path=weight"`` or ``(path, weight)``.

    Raises:
        MismatchError: the adapters are not those merged, or the result is not the base.
        UnsupportedAdapter: without a sidecar, where subtraction cannot undo the merge.
    """
    allow_pickle = call.running.allow_pickle
    checkpoint = open_checkpoint(merged, allow_pickle, pipelines=True)
    if checkpoint.scheme is not None:
        raise CheckpointError(
            f"{checkpoint.path}: is in {checkpoint.scheme.title}, and its rounding cannot be "
            "undone; unmerge the checkpoint that it was quantized from, or run `loratools "
            "dequantize` first"
        )
    weighted = open_weighted(adapters, allow_pickle, checkpoint, matching.allow_unmatched)
    memory = _memory(checkpoint, undoing.sidecar)
    digests = [adapter_digest(w.adapter) for w in weighted]
    if memory is not None:
        check_adapters(memory, weighted)
        outline, shards = base_outline(checkpoint, memory)
        plan = plan_merge(outline, weighted, matching.allow_unmatched, undoing=True)
        check_merged(checkpoint, plan)
    else:
        if not matching.allow_other_base:
            check_recorded(checkpoint, weighted)
        plan = plan_merge(checkpoint, weighted, matching.allow_unmatched, undoing=True)
        refuse_lossy(plan)
        shards = _shards(checkpoint, call.command)
    nbytes = sum(shard.nbytes for shard in shards)
    report = call.report(
        (Input("merged", str(merged)), *_inputs(weighted, digests)),
        (*_fates(plan, memory), *copied_modules(checkpoint)),
        totals={"bytes": nbytes},
        notes=(*plan.notes, *_weaker(memory)),
    )
    read = [checkpoint.path, *(w.adapter.path for w in weighted)]
    read += [memory.path] if memory is not None else []
    jobs, progress = call.running.jobs, call.running.progress
    return Prepared(
        report,
        tuple(read),
        nbytes,
        checkpoint.nbytes + input_bytes(weighted),
        lambda out: unmerge_checkpoint(
            Rewrite(report, checkpoint, weighted, plan, shards, out, jobs, progress), memory
        ),
        pipeline=checkpoint.pipeline,
        is_folder=checkpoint.is_folder,
        copied=checkpoint.copied(),
        card=memory.card() if memory is not None else None,
        passes=rates.RESTORE if memory is not None else rates.MERGE,
        jobs=lambda: rewriting_jobs(
            ((task, (task.target,), (task.target.spec,)) for task in restore_tasks(plan)),
            checkpoint,
            shards,
            report.plan,
            memory,
        ),
    )


def _memory(merged: Checkpoint, wanted: bool | None) -> Sidecar | None:
    """The sidecar, if it is there and not to be ignored. Raises MismatchError if it must be."""
    lies_at = sidecar_path(merged.path)
    if wanted is False:
        return None
    there = is_there(lies_at)
    if wanted and not there:
        raise MismatchError(
            f"{lies_at}: there is no sidecar; `loratools merge --reversible` makes one"
        )
    return Sidecar(lies_at) if there else None


def _shards(merged: Checkpoint, command: str) -> list[Shard]:
    made = {"loratools": tool_version(), "command": command}
    return [
        dataclasses.replace(shard, metadata={**shard.metadata, **made})
        for shard in lay_out(merged, merged.specs, None)
    ]


def _weaker(memory: Sidecar | None) -> list[str]:
    """A note where the result is checked by a weaker digest than was asked for."""
    if memory is None or hashing.used() == "xxh3" or hashing.kind_of(memory.base_digest) != "xxh3":
        return []
    return [
        f"{memory.path} holds an XXH3 digest of the base. It detects accidents, not attacks; "
        "`loratools merge --reversible --digest sha256` writes a stronger one"
    ]


def _inputs(weighted: Sequence[Weighted], digests: Sequence[str]) -> list[Input]:
    return [Input("adapter", w.path, d) for w, d in zip(weighted, digests, strict=True)]


def _fates(plan: MergePlan, memory: Sidecar | None) -> tuple[Fate, ...]:
    how = Action.RESTORE if memory is not None else Action.SUBTRACT
    return tuple(
        dataclasses.replace(fate, action=how) if fate.action == Action.MERGE else fate
        for fate in dataclasses.replace(plan, untied=()).fates()
    )
