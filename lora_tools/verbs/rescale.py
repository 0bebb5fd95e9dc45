"""``rescale``: another strength, alpha or rank for an adapter, or the form one consumer reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lora_tools.adapting.convert_module import rank_ceiling
from lora_tools.adapting.for_consumer import in_terms_of
from lora_tools.adapting.scale import Rescaling, refuse_unread, rescale_adapter, rescale_jobs
from lora_tools.adapting.write import no_effect, uncovered, written_as
from lora_tools.errors import AdapterError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.adapters.training_metadata import note_on_hashes
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import Prepared
from lora_tools.options import AdapterForm, Origin, Ranks, Strength
from lora_tools.options.parse import consumer_named
from lora_tools.options.ranks import rank_rule, refuse_bytes, refuse_shared, size_of
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.auto_class import identify
from lora_tools.sources.base_names import model_at
from lora_tools.totals import RescaleTotals
from lora_tools.verbs.frame import Call, verb


@verb
def rescale(
    call: Call,
    adapter: str | Path,
    strength: Strength,
    ranks: Ranks,
    adapter_form: AdapterForm,
    origin: Origin,
) -> Prepared:
    """Write to ``out`` the adapter with another scale, alpha, rank or form.

    Ranks are chosen as in ``extract``, but each is at least 1. What came in another format than
    PEFT's is written in it, but for a ``consumer`` that reads PEFT's; LoHa, LoKr and whole
    differences as LoCon.

    Raises:
        UsageError: nothing to do, or options that contradict each other.
        UnsupportedAdapter: DoRA with ``scale`` (its magnitude fixes the norm, so that a factor on
            the delta does not scale the effect), or a part that the consumer does not read.
    """
    options = _options(strength, ranks, adapter_form)
    target = options.consumer
    allow_pickle, jobs = call.running.allow_pickle, call.running.jobs
    base, names = model_at(origin.base, allow_pickle)
    given = open_adapter(adapter, allow_pickle, base=names, as_stored=names is None)
    given.need_lora("rank or alpha to change")
    form = FORMATS[given.format if target.patterns else "peft"].at(call.out)
    _refuse(given, form, strength, ranks)
    given, said = in_terms_of(given, str(adapter), base, target)
    refuse_unread(given, target, names is not None and bool(names.tied))
    identify(given, form, names, adapter_form.base_name)
    options = _for_adapter(options, strength, given)
    report = call.report(
        (Input("adapter", str(adapter)),),
        _fates(given, options),
        notes=(
            *said,
            *_notes(given, options, strength.scale, form),
            *note_on_hashes(given.original.stored.metadata),
        ),
    )

    def write(out: Path) -> Report[RescaleTotals]:
        if form.name == "peft":
            return rescale_adapter(report, given, options, out, jobs, call.running.progress)
        folder = out.with_name("peft")
        done = rescale_adapter(report, given, options, folder, jobs, call.running.progress)
        new, dtype = open_adapter(folder), options.dtype
        return written_as(done, new, form, names, out, given.blocks, dtype, jobs)

    read = (given.path, *([names.path] if names is not None else []))
    nbytes, read_bytes = 6 * given.nbytes, given.original.nbytes
    return Prepared(
        report,
        read,
        nbytes,
        read_bytes,
        write,
        is_folder=form.is_folder,
        jobs=lambda: rescale_jobs(given, options, form.file_name, report.plan),
    )


def _options(strength: Strength, ranks: Ranks, form: AdapterForm) -> Rescaling:
    """What is asked of every module. Raises UsageError."""
    rule, target = rank_rule(ranks), consumer_named(form.consumer)
    refuse_shared(rule, target)
    asked = (strength.scale, strength.alpha, rule, strength.rslora, form.dtype, form.base_name)
    if all(option is None for option in asked) and target.patterns:
        raise UsageError(
            "nothing to do: give --scale, --alpha, --rank or another way to "
            "choose one, --rslora, --dtype, --base-name or --for"
        )
    if strength.effect == "change" and (strength.alpha is None or rule is not None):
        raise UsageError("--effect change needs --alpha, and excludes --rank and --energy")
    return Rescaling(
        1.0 if strength.scale is None else strength.scale,
        strength.alpha,
        strength.effect == "keep",
        rule,
        bool(strength.rslora),
        parse_float_dtype(form.dtype) if form.dtype else None,
        target,
        None,
        size_of(ranks),
    )


def _for_adapter(options: Rescaling, strength: Strength, given: Adapter) -> Rescaling:
    """With what the adapter itself decides."""
    rslora = given.use_rslora if strength.rslora is None else strength.rslora
    pad_to = None
    if not options.consumer.patterns:
        ranks = [rank_ceiling(m, given, options.rule) for m in given.modules.values()]
        pad_to = options.consumer.rank_for(max(ranks, default=1))
    return dataclasses.replace(options, rslora=rslora, pad_to=pad_to)


def _refuse(given: Adapter, form: Format, strength: Strength, ranks: Ranks) -> None:
    """What cannot be done to this adapter."""
    if given.unresolved and not form.keeps_names:
        raise AdapterError(
            f"{given.path}: {given.unresolved}; give the model it was trained on with --base"
        )
    refuse_bytes(ranks, form)
    if given.use_dora and (strength.scale is not None or strength.effect == "change"):
        raise UnsupportedAdapter(
            f"{given.path}: a DoRA adapter cannot be scaled, because its magnitudes fix the norm "
            "of each output; merge it with a weight instead (ADAPTER=0.5)"
        )


def _fates(given: Adapter, options: Rescaling) -> tuple[Fate, ...]:
    action = Action.RESIZE if options.rule is not None else Action.RESCALE
    return (
        *(
            Fate(name, action, f"rank {m.r}, alpha {m.alpha:g}")
            for name, m in given.modules.items()
        ),
        *(Fate(name, Action.COPY, "saved whole") for name in given.whole),
        *(Fate(name, Action.COPY, "trained rows") for name in given.tokens),
    )


def _notes(given: Adapter, options: Rescaling, scale: float | None, form: Format) -> list[str]:
    notes = list(given.notes)
    if given.format != "peft":
        notes.append(
            f"written in the same format, {form.title}"
            if form.name == given.format
            else "written in PEFT's format"
        )
    idle = [m for m in given.modules.values() if not m.alpha]
    if scale is not None:
        notes.append(f"the effect is {scale:g} times what it was")
        if given.whole or given.tokens:
            notes.append("tensors saved whole are not scaled")
    elif not options.keep_effect:
        notes.append("the effect changes in proportion to lora_alpha")
    elif options.rule is None and len(idle) < len(given.modules):
        notes.append("the effect is kept")
    if idle and options.keep_effect:
        notes.append(no_effect(idle, given))
        if options.alpha is not None:
            notes[-1] += "; lora_B is zero now, because lora_alpha no longer is"
    elif idle:
        notes.append(
            f"{len(idle)} modules had lora_alpha 0 and no effect, and now have one, such as "
            f"{idle[0].name}"
        )
    if options.rule is not None:
        notes += uncovered([*given.whole, *given.tokens])
    if options.pad_to is not None:
        notes.append(
            f"for {options.consumer.name}: every module has rank {options.pad_to} now, padded with "
            "zeros, and the same alpha"
        )
    return notes
