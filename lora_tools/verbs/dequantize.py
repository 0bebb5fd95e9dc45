"""``dequantize``: a checkpoint in four bits (bitsandbytes) as a plain one."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from lora_tools.errors import MismatchError
from lora_tools.formats.checkpoint_writer import lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.provenance import command_of, tool_version
from lora_tools.quantizing.dequantize import dequantize_checkpoint
from lora_tools.records import Action, Fate, Input, ProgressCallback, Report
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import plain_view


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
        Fate(name, Action.DEQUANTIZE, view.quantized[name].state.quant_type, spec.nbytes)
        if name in view.quantized
        else Fate(name, Action.COPY, "", spec.nbytes)
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
            report = dequantize_checkpoint(
                Rewrite(report, view, (), plan, shards, staging / "out", jobs, progress), view
            )
    return dataclasses.replace(report, seconds=time.perf_counter() - started)
