"""``dequantize``: a checkpoint in four bits (bitsandbytes) as a plain one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from lora_tools.errors import MismatchError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import open_checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter, Shard, lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.verbs.common import tool_version
from lora_tools.verbs.merge import changed_files, out_specs
from lora_tools.verbs.merge_plan import MergePlan, plan_merge
from lora_tools.verbs.merge_tensor import merge_tensor
from lora_tools.verbs.plain_view import PlainView, plain_files, plain_view


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
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    stored = open_checkpoint(checkpoint, allow_pickle)
    view = plain_view(stored)
    if view is None:
        raise MismatchError(f"{stored.path}: holds no four-bit weights of bitsandbytes")
    plan = plan_merge(view, [])
    specs = out_specs(plan, wanted)
    shards = lay_out(view, specs, limit)
    nbytes = sum(shard.nbytes for shard in shards)
    fates = tuple(
        Fate(name, "dequantize", view.quantized[name].state.quant_type, spec.nbytes)
        if name in view.quantized else Fate(name, "copy", "", spec.nbytes)
        for name, spec in specs.items()
    )  # fmt: skip
    report = Report(
        "dequantize", tool_version(), (Input("checkpoint", str(checkpoint)),), str(out), dry_run,
        fates, totals={"bytes": nbytes},
    )  # fmt: skip
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [stored.path], force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            report = _dequantize(report, view, plan, shards, staging / "out", jobs, progress)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _dequantize(
    report: Report,
    view: PlainView,
    plan: MergePlan,
    shards: list[Shard],
    out: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    from lora_tools import engine

    specs = {spec.name: spec for shard in shards for spec in shard.specs}
    hashes: dict[str, str] = {}
    with CheckpointWriter(out, shards, view.is_folder) as writer:
        for target, done in zip(
            plan.targets,
            engine.run(
                plan.targets,
                lambda target: merge_tensor(
                    target, view, specs[target.spec.name], writer.write, False
                ),
                jobs=jobs,
                nbytes=lambda target: 4 * target.spec.numel,
                label=lambda target: target.spec.name,
                progress=progress,
            ),
            strict=True,
        ):
            hashes[target.spec.name] = done.out_hash
        changed = plain_files(view, changed_files(view, plan, specs))
        index = view.index_name if len(shards) > 1 else None
        left = writer.finish(view, index, changed)
    stored = view.stored
    digest = hashing.digest(
        stored.specs.values(),
        {name: hashing.tensor_hash(stored.raw(name)) for name in stored.specs},
    )
    totals: dict[str, Any] = {
        **report.totals,
        "tensors_dequantized": len(view.quantized),
        "tensors_copied": len(specs) - len(view.quantized),
        "output_digest": hashing.digest(specs.values(), hashes),
    }
    notes = [f"left behind, since they hold other weights: {', '.join(map(str, left))}"] * bool(
        left
    )
    inputs = (dataclasses.replace(report.inputs[0], digest=digest),)
    return dataclasses.replace(report, inputs=inputs, totals=totals, notes=tuple(notes))
