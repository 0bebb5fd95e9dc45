"""``export``: a checkpoint, or a base and its adapters merged in the same pass, as ONNX graphs."""

from __future__ import annotations

from pathlib import Path

from lora_tools.errors import CheckpointError, UsageError
from lora_tools.exporting.make import FAILED, Export
from lora_tools.exporting.quantized import plan_quantization
from lora_tools.exporting.runtime_adapters import RuntimeAdapters, plan_runtime_adapters
from lora_tools.exporting.weights import Weights
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.output import Prepared
from lora_tools.formats.pickle_file import refuse_compressed
from lora_tools.merging.fit import fit_base
from lora_tools.onnx.sentence import sentence_task
from lora_tools.onnx.tasks import refuse_kind
from lora_tools.options import Adding, Check, Graphs, Matching, Quantized, Storage
from lora_tools.sources.checkpoints import from_file, open_checkpoint
from lora_tools.sources.pipelines import other_modules
from lora_tools.sources.weighted import open_weighted
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
    if not source.path.is_dir() or not source.config:
        raise CheckpointError(
            f"{source.path}: a folder with a config.json is needed to export{from_file(source)}"
        )
    refuse_compressed(file.path for file in source.files)
    out, to_merge = Path(call.out), () if adding.runtime_adapters else adding.adapters
    in_place = out.exists() and out.resolve() == source.path.resolve()
    _refuse_half(graphs, quantized, check, adding.runtime_adapters)
    runtime = _runtime(source, adding, matching, call)
    fitted = source
    if to_merge:  # they may make another class of it
        opened = open_weighted(
            to_merge, call.running.allow_pickle, source, matching.allow_unmatched
        )
        fitted = fit_base(source, opened, matching.allow_unmatched)
    task, said = sentence_task(source.pipeline, fitted.config, graphs.task)
    refuse_kind(fitted.config, task)
    if task.steps:  # whose weights may be pickles
        other_modules(source.pipeline, call.running.allow_pickle)
    quantization = plan_quantization(
        source,
        task,
        quantized,
        check.eval_text,
        verify=not check.no_verify,
        merging=bool(to_merge or storage.dtype),
        runtime=adding.runtime_adapters,
    )
    placing = quantization.weights(graphs.weights, in_place)
    weights = Weights(checkpoint, to_merge, quantization, storage, matching, call.running)
    if in_place and weights.change:
        why = "--adapter, --dtype and --nf4 change the weights"
        if source.scheme is not None and quantization.decoded:
            why = f"{source.path} is in {source.scheme.title}, which a graph cannot read"
        raise UsageError(f"{why}: choose another output")
    work = Export(
        source,
        str(checkpoint),
        task,
        graphs,
        check,
        call.running,
        quantization,
        placing,
        placing == "bundled" and not (storage.dtype or quantization.scheme),
        weights.written(),
        weights.plain(),
        runtime,
        matching.allow_other_base,
        in_place,
        call.writing.force,
        out.with_name(out.name + FAILED) if check.keep_failed else None,
        said,
    )
    return _prepared(work, call)


def _refuse_half(graphs: Graphs, quantized: Quantized, check: Check, runtime: bool) -> None:
    """What half precision does not go with."""
    if graphs.compute_dtype == "float32":
        if graphs.half_io:
            raise UsageError("--half-io needs --compute-dtype float16 or bfloat16")
        return
    asked = {
        "--runtime-adapters": runtime,
        "--nf4": quantized.nf4,
        "--int8": quantized.int8,
        "--int4": quantized.int4,
        "--eval-text": check.eval_text is not None,
    }
    for option in (name for name, given in asked.items() if given):
        raise UsageError(f"{option} needs --compute-dtype float32; leave one of the two out")


def _runtime(
    source: Checkpoint, adding: Adding, matching: Matching, call: Call
) -> RuntimeAdapters | None:
    if not adding.runtime_adapters:
        return None
    return plan_runtime_adapters(
        adding.adapters, source, call.running.allow_pickle, matching.allow_unmatched
    )


def _prepared(work: Export, call: Call) -> Prepared:
    report, runtime = work.planned(call.command), work.runtime
    read = [each.weighted.adapter.path for each in (runtime.each if runtime else ())]
    read += work.weights.inputs if work.weights else ()
    statistics = work.quantization.statistics
    read += [statistics.known.path] if statistics is not None else []
    return Prepared(
        runtime.planned(report) if runtime and call.writing.dry_run else report,
        (work.source.path, *read),
        work.space(),
        work.input_bytes(),
        lambda path: work.write(report, path),
        beside=(FAILED,) if work.keep and not work.in_place else (),
        added=work.files() if work.in_place else (),
        is_folder=True,
        pipeline=None if work.in_place else work.source.pipeline,
        copied=() if work.in_place else work.source.stored.copied(),
    )
