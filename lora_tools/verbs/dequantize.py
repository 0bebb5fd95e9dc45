"""``dequantize``: a checkpoint in four bits (bitsandbytes) as a plain one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import open_checkpoint
from lora_tools.formats.checkpoint_writer import lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.verbs.common import command_of, tool_version
from lora_tools.verbs.merge import changed_files, out_specs
from lora_tools.verbs.merge_plan import Target, plan_merge
from lora_tools.verbs.merge_tensor import Merged, merge_tensor
from lora_tools.verbs.plain_view import PlainView, plain_files, plain_view
from lora_tools.verbs.rewrite import Rewrite, signed


def dequantize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | None = None,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the plain checkpoint that a four-bit one of bitsandbytes stands for.

    Each weight is value · scale in float32, rounded once; ``quantization_config`` leaves
    config.json.

    Args:
        dtype: of the output's float tensors; by default what each was quantized from.

    Raises:
        MismatchError: nothing there is quantized.
        LoraToolsError: any other of the tree, with nothing written.
    """
    command = command_of(dequantize, locals())
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    stored = open_checkpoint(checkpoint, allow_pickle)
    view = plain_view(stored)
    if view is None:
        raise MismatchError(f"{stored.path}: holds no four-bit weights of bitsandbytes")
    plan = plan_merge(view, [])
    specs = out_specs(plan, wanted)
    shards = signed(lay_out(view, specs, limit), command, [])
    nbytes = sum(shard.nbytes for shard in shards)
    fates = tuple(
        Fate(name, "dequantize", view.quantized[name].state.quant_type, spec.nbytes)
        if name in view.quantized
        else Fate(name, "copy", "", spec.nbytes)
        for name, spec in specs.items()
    )
    report = Report(
        "dequantize",
        tool_version(),
        (Input("checkpoint", str(checkpoint)),),
        str(out),
        dry_run,
        fates,
        totals={"bytes": nbytes},
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [stored.path], force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            report = _dequantize(
                Rewrite(report, view, (), plan, shards, staging / "out", jobs, progress), view
            )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _dequantize(job: Rewrite, view: PlainView) -> Report:
    specs = {spec.name: spec for shard in job.shards for spec in shard.specs}
    with job.writer() as writer:

        def work(target: Target) -> Merged:
            return merge_tensor(target, view, specs[target.spec.name], writer.write)

        done = job.run(job.plan.targets, work, lambda target: 4 * target.spec.numel)
        hashes = {target.spec.name: result.out_hash for target, result in done}
        changed = plain_files(view, changed_files(view, job.plan, specs))
        report = job.finish(writer, changed)
    totals: dict[str, Any] = {
        **report.totals,
        "tensors_dequantized": len(view.quantized),
        "tensors_copied": len(specs) - len(view.quantized),
        "output_digest": hashing.digest(specs.values(), hashes),
    }
    return dataclasses.replace(report, totals=totals)
