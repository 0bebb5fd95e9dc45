"""The quantized checkpoint that ``quantize`` writes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.engine.tasks import Task
from lora_tools.figures import Total
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import CheckpointWriter
from lora_tools.formats.names import split_tensor
from lora_tools.merging.output_files import changed_files
from lora_tools.merging.rewrite import Rewrite
from lora_tools.quantizing.compensate import FOLDER, Compensation, ErrorFit, finish
from lora_tools.quantizing.feeding import totals_of_outputs
from lora_tools.quantizing.pack import totals_of
from lora_tools.quantizing.plan import QuantizePlan
from lora_tools.quantizing.tensor import QuantizedItem, QuantizeItem
from lora_tools.records import Report
from lora_tools.totals import QuantizeTotals

if TYPE_CHECKING:
    from lora_tools.formats.adapters.peft_writer import PeftWriter

Configure = Callable[[dict[str, bytes]], None]
Packing = Task[Checkpoint, CheckpointWriter, QuantizedItem]


def quantize_checkpoint(
    job: Rewrite, plan: QuantizePlan, how: Compensation | None, configure: Configure
) -> Report[QuantizeTotals]:
    """Write the quantized checkpoint, and the adapter for its error where one is wanted."""
    if how is None:
        tasks = quantize_tasks(job.source, plan, None)
        report, nbytes, _ = write_packed(job, plan, tasks, configure)
    else:
        report, nbytes = _compensated(job, plan, how, configure)
    totals: QuantizeTotals = {
        **totals_of(plan, report.tensors, nbytes),
        **totals_of_outputs(report.tensors),
    }
    left = [
        (r.norm, r.compensated_error) for r in report.tensors if r.compensated_error is not None
    ]
    if left:
        totals["compensated_error"] = Total.of_errors(left).relative_error
    return dataclasses.replace(report, totals=totals)


def quantize_tasks(
    source: Checkpoint, plan: QuantizePlan, fit: ErrorFit | None
) -> list[QuantizeItem]:
    """What is to be done on each tensor; ``fit`` where an adapter is made for the error."""
    return [
        QuantizeItem(item, fit, source.decoded_bytes(item.target.base_name)) for item in plan.items
    ]


def _compensated(
    job: Rewrite, plan: QuantizePlan, how: Compensation, configure: Configure
) -> tuple[Report[QuantizeTotals], int]:
    from lora_tools.formats.adapters.peft_writer import PeftWriter

    beside = job.out.with_name("compensation")
    beside.mkdir()
    with contextlib.closing(PeftWriter(beside)) as peft:
        tasks = quantize_tasks(job.source, plan, how.fit)
        report, nbytes, _ = write_packed(job, plan, tasks, configure, peft)
        return report, nbytes + finish(peft, beside, job.source, how, job.out / FOLDER, job.jobs)


def write_packed(
    job: Rewrite,
    plan: QuantizePlan,
    tasks: Sequence[Packing],
    configure: Configure,
    peft: PeftWriter | None = None,
) -> tuple[Report[Any], int, list[QuantizedItem]]:
    """Write what the tasks make of the plan's items.

    Args:
        configure: changes the small files that differ from the source's.
        peft: takes the factors for what was lost.

    Returns:
        The report with its ``tensors``, the files' bytes, and what each item came to.
    """
    done = []
    with job.writer() as writer:
        for item, each in zip(plan.items, job.run(tasks, writer), strict=True):
            if peft is not None and each.factors is not None and each.factors.lora_A.shape[0]:
                A, B = each.factors.lora_A, each.factors.lora_B
                peft.add_lora(split_tensor(item.name)[0], A, B, float(A.shape[0]))
            done.append(dataclasses.replace(each, factors=None))
        specs = {item.name: item.spec for item in plan.items}
        changed = changed_files(job.source, plan.merge, specs)
        configure(changed)
        report = job.finish(writer, changed)
    results = tuple(each.result for each in done if each.result is not None)
    return dataclasses.replace(report, tensors=results), writer.nbytes, done
