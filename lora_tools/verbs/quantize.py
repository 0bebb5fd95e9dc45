"""``quantize``: a checkpoint, perhaps with adapters added, in another number format."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from lora_tools.errors import QualityGateError, UsageError
from lora_tools.figures import exceeded
from lora_tools.formats.output import Prepared
from lora_tools.options import Adding, Evaluation, Matching, NumberFormat, Storage, Tensors
from lora_tools.quantizing.evaluate import plan_evaluation
from lora_tools.quantizing.prepare import prepare_quantize
from lora_tools.quantizing.statistics import Calibration, plan_calibration
from lora_tools.records import Report, TensorResult
from lora_tools.totals import QuantizeTotals
from lora_tools.verbs.frame import Call, verb


@verb
def quantize(
    call: Call,
    checkpoint: str | Path,
    adding: Adding,
    matching: Matching,
    tensors: Tensors,
    number_format: NumberFormat,
    evaluation: Evaluation,
    storage: Storage,
) -> Prepared:
    """Write to ``out`` the checkpoint with its linear layers in another number format.

    By default four bits: the bytes are those of ``merge`` followed by transformers'
    ``load_in_4bit`` (bitsandbytes 0.50) and ``save_pretrained`` on a CPU with one torch thread. The
    others are as compressed-tensors 0.20 or transformers 5.23 round them.

    Args:
        checkpoint: a folder, a safetensors file or a hub id.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """

    def prepare(statistics: str | Path | None) -> Prepared:
        return prepare_quantize(
            checkpoint,
            adding.adapters,
            dataclasses.replace(number_format, activations=statistics),
            tensors,
            storage,
            matching,
            call.running,
            call.command,
        )

    calibration = plan_calibration(checkpoint, number_format, call.running)
    if calibration is not None and (call.writing.shard is not None or call.writing.finish):
        raise UsageError(
            "--calibrate: each shard would collect its own statistics; collect them once with "
            "loratools collect-stats, and give them to all shards with --activations"
        )
    prepared = prepare(number_format.activations)
    if calibration is not None:
        prepared = _calibrated(prepared, prepare, calibration)
    examiner = plan_evaluation(checkpoint, adding.adapters, evaluation, call.running)

    def write(out: Path) -> Report[QuantizeTotals]:
        report = _gated(prepared.write(out), call.writing.max_error)
        return report if examiner is None else examiner.evaluate(report, out)

    nbytes = prepared.nbytes + (examiner.space if examiner is not None else 0)
    jobs = prepared.jobs if examiner is None else None  # it holds the whole model
    return dataclasses.replace(prepared, write=write, nbytes=nbytes, jobs=jobs)


def _calibrated(
    plan: Prepared, prepare: Callable[[Path], Prepared], calibration: Calibration
) -> Prepared:
    """The same by statistics that are collected first, and removed again."""

    def write(out: Path) -> Report[QuantizeTotals]:
        path = out.with_name("statistics")
        collected = calibration.collect(path)
        report: Report[QuantizeTotals] = prepare(path).write(out)
        path.unlink()
        inputs = [i for i in report.inputs if i.role != "activations"]
        return dataclasses.replace(
            report, inputs=(*inputs, calibration.input), notes=(*report.notes, *collected.notes)
        )

    note = f"statistics for error feedback were collected on {calibration.path}"
    report = dataclasses.replace(plan.report, notes=(*plan.report.notes, note))
    return dataclasses.replace(
        plan, report=report, write=write, nbytes=plan.nbytes + calibration.space, jobs=None
    )


def _gated(report: Report[QuantizeTotals], max_error: float | None) -> Report[QuantizeTotals]:
    """The report. Raises QualityGateError."""

    def error(result: TensorResult) -> float:
        known = result.compensated_error
        return result.relative_error if known is None else known

    worst = max(report.tensors, key=error)
    total = report.totals.get("compensated_error", report.totals["quantization_error"])
    said = exceeded(max_error, [(worst.tensor, error(worst), "")], total)
    if said:
        raise QualityGateError(
            f"{said}; nothing was written. Use more bits, or for nf4 and fp4 a smaller "
            "--blocksize, --scale-search or --compensate",
            report,
        )
    return report
