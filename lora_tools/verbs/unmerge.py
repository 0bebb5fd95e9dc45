"""``unmerge``: the base back out of a merged checkpoint, bit for bit where a sidecar lies by."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError
from lora_tools.formats.checkpoint_writer import lay_out
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.sidecar import Sidecar, sidecar_path
from lora_tools.merging.plan import MergePlan, adapter_digest, plan_merge
from lora_tools.merging.undo import (
    base_outline,
    check_adapters,
    check_merged,
    check_recorded,
    refuse_lossy,
    unmerge_checkpoint,
)
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, ProgressCallback, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import open_weighted

if TYPE_CHECKING:
    pass


def unmerge(
    merged: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    sidecar: bool | None = None,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the base that ``merged`` was made of.

    With the sidecar that ``merge(reversible=True)`` wrote, the result is the base bit for bit, and
    is checked against the base's digest before it appears. Without, the adapters' deltas are
    subtracted and the report's ``error_bound`` states the most that rounding can have lost:
    ‖result − base‖_F ≤ error_bound · ‖result‖_F.

    Args:
        sidecar: True demands a sidecar, False ignores it; None uses it if it is there.
        allow_other_base: subtract adapters that the metadata of ``merged`` does not name.

    Raises:
        MismatchError: the adapters are not those merged, or the result is not the base.
        UnsupportedAdapter: without a sidecar, where subtraction cannot undo the merge.
    """
    command = command_of(unmerge, locals())
    started = time.perf_counter()
    checkpoint = open_checkpoint(merged, allow_pickle)
    weighted = open_weighted(adapters, allow_pickle, checkpoint)
    destination = Path(out)
    lies_at = sidecar_path(checkpoint.path)
    if sidecar and not lies_at.is_file():
        raise MismatchError(f"{lies_at}: no sidecar there; it is written by merge --reversible")
    memory = Sidecar(lies_at) if lies_at.is_file() and sidecar is not False else None
    digests = [adapter_digest(w.adapter) for w in weighted]
    if memory is not None:
        check_adapters(memory, weighted, digests)
        outline, shards = base_outline(checkpoint, memory)
        plan = plan_merge(outline, weighted, allow_unmatched)
        check_merged(checkpoint, plan)
    else:
        if not allow_other_base:
            check_recorded(checkpoint, weighted, digests)
        plan = plan_merge(checkpoint, weighted, allow_unmatched)
        refuse_lossy(plan)
        made = {"loratools": tool_version(), "command": command}
        shards = [
            dataclasses.replace(shard, metadata={**shard.metadata, **made})
            for shard in lay_out(checkpoint, checkpoint.specs, None)
        ]
    nbytes = sum(shard.nbytes for shard in shards)
    report = Report(
        "unmerge",
        tool_version(),
        (
            Input("merged", str(merged)),
            *(Input("adapter", w.path, d) for w, d in zip(weighted, digests, strict=True)),
        ),
        str(out),
        dry_run,
        _fates(plan, memory),
        totals={"bytes": nbytes},
        notes=plan.notes,
        command=command,
    )
    if not dry_run:
        paths = [checkpoint.path, *(w.adapter.path for w in weighted)]
        check_destination(destination, paths, force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            report = unmerge_checkpoint(
                report, checkpoint, plan, shards, memory, staging / "out", jobs, progress
            )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _fates(plan: MergePlan, memory: Sidecar | None) -> tuple[Fate, ...]:
    how = Action.RESTORE if memory is not None else Action.SUBTRACT
    return tuple(
        dataclasses.replace(fate, action=how) if fate.action == Action.MERGE else fate
        for fate in dataclasses.replace(plan, untied=()).fates()
    )
