"""Merging into a four-bit base whose weights become four bits again, in its own scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint_writer import CheckpointWriter
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.bitsandbytes import STATE, quantized_tensor
from lora_tools.merging.output_files import changed_files
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.rewrite import Rewrite
from lora_tools.merging.tensor import copy_tensor, merge_tensor, survival_totals
from lora_tools.quantizing.pack import config_with, pack
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.records import Action, Fate, Report, TensorResult, TensorSpec
from lora_tools.sources.dequantized import PlainView

if TYPE_CHECKING:
    from lora_tools.engine.threads import Buffers
    from lora_tools.linalg.merge import Survival


def plan_requantize(
    view: PlainView, merge: MergePlan, specs: Mapping[str, TensorSpec]
) -> QuantizePlan:
    """Every tensor: one in four bits stays so, with new codes where an adapter acts on it."""
    items = []
    for target in (*merge.targets, *merge.untied):
        spec = specs[target.spec.name]
        packed = view.quantized.get(spec.name)
        transposed = spec.name in view.transposed
        if packed is not None and target.parts:
            state = dataclasses.replace(packed.state, dtype=spec.dtype)
            packed = quantized_tensor(spec.name, state, packed.specs[""].dtype)
        items.append(Item(target, spec, packed, transposed, "" if packed else "not quantized"))
    return QuantizePlan(tuple(items), (), merge)


@dataclasses.dataclass(frozen=True)
class _Requantized:
    base_hash: str
    result: TensorResult | None = None
    survival: Survival | None = None


def requantized(job: Rewrite, view: PlainView, plan: QuantizePlan) -> Report:
    """Write it; the report's ``tensors`` hold the error of each weight that has new codes."""
    from lora_tools.engine import threads

    buffers = threads.Buffers()
    outcomes: list[_Requantized] = []
    with job.writer() as writer:

        def work(item: Item) -> _Requantized:
            return _work_on(item, view, writer, buffers)

        outcomes += [done for _, done in job.run(plan.items, work, lambda i: 12 * i.spec.numel)]
        changed = changed_files(view, plan.merge, {i.name: i.spec for i in plan.items})
        config_with(view, changed, view.stored.config.get("quantization_config"))
        report = job.finish(writer, changed)
        nbytes = writer.nbytes
    merged = sum(bool(i.target.parts) for i in plan.items)
    totals = {
        "bytes": nbytes,
        "tensors_merged": merged,
        "tensors_copied": len(plan.items) - merged,
        **survival_totals([d.survival for d in outcomes if d.survival is not None]),
    }
    return dataclasses.replace(
        report,
        plan=tuple(_fate(fate, view) for fate in report.plan),
        totals=totals,
        tensors=tuple(d.result for d in outcomes if d.result is not None),
    )


def _fate(fate: Fate, view: PlainView) -> Fate:
    if fate.action == Action.MERGE and fate.tensor in view.quantized:
        return dataclasses.replace(fate, action=Action.REQUANTIZE)
    return fate


def _work_on(
    item: Item, view: PlainView, writer: CheckpointWriter, buffers: Buffers
) -> _Requantized:
    import torch

    target, packed = item.target, item.packed
    if packed is None:
        done = merge_tensor(target, view, item.spec, writer.write, measured=True)
        return _Requantized(done.base_hash, None, done.survival)
    if not target.parts:
        for spec in packed.specs.values():
            if STATE in spec.name:
                writer.write_last(spec.name, bytes(view.stored.raw(spec.name)))
            else:
                copy_tensor(view.stored, spec.name, writer.write)
        return _Requantized(hashing.tensor_hash(view.raw(item.name)))
    with (
        buffers.lend(item.spec.shape, torch_dtype(item.spec.dtype)) as merged,
        buffers.lend(packed.state.shape, torch.float32) as back,
    ):
        into = merged.view(torch.uint8).reshape(-1).numpy().data

        def keep(name: str, data: memoryview, offset: int) -> None:
            into[offset : offset + data.nbytes] = data

        def drop(name: str, data: memoryview, offset: int) -> None:
            pass

        merge_tensor(target, view, item.spec, keep)
        turned = merged.T.contiguous() if item.transposed else merged
        result = pack(item, turned.reshape(-1), writer, buffers, back=back.reshape(-1))
        stored = back.T.contiguous() if item.transposed else back
        done = merge_tensor(target, view, item.spec, drop, measured=True, stand_in=stored)
    return _Requantized(done.base_hash, result, done.survival)
