"""``quantize``: a checkpoint, perhaps with adapters added, in four bits as bitsandbytes has it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_tools.errors import CheckpointError, QualityGateError, UsageError
from lora_tools.formats.checkpoint_writer import parse_size
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.quantized.bitsandbytes import BLOCKSIZES, STORAGES, quantization_config
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.options import name_filter
from lora_tools.provenance import command_of, tool_version
from lora_tools.quantizing.checkpoint import quantize_checkpoint
from lora_tools.quantizing.compensate import plan_compensation
from lora_tools.quantizing.pack import torch_name
from lora_tools.quantizing.plan import FourBitForm, plan_quantize
from lora_tools.records import Input, ProgressCallback, Report, TensorResult
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.weighted import open_weighted

if TYPE_CHECKING:
    pass


def quantize(
    checkpoint: str | Path,
    out: str | Path,
    *,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    compute_dtype: str = "bfloat16",
    quant_storage: Literal["uint8", "float16", "bfloat16", "float32"] = "uint8",
    scale_search: bool = False,
    compensate: int | None = None,
    compensate_iterations: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lm_head: bool = False,
    dtype: str | None = None,
    shard_size: str | None = None,
    max_error: float | None = None,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the checkpoint with its linear layers in four bits (bitsandbytes 0.50).

    The bytes are those of ``merge`` followed by transformers' ``load_in_4bit`` and
    ``save_pretrained`` on a CPU with one torch thread.

    Args:
        checkpoint: a folder, a safetensors file or a hub id.
        adapters: PEFT adapters to merge first: ``path``, ``"path=weight"`` or ``(path, weight)``.
        quant_type: the codebook.
        blocksize: numbers that share a scale: a power of two from 32 to 4096.
        double_quant: store the scales in eight bits.
        compute_dtype: what the loader computes in.
        quant_storage: the dtype whose elements hold the packed bytes.
        scale_search: choose each block's scale for the least error instead of as its largest
            magnitude. Loaders read it as ever; it takes up to ten times as long.
        compensate: rank of a PEFT adapter in the folder ``loftq_init`` of ``out`` that holds the
            best approximation of the quantization error (LoftQ, arXiv 2310.08659). ``adapters`` are
            not merged then, but put into that adapter as well, as they are.
        compensate_iterations: how often to quantize what the adapter leaves and fit it anew (1).
        include, exclude: regular expressions on module names.
        lm_head: quantize the output head too, where it has weights of its own.
        dtype: of the tensors that stay, and of what the quantized ones are made of and come back
            as; by default each keeps its own.
        allow_other_base: take an adapter whose metadata names another base.
        max_error: raise if a tensor's relative error, or the total's, exceeds this.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """
    command = command_of(quantize, locals())
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    chosen = name_filter(include, exclude)
    if blocksize not in BLOCKSIZES:
        raise UsageError(f"--blocksize {blocksize}: one of {', '.join(map(str, BLOCKSIZES))}")
    base = open_checkpoint(checkpoint, allow_pickle)
    if base.scheme is not None:
        raise CheckpointError(
            f"{base.path}: quantized already, in {base.scheme.title}; make it plain with "
            "`loratools dequantize` first"
        )
    if limit is not None and not base.is_folder:
        raise UsageError("--shard-size needs a folder: a bare file stays one file")
    weighted = open_weighted(adapters, allow_pickle, base) if adapters else []
    how = plan_compensation(base, compensate, compensate_iterations, weighted)
    merge = plan_merge(base, [] if how else weighted, allow_unmatched)
    scheme = FourBitForm(quant_type, blocksize, double_quant, STORAGES[quant_storage], scale_search)
    plan = plan_quantize(base, merge, out_specs(merge, wanted), scheme, chosen, lm_head)
    shards = signed(plan.shards(base, limit), command, weighted)
    fates = plan.fates() + (how.fates(plan) if how else ())
    nbytes = sum(shard.nbytes for shard in shards) + (fates[-1].nbytes if how else 0)
    notes = list(merge.notes)
    if lm_head and base.ties_embeddings and not merge.unties:
        notes.append("the output head is the input embedding and stays: --lm-head has no effect")
    settings = quantization_config(
        quant_type, double_quant, torch_name(compute_dtype), quant_storage, plan.skip
    )
    if not base.config:
        notes.append(
            "no config.json to write quantization_config into; a loader needs "
            + json.dumps(settings)
        )
    report = Report(
        "quantize",
        tool_version(),
        (Input("checkpoint", str(checkpoint)), *(Input("adapter", w.as_given) for w in weighted)),
        str(out),
        dry_run,
        fates,
        totals={"expected_bytes_at_most": nbytes},
        notes=tuple(notes),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        check_destination(destination, [base.path, *(w.adapter.path for w in weighted)], force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            job = Rewrite(
                report,
                base,
                weighted,
                plan.merge,
                shards,
                staging / "out",
                jobs,
                progress,
                allow_other_base,
            )
            report = quantize_checkpoint(job, plan, how, settings)
            _gate(report, max_error)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _gate(report: Report, max_error: float | None) -> None:
    if max_error is None:
        return

    def error(result: TensorResult) -> float:
        known = result.compensated_error
        return result.relative_error if known is None else known

    worst = max(report.tensors, key=error)
    total = report.totals.get("compensated_error", report.totals["quantization_error"])
    if error(worst) > max_error or total > max_error:
        raise QualityGateError(
            f"relative error above --max-error {max_error:g}: worst is {worst.tensor} with "
            f"{error(worst):.4g}, total is {total:.4g}; nothing was written. A smaller "
            "--blocksize, --scale-search or --compensate lowers it",
            report,
        )
