"""Into a stored number format and out of it, from options to something that can be written
anywhere: for ``quantize`` and ``dequantize``, and for ``export``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from lora_tools.engine import rates
from lora_tools.errors import CheckpointError, MismatchError, UsageError
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import lay_out
from lora_tools.formats.dtypes import torch_name
from lora_tools.formats.output import Prepared
from lora_tools.formats.quantized.bitsandbytes import QUANT_TYPES
from lora_tools.formats.quantized.forms import FORMS, Form, four_bits
from lora_tools.formats.quantized.packed import plain_dtype
from lora_tools.merging.fit import fit_base
from lora_tools.merging.jobs import rewriting_jobs
from lora_tools.merging.loadable import refuse_unloadable
from lora_tools.merging.output_files import out_specs
from lora_tools.merging.plan import plan_merge
from lora_tools.merging.prepare import Adapters, Planned, dtype_of, limit_of
from lora_tools.merging.rewrite import signed
from lora_tools.options import Matching, NumberFormat, Running, Storage, Tensors
from lora_tools.options.parse import NameFilter
from lora_tools.quantizing.budget import Shares, note_on, parse_budget, plan_within, share_out
from lora_tools.quantizing.checkpoint import quantize_checkpoint, quantize_tasks
from lora_tools.quantizing.compensate import Compensation, plan_compensation
from lora_tools.quantizing.dequantize import dequantize_checkpoint, dequantize_tasks
from lora_tools.quantizing.feeding import activations_of, made_by, plan_feeding, with_input
from lora_tools.quantizing.pack import config_with
from lora_tools.quantizing.plan import (
    QuantizePlan,
    form_for,
    is_expert,
    is_stored_alike,
    plan_quantize,
    read_by,
)
from lora_tools.records import DTYPE_BITS, Action, Fate, Report, counted
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.weighted import open_weighted
from lora_tools.totals import QuantizeTotals

_OF_ALL_FORMS = (
    "scheme", "quant_type", "activations", "calibrate", "calibration_tokens", "calibration_seed",
)  # fmt: skip


def prepare_quantize(
    checkpoint: str | Path,
    adapters: Adapters,
    numbers: NumberFormat,
    tensors: Tensors,
    storage: Storage,
    matching: Matching,
    running: Running,
    command: str,
    shares: Shares | None = None,
) -> Prepared:
    """The checkpoint, adapters merged, with its linear layers in another number format.

    Args:
        shares: what came of ``--budget``; None where that, if given, is still to be found.

    Raises:
        LoraToolsError: it cannot be read, or not be quantized so.
    """
    budget = parse_budget(numbers.budget)
    chosen = NameFilter(tensors.include, tensors.exclude)
    opened = _open(checkpoint, adapters, numbers, chosen, matching, running)
    planned, form, how = opened.planned, opened.form, opened.how
    base, merge = planned.source, planned.plan
    limit = limit_of(storage, base)
    specs = out_specs(merge, dtype_of(storage))
    refuse_unloadable(base, merge, specs)
    search, head = numbers.scale_search, tensors.lm_head
    if shares is None:
        plan = plan_quantize(base, merge, specs, form, chosen, head, search)
    else:
        plan = plan_within(shares, base, merge, specs, form, chosen, head, search)
    kept = _stored_so(opened.given, plan)
    known = activations_of(numbers.activations)
    plan, unfed = plan_feeding(plan, known) if known is not None else (plan, [])
    shards = made_by(signed(plan.shards(base, limit), command, planned.adapters), known)
    fates = plan.fates() + (how.fates(plan) if how else ())
    nbytes = sum(shard.nbytes for shard in shards) + (fates[-1].nbytes if how else 0)
    room = budget.room(plan, nbytes) if budget and not shares else None
    nbytes += room.grows if room else 0
    entries = {**_dtype_entry(base, plan, form), "quantization_config": form.settings(plan.skip)}
    most = {"expected_bytes_at_most": nbytes}
    report = planned.report("quantize", fates, most, command)
    notes = [*_notes(base, plan, tensors, entries), *kept, *_of_experts(base, plan, form), *unfed]
    notes += [note_on(budget, room)] if budget and room else [shares.note] if shares else []
    report = dataclasses.replace(report, notes=(*report.notes, *notes))
    job = planned.rewrite(report, shards, running)

    def write(out: Path) -> Report[QuantizeTotals]:
        if budget and room:
            found = share_out(budget, room, plan, base, running)
            own = dataclasses.replace(numbers, blocksize=found.blocksize)
            return prepare_quantize(
                checkpoint, adapters, own, tensors, storage, matching, running, command, found
            ).write(out)
        return with_input(
            quantize_checkpoint(
                job(out), plan, how, lambda changed: config_with(base, changed, entries)
            ),
            known,
        )

    paths = (*planned.paths(), *([known.path] if known is not None else []))
    return Prepared(
        with_input(report, known),
        paths,
        nbytes,
        planned.nbytes,
        write,
        passes=_passes(form, plain=not (known or how or search)),
        jobs=None
        if room
        else lambda: rewriting_jobs(
            (
                (task, read_by(task.item), task.item.specs)
                for task in quantize_tasks(base, plan, how.fit if how else None)
            ),
            base,
            shards,
            fates,
        ),
        pipeline=base.pipeline,
        is_folder=base.is_folder,
        copied=base.copied(),
    )


@dataclasses.dataclass(frozen=True)
class _Opened:
    """What is quantized: a checkpoint as ``given``, and with adapters to be merged ``planned``; in
    which form, and ``how`` it is compensated, if it is."""

    given: Checkpoint
    planned: Planned
    form: Form
    how: Compensation | None


def _open(
    checkpoint: str | Path,
    adapters: Adapters,
    numbers: NumberFormat,
    chosen: NameFilter,
    matching: Matching,
    running: Running,
) -> _Opened:
    """Open the checkpoint and the adapters, and plan their merge. Headers only are read.

    Raises:
        LoraToolsError: they cannot be read, do not fit, or cannot be in the form.
    """
    form, lenient = form_of(numbers), matching.allow_unmatched
    given = open_checkpoint(checkpoint, running.allow_pickle)
    chosen.refuse_idle(w.module for w in given.weights.values())
    weighted = open_weighted(adapters, running.allow_pickle, given, lenient) if adapters else []
    base = fit_base(given, weighted, lenient)
    how = plan_compensation(base, numbers.compensate, numbers.compensate_iterations, weighted)
    if form.needs_config and not base.stored.config:
        raise UsageError(
            f"{base.path}: has no config.json, which {form.name} needs; give a folder with one, or "
            "quantize to nf4"
        )
    merge = plan_merge(base, [] if how else weighted, lenient)
    other = matching.allow_other_base
    planned = Planned(str(checkpoint), "checkpoint", base, weighted, merge, other)
    return _Opened(given, planned, form_for(base, form), how)


def _passes(form: Form, plain: bool) -> float | None:
    """What a number costs; searched scales and errors fed forward depend on the shapes."""
    return rates.QUANTIZE.get(form.name, rates.QUANTIZE_OTHERS) if plain else None


def _stored_so(base: Checkpoint, plan: QuantizePlan) -> list[str]:
    """A note on weights that are in the form already, which are rounded again.

    Raises:
        CheckpointError: all of them are.
    """
    if not isinstance(base, Dequantized):
        return []
    known = base.quantized
    packed = [(i.target.base_name, i.packed) for i in plan.items if i.packed is not None]
    same = [name for name, p in packed if name in known and is_stored_alike(p, known[name])]
    if not same:
        return []
    label = known[same[0]].label
    if len(same) == len(packed):
        raise CheckpointError(
            f"{base.path}: is already quantized, in {base.scheme.title}: every weight is stored as "
            f"{label}; to add an adapter, use `loratools merge --requantize`, and to quantize it "
            "again, run `loratools dequantize` first"
        )
    return [
        f"{base.path}: {counted(len(same), 'weight')} ({same[0]}{', …' if same[1:] else ''}) of "
        f"{len(packed)} {'are' if same[1:] else 'is'} stored as {label} already, and will be "
        "rounded again"
    ]


def prepare_dequantize(
    checkpoint: str | Path, storage: Storage, running: Running, command: str
) -> Prepared:
    """The plain checkpoint that a quantized one stands for, or that one in pickles does.

    Raises:
        MismatchError: nothing there is quantized, and all is safetensors.
    """
    view = open_checkpoint(checkpoint, running.allow_pickle)
    quantized = view.quantized if isinstance(view, Dequantized) else {}
    if not quantized and all(file.path.suffix == ".safetensors" for file in view.files):
        raise MismatchError(f"{view.path}: is plain already: no weight is quantized")
    planned = Planned(str(checkpoint), "checkpoint", view, (), plan_merge(view, []))
    specs = out_specs(planned.plan, dtype_of(storage))
    shards = signed(lay_out(view, specs, limit_of(storage, view)), command, [])
    nbytes = sum(shard.nbytes for shard in shards)
    fates = [
        Fate(name, Action.DEQUANTIZE, quantized[name].label, spec.nbytes)
        if name in quantized
        else Fate(name, Action.COPY, "", spec.nbytes)
        for name, spec in specs.items()
    ]
    report = planned.report("dequantize", fates, {"bytes": nbytes}, command)
    job = planned.rewrite(report, shards, running)
    return Prepared(
        report,
        planned.paths(),
        nbytes,
        planned.nbytes,
        lambda out: dequantize_checkpoint(job(out), view, quantized),
        passes=rates.DEQUANTIZE,
        jobs=lambda: rewriting_jobs(
            ((t, (t.target,), (t.spec,)) for t in dequantize_tasks(planned.plan, specs)),
            view,
            shards,
            fates,
        ),
        pipeline=view.pipeline,
        is_folder=view.is_folder,
        copied=view.copied(),
    )


def form_of(numbers: NumberFormat) -> Form:
    """What is asked for. Raises UsageError for settings that the form does not have."""
    if numbers.scheme and numbers.quant_type and numbers.scheme != numbers.quant_type:
        raise UsageError(
            f"--scheme {numbers.scheme} and --quant-type {numbers.quant_type} exclude each other: "
            "--quant-type is the old name of --scheme"
        )
    form = FORMS[numbers.scheme or numbers.quant_type or QUANT_TYPES[0]]
    if form.name in QUANT_TYPES:
        return four_bits(
            form.name,
            numbers.blocksize,
            numbers.double_quant,
            torch_name(numbers.compute_dtype),
            numbers.quant_storage,
        )
    for field in dataclasses.fields(numbers):
        given = getattr(numbers, field.name)
        if given != field.default and field.name not in _OF_ALL_FORMS:
            option = "--" + "no-" * (given is False) + field.name.replace("_", "-")
            raise UsageError(
                f"{option} is for {' and '.join(QUANT_TYPES)}: --scheme {form.name} has no such "
                "setting"
            )
    return form


def _dtype_entry(base: Checkpoint, plan: QuantizePlan, form: Form) -> dict[str, str]:
    """What config.json says of the weights' own dtype, where only that tells it of a weight that is
    quantized, and it does not say so yet."""
    dtypes = {item.spec.dtype for item in plan.items if item.packed is not None}
    if not form.needs_config or dtypes == {plain_dtype(base.config)}:
        return {}
    key = "torch_dtype" if "torch_dtype" in base.config else "dtype"
    return {key: torch_name(max(dtypes, key=DTYPE_BITS.__getitem__))}


def _of_experts(base: Checkpoint, plan: QuantizePlan, form: Form) -> list[str]:
    """What is to be known of experts that are quantized."""
    weights = (base.weights.of(item.spec) for item in plan.items if item.packed is not None)
    return [form.note] if form.note and any(is_expert(w, form) for w in weights) else []


def _notes(
    base: Checkpoint, plan: QuantizePlan, tensors: Tensors, entries: dict[str, Any]
) -> list[str]:
    notes = []
    if base.scheme is not None:
        notes.append(
            f"{base.path}: is in {base.scheme.title}; errors are measured against its dequantized "
            "numbers"
        )
    if tensors.lm_head and base.weights.head and not plan.merge.unties:
        notes.append(
            "the output head is also the input embedding, which is not quantized: --lm-head has "
            "no effect"
        )
    if not base.config:
        notes.append(
            "there is no config.json for quantization_config; a program that loads this needs "
            + json.dumps(entries["quantization_config"])
        )
    return notes
