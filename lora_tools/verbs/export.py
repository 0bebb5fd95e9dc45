"""``export``: a checkpoint, or a base and its adapters merged in the same pass, as ONNX graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.exporting.make import FAILED, Export
from lora_tools.exporting.quantized import Quantization, plan_quantization
from lora_tools.exporting.runtime_adapters import plan_runtime_adapters
from lora_tools.formats.output import Prepared
from lora_tools.merging.prepare import Adapters, plan_merging, prepare_merge
from lora_tools.onnx.tasks import task_of
from lora_tools.options import (
    Adding,
    Check,
    FourBits,
    Graphs,
    Matching,
    Quantized,
    Running,
    Storage,
    Tensors,
)
from lora_tools.provenance import command_of
from lora_tools.quantizing.prepare import prepare_dequantize, prepare_quantize
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.verbs.frame import Call, verb


@verb
def export(
    call: Call,
    checkpoint: str | Path,
    adding: Adding,
    matching: Matching,
    graphs: Graphs,
    storage: Storage,
    quantized: Quantized,
    check: Check,
) -> Prepared:
    """Write to ``out`` a folder with the checkpoint's files and the ONNX graphs that run it.

    Outputs may differ from torch's by atol + rtol times their largest element.

    Args:
        checkpoint: a checkpoint folder or a hub id; with ``out`` the same folder only the graphs
            are added to it.

    Raises:
        QualityGateError: the outputs differ by more than allowed, or generate other tokens.
        LoraToolsError: any other of the tree; the destination is untouched then.
    """
    source = open_checkpoint(checkpoint, call.running.allow_pickle)
    if not source.is_folder or not source.config:
        raise CheckpointError(f"{source.path}: a folder with a config.json is needed to export")
    task, out = task_of(source.config, graphs.task), Path(call.out)
    in_place = out.exists() and out.resolve() == source.path.resolve()
    runtime = None
    if adding.runtime_adapters:
        runtime = plan_runtime_adapters(
            adding.adapters, source, call.running.allow_pickle, matching.allow_unmatched
        )
    to_merge = () if adding.runtime_adapters else adding.adapters
    quantization = plan_quantization(
        source,
        task,
        dataclasses.asdict(quantized),
        check.eval_text,
        verify=not check.no_verify,
        merging=bool(to_merge or storage.dtype),
        runtime=adding.runtime_adapters,
    )
    changes = bool(to_merge or storage.dtype) or quantization.packs
    if in_place and changes:
        raise UsageError("--adapter, --dtype and --nf4 change the weights: choose another output")
    work = Export(
        source,
        str(checkpoint),
        task,
        graphs,
        check,
        call.running,
        quantization,
        quantization.weights(graphs.weights, in_place),
        _weights(checkpoint, to_merge, quantization, storage, matching, call.running),
        _plain(checkpoint, to_merge, quantization, storage, matching, call.running),
        runtime,
        matching.allow_other_base,
        in_place,
        call.writing.force,
        out.with_name(out.name + FAILED) if check.keep_failed else None,
    )
    report = work.planned(call.command)
    return Prepared(
        runtime.planned(report) if runtime and call.writing.dry_run else report,
        (source.path, *(w.weighted.adapter.path for w in (runtime.each if runtime else ()))),
        work.space(),
        lambda path: work.write(report, path),
        beside=(FAILED,) if work.keep and not in_place else (),
        added=work.files() if in_place else (),
    )


def _weights(
    checkpoint: str | Path,
    adapters: Adapters,
    quantization: Quantization,
    storage: Storage,
    matching: Matching,
    running: Running,
) -> Prepared | None:
    """The weights of the output, where they are not those of the checkpoint."""
    if not quantization.packs:
        return _merged(checkpoint, adapters, storage, matching, running)
    return prepare_quantize(
        checkpoint,
        adapters,
        FourBits(),
        Tensors(),
        storage,
        matching,
        running,
        command_of("quantize", storage, matching),
    )


def _plain(
    checkpoint: str | Path,
    adapters: Adapters,
    quantization: Quantization,
    storage: Storage,
    matching: Matching,
    running: Running,
) -> Prepared | None:
    """The same with none quantized, where it lies nowhere yet."""
    if quantization.stored:
        return prepare_dequantize(checkpoint, Storage(), running, "")
    if quantization.packs:
        return _merged(checkpoint, adapters, storage, matching, running)
    return None


def _merged(
    checkpoint: str | Path,
    adapters: Adapters,
    storage: Storage,
    matching: Matching,
    running: Running,
) -> Prepared | None:
    if not (adapters or storage.dtype):
        return None
    planned = plan_merging(
        checkpoint, adapters, matching, running, needs_adapters=not storage.dtype
    )
    return prepare_merge(planned, storage, running, command_of("merge", storage, matching))
