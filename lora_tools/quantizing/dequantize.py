"""The plain checkpoint that ``dequantize`` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.output_files import changed_files
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.rewrite import Rewrite
from lora_tools.merging.tensor import MergeTensor
from lora_tools.records import Report, TensorSpec
from lora_tools.totals import DequantizeTotals


def dequantize_tasks(plan: MergePlan, specs: Mapping[str, TensorSpec]) -> list[MergeTensor]:
    """What is to be done on each tensor. ``specs``: as they are written, by name."""
    return [MergeTensor(t, specs[t.spec.name], 4 * t.spec.numel) for t in plan.targets]


def dequantize_checkpoint(
    job: Rewrite, view: Checkpoint, quantized: Collection[str]
) -> Report[DequantizeTotals]:
    """Write the plain checkpoint. ``quantized``: names of the weights that are decoded."""
    specs = {spec.name: spec for shard in job.shards for spec in shard.specs}
    with job.writer() as writer:
        tasks = dequantize_tasks(job.plan, specs)
        done = zip(tasks, job.run(tasks, writer), strict=True)
        hashes = {task.label: result.out_hash for task, result in done}
        changed = changed_files(view, job.plan, specs)
        report = job.finish(writer, changed)
    totals: DequantizeTotals = {
        **report.totals,
        "tensors_dequantized": len(quantized),
        "tensors_copied": len(specs) - len(quantized),
        "output_digest": hashing.digest(specs.values(), hashes),
    }
    return dataclasses.replace(report, totals=totals)
