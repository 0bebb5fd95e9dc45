"""Merging into a four-bit base whose weights become four bits again, in its own scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Sink
from lora_tools.formats.output import Prepared
from lora_tools.formats.quantized.bitsandbytes import STATE, QuantizedTensor, quantized_tensor
from lora_tools.merging.fitted import FittedBase
from lora_tools.merging.in_memory import survival_of
from lora_tools.merging.loadable import refuse_unloadable
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.prepare import SIDECAR, Planned, dtype_of, limit_of, refuse_quantized_undo
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.merging.tensor import MergeTensor, copy_tensor, survival_totals
from lora_tools.options import Running, Storage
from lora_tools.quantizing.checkpoint import write_packed
from lora_tools.quantizing.pack import pack
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.quantizing.tensor import QuantizedItem, merged_for
from lora_tools.records import Action, Fate, Report, TensorSpec
from lora_tools.sources.dequantized import Dequantized, FourBits
from lora_tools.sources.schemes.bitsandbytes import BITSANDBYTES
from lora_tools.totals import MergeTotals

if TYPE_CHECKING:
    from lora_tools.engine.buffers import Buffers


def plan_requantize(
    view: FourBits, merge: MergePlan, specs: Mapping[str, TensorSpec]
) -> QuantizePlan:
    """Every tensor: one in four bits stays so, with new codes where an adapter acts on it."""
    items = []
    for target in (*merge.targets, *merge.untied):
        spec = specs[target.spec.name]
        packed = view.quantized.get(spec.name)
        transposed = packed is not None and packed.transposed
        if packed is not None and target.parts:
            state = dataclasses.replace(packed.state, dtype=spec.dtype)
            packed = quantized_tensor(spec.name, state, packed.specs[""].dtype)
        items.append(Item(target, spec, packed, transposed, "" if packed else "not quantized"))
    return QuantizePlan(tuple(items), (), merge)


def prepare_requantize(
    planned: Planned, storage: Storage, running: Running, command: str, reversible: bool = False
) -> Prepared:
    """A merge into a four-bit base that stays in four bits.

    Raises:
        UsageError: the base is not in four bits, or should be given back by a sidecar.
    """
    view = planned.source
    if isinstance(view, FittedBase) and view.scheme == BITSANDBYTES:
        raise UsageError(
            "--requantize keeps the tensors of BASE, and the adapter brings another vocabulary or "
            "head: `loratools dequantize` it, merge, and quantize again"
        )
    if not (isinstance(view, Dequantized) and view.scheme == BITSANDBYTES):
        raise UsageError("--requantize needs a BASE in four bits (bitsandbytes)")
    if reversible:
        refuse_quantized_undo(view)
    limit = limit_of(storage, view)
    specs = out_specs(planned.plan, dtype_of(storage))
    refuse_unloadable(view, planned.plan, specs)
    work = plan_requantize(view, planned.plan, specs)
    shards = signed(work.shards(view, limit), command, planned.adapters)
    nbytes = sum(shard.nbytes for shard in shards)
    report = planned.report("merge", planned.plan.fates(), {"bytes": nbytes}, command)
    job = planned.rewrite(report, shards, running)
    return Prepared(
        report,
        planned.paths(),
        nbytes,
        lambda out: requantized(job(out), view, work),
        dropped=() if view.is_folder else (SIDECAR,),
        pipeline=view.pipeline,
    )


def requantized(job: Rewrite, view: FourBits, plan: QuantizePlan) -> Report[MergeTotals]:
    """Write it; the report's ``tensors`` hold the error of each weight that has new codes."""
    tasks = [RequantizeItem(item) for item in plan.items]
    settings = view.stored.config.get("quantization_config")
    report, nbytes, done = write_packed(job, plan, tasks, settings)
    merged = sum(bool(i.target.parts) for i in plan.items)
    totals: MergeTotals = {
        "bytes": nbytes,
        "tensors_merged": merged,
        "tensors_copied": len(plan.items) - merged,
        **survival_totals([d.survival for d in done if d.survival is not None]),
    }
    fates = tuple(_fate(fate, view) for fate in report.plan)
    return dataclasses.replace(report, plan=fates, totals=totals)


def _fate(fate: Fate, view: FourBits) -> Fate:
    if fate.action == Action.MERGE and fate.tensor in view.quantized:
        return dataclasses.replace(fate, action=Action.REQUANTIZE)
    return fate


@dataclasses.dataclass(frozen=True)
class RequantizeItem:
    """A task: merge one tensor of a four-bit checkpoint and quantize it again, or copy its codes
    where nothing acts on it."""

    item: Item

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        return 12 * self.item.spec.numel

    def run(self, source: Checkpoint, sink: Sink, buffers: Buffers) -> QuantizedItem:
        """Write all that is stored of the tensor. Raises NonFiniteError."""
        assert isinstance(source, Dequantized)
        item, packed = self.item, self.item.packed
        if packed is None:
            done = MergeTensor(item.target, item.spec, measured=True).run(source, sink)
            return QuantizedItem(done.base_hash, survival=done.survival)
        if not item.target.parts:
            for spec in packed.specs.values():
                if STATE in spec.name:
                    sink.write_last(spec.name, bytes(source.stored.raw(spec.name)))
                else:
                    copy_tensor(source.stored, spec.name, sink)
            return QuantizedItem(hashing.tensor_hash(source.raw(item.name)))
        return self._again(packed, source, sink, buffers)

    def _again(
        self, packed: QuantizedTensor, source: FourBits, sink: Sink, buffers: Buffers
    ) -> QuantizedItem:
        import torch

        item = self.item
        with buffers.lend(packed.state.shape, torch.float32) as back:
            with merged_for(item, source, buffers) as (x, base_hash):
                result = pack(item, x.reshape(-1), sink, buffers, back=back.reshape(-1))
            written = back.T.contiguous() if item.transposed else back
            survival = survival_of(written, item.target, source, item.spec)
        return QuantizedItem(base_hash, result, survival=survival)
