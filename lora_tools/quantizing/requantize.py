"""Merging into a base in a stored number format whose weights go back into that format."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.engine import rates
from lora_tools.errors import UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard, Sink
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.output import Prepared
from lora_tools.formats.quantized.bitsandbytes import STATE
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.formats.regular_files import is_there, read_file
from lora_tools.merging.fitted import FittedBase
from lora_tools.merging.in_memory import MergeInMemory
from lora_tools.merging.jobs import rewriting_jobs
from lora_tools.merging.loadable import refuse_unloadable
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.prepare import SIDECAR, Planned, dtype_of, limit_of, refuse_quantized_undo
from lora_tools.merging.rewrite import Rewrite, signed
from lora_tools.merging.tensor import MergeTensor, copy_tensor, survival_totals
from lora_tools.options import Merging, Running, Storage
from lora_tools.quantizing.checkpoint import write_packed
from lora_tools.quantizing.feeding import (
    activations_of,
    made_by,
    plan_feeding,
    with_factor,
    with_input,
    working_bytes,
)
from lora_tools.quantizing.pack import Way, into, pack, way_of
from lora_tools.quantizing.plan import Item, QuantizePlan, is_stored_alike, joined, read_by
from lora_tools.quantizing.surviving import in_outputs, totals_of_outputs
from lora_tools.quantizing.tensor import QuantizedItem, with_scale, with_shared_scale
from lora_tools.records import Action, Fate, Report, TensorResult, TensorSpec
from lora_tools.sources.dequantized import Dequantized
from lora_tools.totals import MergeTotals

_LITTLE = 0.5  # of an adapter, below which a merge is hardly one

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.merge import Survival


def plan_requantize(
    view: Dequantized[Any], way: Way, merge: MergePlan, specs: Mapping[str, TensorSpec]
) -> QuantizePlan:
    """Every tensor: one in the format stays so, with new codes where an adapter acts on it."""
    items = []
    for target in (*merge.targets, *merge.untied):
        spec = specs[target.spec.name]
        packed = view.quantized.get(spec.name)
        if packed is not None and target.parts:
            packed = way.anew(packed, spec)
        reason = "" if packed else "not quantized"
        items.append(Item(target, spec, packed, view.scheme if packed else None, reason))
    return QuantizePlan(joined(items), (), merge)


def prepare_requantize(
    planned: Planned, storage: Storage, running: Running, command: str, merging: Merging
) -> Prepared:
    """A merge into a base in a stored number format that stays in it.

    Raises:
        UsageError: the base is plain, or in a format that is not written; or it should be given
            back by a sidecar.
    """
    view = planned.source
    if view.scheme is None:
        raise UsageError("--requantize needs a quantized BASE, but this one is plain; leave it out")
    if isinstance(view, FittedBase):
        raise UsageError(
            "--requantize keeps the tensors of BASE, but the adapter needs another vocabulary or "
            "head; run `loratools dequantize`, merge, and quantize again"
        )
    assert isinstance(view, Dequantized)
    way = way_of(view.scheme)
    if way is None:
        raise UsageError(
            f"--requantize: {view.scheme.title} can be read but not written; leave it out, and the "
            "merged checkpoint is plain"
        )
    _refuse_shared_tensors(view)
    if merging.reversible:
        refuse_quantized_undo(view)
    limit = limit_of(storage, view)
    specs = out_specs(planned.plan, dtype_of(storage))
    refuse_unloadable(view, planned.plan, specs)
    work = plan_requantize(view, way, planned.plan, specs)
    known = activations_of(merging.activations)
    work, unfed = plan_feeding(work, known, merged=True) if known is not None else (work, [])
    shards = _marked(work.shards(view, limit), view)
    shards = made_by(signed(shards, command, planned.adapters), known)
    nbytes = sum(shard.nbytes for shard in shards)
    fates = tuple(
        dataclasses.replace(fate, reason=f"{fate.reason}{item.rounding}".removeprefix(", "))
        for fate, item in zip(planned.plan.fates(), work.items, strict=False)
    )
    fates += planned.plan.unmatched
    report = planned.report("merge", fates, {"bytes": nbytes}, command)
    report = dataclasses.replace(report, notes=(*report.notes, *unfed))
    job = planned.rewrite(report, shards, running)
    return Prepared(
        with_input(report, known),
        (*planned.paths(), *([known.path] if known is not None else [])),
        nbytes,
        planned.nbytes,
        lambda out: with_input(requantized(job(out), view, work), known),
        passes=rates.REQUANTIZE if known is None else None,
        jobs=lambda: rewriting_jobs(
            ((task, read_by(task.item), task.item.specs) for task in _tasks(work)),
            view,
            shards,
            fates,
        ),
        dropped=() if view.is_folder else (SIDECAR,),
        pipeline=view.pipeline,
        is_folder=view.is_folder,
        copied=view.copied(),
    )


def _refuse_shared_tensors(view: Dequantized[Any]) -> None:
    """Raises UsageError where what is stored of several weights lies in one tensor."""
    seen: set[str] = set()
    for name, weight in view.quantized.items():
        mine = {spec.name for spec in weight.specs.values()}
        for tensor in sorted(mine & seen):
            raise UsageError(
                f"--requantize: {tensor} belongs to {name} and to other weights, and cannot be "
                "written again; leave --requantize out, and the merged checkpoint is plain"
            )
        seen |= mine


def _marked(shards: Sequence[Shard], view: Dequantized[Any]) -> list[Shard]:
    """The files with what the metadata of the stored ones says of how they are stored."""
    said = [
        {key: file.metadata[key] for key in view.scheme.metadata if key in file.metadata}
        for file in view.stored.files
    ]
    if len(said) != len(shards):
        said = [functools.reduce(operator.or_, said)] * len(shards)
    pairs = zip(shards, said, strict=True)
    return [dataclasses.replace(s, metadata={**s.metadata, **own}) for s, own in pairs]


def _tasks(plan: QuantizePlan) -> list[RequantizeItem]:
    return [RequantizeItem(item) for item in plan.items]


def requantized(job: Rewrite, view: Dequantized[Any], plan: QuantizePlan) -> Report[MergeTotals]:
    """Write it; the report's ``tensors`` hold the error of each weight that has new codes."""
    report, nbytes, done = write_packed(
        job, plan, _tasks(plan), functools.partial(_as_stored, view)
    )
    merged = sum(bool(i.target.parts) for i in plan.items)
    totals: MergeTotals = {
        "bytes": nbytes,
        "tensors_merged": merged,
        "tensors_copied": len(plan.items) - merged,
        **survival_totals([d.survival for d in done if d.survival is not None]),
        **totals_of_outputs(done),
    }
    fates = tuple(_fate(fate, view) for fate in report.plan)
    notes = (*report.notes, *_lost(totals, view))
    return dataclasses.replace(report, plan=fates, totals=totals, notes=notes)


