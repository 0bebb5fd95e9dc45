"""``merge``: a base checkpoint with one or more adapters added to its weights."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError
from lora_tools.formats.checkpoint_writer import lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.merging.checkpoint import merge_checkpoint, refuse_resized
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Input, ProgressCallback, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.schemes import BITSANDBYTES
from lora_tools.sources.weighted import open_weighted

if TYPE_CHECKING:
    pass


def merge(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | None = None,
    reversible: bool = False,
    requantize: bool = False,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the base with every adapter added: W + Σ weight · (its effect on W).

    Args:
        base: a checkpoint folder, a safetensors file or a hub id. One in four bits (bitsandbytes)
            is dequantized on the way, and the report states how much of the adapters was kept.
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``;
            none is enough where ``dtype`` is given.
        dtype: of the output's float tensors; by default each keeps its own.
        shard_size: such as ``"5GB"``; by default the base's files again.
        reversible: write a sidecar by which ``unmerge`` gives the base back bit for bit.
        requantize: put what was in four bits back into four bits, which loses most of a small
            change; the report states how much.
        allow_unmatched: leave out adapter keys that match no tensor instead of refusing.
        allow_other_base: merge an adapter whose metadata names another base.
        dry_run: return the plan; read headers only and write nothing.

    The sum is formed in float32 (float64 for float64 tensors) and rounded once.

    Raises:
        LoraToolsError: any of the tree; the destination is untouched then.
    """
    command = command_of(merge, locals())
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    checkpoint = open_checkpoint(base, allow_pickle)
    if checkpoint.scheme is not None and reversible:
        raise UsageError(f"--reversible cannot give back a BASE in {checkpoint.scheme.title}")
    if requantize and checkpoint.scheme is not BITSANDBYTES:
        raise UsageError("--requantize needs a BASE in four bits (bitsandbytes)")
    weighted = []
    if adapters or not dtype:
        weighted = open_weighted(adapters, allow_pickle, checkpoint)
    destination = Path(out)
    if (
        reversible
        and wanted
        and any(s.is_float and s.dtype != wanted for s in checkpoint.specs.values())
    ):
        raise UsageError("--reversible keeps the base's dtypes: leave --dtype out")
    if limit is not None and not checkpoint.is_folder:
        raise UsageError("--shard-size needs a folder as BASE: a bare file stays one file")
    plan = plan_merge(checkpoint, weighted, allow_unmatched)
    if reversible:
        refuse_resized(plan, checkpoint)
    if requantize:
        from lora_tools.quantizing.requantize import plan_requantize, requantized

        assert isinstance(checkpoint, Dequantized)
        work = plan_requantize(checkpoint, plan, out_specs(plan, wanted))
        shards = work.shards(checkpoint, limit)
    else:
        shards = lay_out(checkpoint, out_specs(plan, wanted), limit)
    shards = signed(shards, command, weighted)
    nbytes = sum(shard.nbytes for shard in shards)
    inputs = [Input("base", str(base)), *(Input("adapter", w.as_given) for w in weighted)]
    report = Report(
        "merge",
        tool_version(),
        tuple(inputs),
        str(out),
        dry_run,
        plan.fates(),
        totals={"bytes": nbytes},
        notes=plan.notes,
        command=command,
    )
    if not dry_run:
        paths = [checkpoint.path, *(w.adapter.path for w in weighted)]
        check_destination(destination, paths, force)
        beside = destination.with_name(destination.name + ".sidecar")
        if not checkpoint.is_folder and reversible:
            check_destination(beside, paths, force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            job = Rewrite(
                report,
                checkpoint,
                weighted,
                plan,
                shards,
                staging / "out",
                jobs,
                progress,
                allow_other_base,
            )
            if requantize:
                assert isinstance(checkpoint, Dequantized)
                report = requantized(job, checkpoint, work)
            else:
                report = merge_checkpoint(job, reversible)
        if force and not checkpoint.is_folder and not reversible:
            beside.unlink(missing_ok=True)  # that of the file replaced
    return dataclasses.replace(report, seconds=time.perf_counter() - started)
