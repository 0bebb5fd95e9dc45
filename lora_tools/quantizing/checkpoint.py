"""The four-bit checkpoint that ``quantize`` writes."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

from lora_tools.formats.names import split_tensor
from lora_tools.merging.output_files import changed_files
from lora_tools.merging.rewrite import Rewrite
from lora_tools.quantizing.compensate import FOLDER, Compensation, finish
from lora_tools.quantizing.pack import config_with, totals_of
from lora_tools.quantizing.plan import QuantizePlan
from lora_tools.quantizing.tensor import work_on, working_memory
from lora_tools.records import Report, TensorResult

if TYPE_CHECKING:
    pass


def quantize_checkpoint(
    job: Rewrite, plan: QuantizePlan, how: Compensation | None, settings: dict[str, Any]
) -> Report:
    """Write the quantized checkpoint, and the adapter for its error where one is wanted."""
    from lora_tools.engine import threads
    from lora_tools.formats.adapters.peft_writer import PeftWriter

    base, out = job.source, job.out
    buffers = threads.Buffers()
    results: list[TensorResult] = []
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(job.writer())
        beside = out.with_name("compensation")
        if how:
            beside.mkdir()
            peft = PeftWriter(beside)
            stack.callback(peft.close)
        for item, done in job.run(
            plan.items,
            lambda item: work_on(item, base, writer, buffers, how),
            lambda item: working_memory(item, how),
        ):
            if done.result is not None:
                results.append(done.result)
            if done.factors is not None and done.factors.lora_A.shape[0]:
                A, B = done.factors.lora_A, done.factors.lora_B
                peft.add_lora(split_tensor(item.name)[0], A, B, float(A.shape[0]))
                done.factors = None
        changed = changed_files(base, plan.merge, {item.name: item.spec for item in plan.items})
        config_with(base, changed, settings)
        report = job.finish(writer, changed)
        nbytes = writer.nbytes
        added = finish(peft, beside, base, how, out / FOLDER, job.jobs) if how else 0
    return dataclasses.replace(
        report, tensors=tuple(results), totals=totals_of(plan, results, nbytes + added)
    )