def _lost(totals: MergeTotals, view: Dequantized[Any]) -> list[str]:
    """A note where little of the change is left."""
    kept = totals.get("delta_kept", 1.0)
    if kept >= _LITTLE:
        return []
    return [
        f"{view.scheme.title} keep{'s' * (not view.scheme.title.endswith('s'))} {kept:.0%} of the "
        "adapters' change, because most of it is smaller than the rounding. For a plain "
        "checkpoint leave --requantize out, or load the adapter beside BASE"
    ]


def _as_stored(view: Dequantized[Any], changed: dict[str, bytes]) -> None:
    """Small files that say how its weights are stored, as they were; what the merge changes in
    config.json (a dtype, a tie) is changed there."""
    for name in view.scheme.files:
        if view.is_folder and is_there(view.stored.path / name):
            changed[name] = read_file(view.stored.path / name)
    new = json.loads(changed.pop("config.json", b"{}"))
    config = _with_changes(view.stored.config, view.config, new)
    if config != view.stored.config:
        changed["config.json"] = (json.dumps(config, indent=2) + "\n").encode()


def _with_changes(
    stored: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """A config.json as stored, with the entries of ``after`` that are others in ``before``."""
    config = dict(stored)
    for key, value in after.items():
        had, here = before.get(key), config.get(key)
        if all(isinstance(each, Mapping) for each in (value, had, here)):
            config[key] = _with_changes(here, had, value)  # type: ignore[arg-type]
        elif value != had:
            config[key] = value
    return config


def _fate(fate: Fate, view: Dequantized[Any]) -> Fate:
    if fate.action == Action.MERGE and fate.tensor in view.quantized:
        return dataclasses.replace(fate, action=Action.REQUANTIZE)
    return fate


@dataclasses.dataclass(frozen=True)
class RequantizeItem:
    """A task: merge one tensor of a checkpoint and quantize it again, or copy its codes where
    nothing acts on it."""

    item: Item

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        item, fed = self.item, self.item.feeding is not None
        whole = 4 * item.spec.numel * (item.transposed or fed)
        working = (24 * item.spec.numel + working_bytes(item)) * fed
        return 2 * item.spec.nbytes + whole + working

    def run(self, source: Checkpoint, sink: Sink, buffers: Buffers) -> QuantizedItem:
        """Write all that is stored of the tensor. Raises NonFiniteError."""
        assert isinstance(source, Dequantized)
        item, packed = self.item, self.item.packed
        if packed is None:
            done = MergeTensor(item.target, item.spec, measured=True).run(source, sink)
            return QuantizedItem(done.base_hash, survival=done.survival)
        if not item.target.parts:
            _copy(packed.specs.values(), source, sink)
            return QuantizedItem(source.stored_hash(item.name))
        return self._again(packed, source, sink, buffers)

    def _again(
        self, packed: PackedWeight, source: Dequantized[Any], sink: Sink, buffers: Buffers
    ) -> QuantizedItem:
        """What the row does not make, such as scales of activations, stays as it was."""
        import torch

        item = _with_shared_scale(_with_scales_before(self.item, source), source, buffers)
        item = with_factor(item)
        noting, spec, name = Noting(sink), item.spec, item.target.base_name
        base_hash, dtype = source.stored_hash(name), torch_dtype(spec.dtype)
        is_fed = item.feeding is not None
        held = spec.numel * (item.transposed or is_fed)  # what is read back is wanted whole
        with buffers.lend(spec.shape, dtype) as out, buffers.lend((held,), torch.float32) as back:
            merge, fill = MergeInMemory(out, item.target, source, spec), into(back)
            if item.before is not None and not merge.changes():
                _copy(source.quantized[name].specs.values(), source, sink)
                return QuantizedItem(base_hash, survival=merge.survival)

            def read(run: torch.Tensor) -> None:
                merge.compare(run)
                if is_fed:
                    fill(run)

            if item.transposed:
                result = _turned(item, out, merge, noting, buffers, back)
            else:
                result = pack(item, out.view(-1), noting, buffers, read=read, ready=merge.form)
            x = out.T if item.transposed else out
            outputs = _in_outputs(item, x, back, source, buffers)
        source.release(name)
        _copy([s for s in packed.specs.values() if s.name not in noting.written], source, sink)
        return QuantizedItem(base_hash, result, survival=merge.survival, in_outputs=outputs)


def _turned(
    item: Item,
    out: torch.Tensor,
    merge: MergeInMemory,
    sink: Sink,
    buffers: Buffers,
    back: torch.Tensor,
) -> TensorResult:
    """Pack what is stored as (in, out) and quantized as (out, in): a whole one, since its runs are
    others then."""
    merge.form(out.numel())
    with buffers.lend(tuple(out.T.shape), out.dtype) as turned:
        result = pack(item, turned.copy_(out.T).view(-1), sink, buffers, read=into(back))
    merge.compare(back.view(out.T.shape).T.reshape(-1))
    return result


def _in_outputs(
    item: Item, x: torch.Tensor, fed: torch.Tensor, source: Dequantized[Any], buffers: Buffers
) -> tuple[Survival, Survival] | None:
    """How much of the change is in the outputs of what was written, ``fed`` (n,), and of ``x``
    rounded by itself; None where no errors are fed."""
    import torch

    by = item.feeding.by if item.feeding is not None else None
    if by is None:
        return None
    with buffers.lend(tuple(x.shape), torch.float32) as plain:
        unfed = dataclasses.replace(item, feeding=None)
        pack(unfed, x.reshape(-1), None, buffers, read=into(plain.view(-1)))
        first, second = in_outputs((fed.view(x.shape), plain), item, source, by)
    return first, second


def _with_scales_before(item: Item, source: Dequantized[Any]) -> Item:
    """The item with what is stored of it in ``source``, where it is stored so again."""
    before = source.quantized.get(item.name)
    packed = item.packed
    if packed is None or before is None or item.name != item.target.base_name:
        return item
    if not is_stored_alike(packed, before):
        return item
    return dataclasses.replace(item, before=source.parts(item.name))


def _with_shared_scale(item: Item, source: Dequantized[Any], buffers: Buffers) -> Item:
    """The item with the scale that it has in common with others: the stored one, unless an adapter
    acts on all of them."""

    def stored(name: str) -> float | None:
        shared: float | None = source.scheme.shared(source.quantized[name], source.parts(name))
        return shared

    scale = stored(item.target.base_name)
    if scale is None:
        return item
    others = tuple(each for each in item.joined if stored(each[0].base_name) == scale)
    if not all(target.parts for target, _ in others):
        return with_scale(item, scale)
    return with_shared_scale(dataclasses.replace(item, joined=others), source, buffers)


class Noting:
    """Passes tensors on, and notes which ones."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.written: set[str] = set()

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Some bytes of a tensor."""
        self.written.add(name)
        self._sink.write(name, data, offset)

    def write_last(self, name: str, data: bytes) -> None:
        """The whole of a tensor."""
        self.written.add(name)
        self._sink.write_last(name, data)


def _copy(specs: Iterable[TensorSpec], source: Dequantized[Any], sink: Sink) -> None:
    for spec in specs:
        if STATE in spec.name:
            sink.write_last(spec.name, bytes(source.stored.raw(spec.name)))
        else:
            copy_tensor(source.stored, spec.name, sink)
