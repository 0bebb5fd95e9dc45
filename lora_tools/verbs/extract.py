"""``extract``: the low-rank adapter that turns a base checkpoint into its fine-tuned copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_tools.adapting.differences import WithDifferences
from lora_tools.adapting.scale import conform_in_place
from lora_tools.adapting.write import written_as
from lora_tools.engine import rates
from lora_tools.errors import QualityGateError, UnsupportedAdapter, UsageError
from lora_tools.extracting.adapter import extract_adapter, kept_spectra
from lora_tools.extracting.decompose import Decomposition, Sides
from lora_tools.extracting.jobs import extract_jobs
from lora_tools.extracting.pair_work import PairWork
from lora_tools.extracting.pairs import make_plan
from lora_tools.extracting.totals import unknown_noise
from lora_tools.figures import above
from lora_tools.formats.activations import Activations
from lora_tools.formats.adapters.consumers import readers_of
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.places import Places
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.counterparts.table import parts
from lora_tools.formats.counterparts.unordered import refuse_fused
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import Prepared
from lora_tools.formats.quantized.packed import StoredFormat
from lora_tools.options import AdapterForm, Ranks, Search, Tensors
from lora_tools.options.parse import NameFilter, consumer_named, layer_kinds
from lora_tools.options.ranks import rank_rule, refuse_bytes, refuse_shared, size_of
from lora_tools.records import Input, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.as_loaded import loaded_view, notes_on_names
from lora_tools.sources.auto_class import refuse_base_name
from lora_tools.sources.base_names import base_names
from lora_tools.sources.other_layout import in_layout_of
from lora_tools.sources.pipelines import open_whole
from lora_tools.totals import ExtractTotals
from lora_tools.verbs.frame import Call, verb

DEFAULT_RANK = 32
_CACHE_DEPTH = 128  # directions a spectrum cache holds, where --max-rank does not say


@verb
def extract(
    call: Call,
    base: str | Path,
    tuned: str | Path,
    ranks: Ranks,
    tensors: Tensors,
    adapter_form: AdapterForm,
    search: Search,
) -> Prepared:
    """Write to ``out`` a LoRA adapter with base + adapter ≈ tuned, by truncated SVD: PEFT's, or in
    the format ``to``.

    Args:
        base, tuned: checkpoint folders, safetensors files or hub ids.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """
    form = FORMATS[adapter_form.to or "peft"].at(call.out)
    options = _options(ranks, adapter_form, search, form)
    chosen, kinds = NameFilter(tensors.include, tensors.exclude), layer_kinds(tensors.layout)
    size = size_of(ranks)
    sides, said = _sides(base, tuned, call.running.allow_pickle, options, adapter_form.names, form)
    _refuse_several(sides[0], form)
    chosen.refuse_idle(w.module for side in sides for w in side.weights.values())
    plan = make_plan(
        *sides,
        chosen=chosen,
        kinds=kinds,
        embeddings=tensors.embeddings,
        rest=tensors.rest,
        unread=_unread(options, form, sides[0]),
        outside={*sides[0].outside, *sides[1].outside},
    )
    plan = dataclasses.replace(plan, notes=(*said, *plan.notes))
    inputs = [Input("base", str(base)), Input("tuned", str(tuned))]
    if options.activations is not None:
        options.activations.match(plan.modules)
        inputs.append(Input("activations", str(search.activations), options.activations.digest))
    fates = plan.fates(options.rule)
    expected = sum(fate.nbytes for fate in fates)
    if size is not None and size.in_bytes:
        expected = min(expected, size.most)
    totals: ExtractTotals = {"expected_bytes_at_most": expected}
    keep = Path(search.spectrum_cache) if search.spectrum_cache is not None else None

    def write(out: Path) -> Report[ExtractTotals]:
        with kept_spectra(keep, out.parent, size is not None) as spectra:
            work = PairWork(
                sides, options.on_device(), spectra, call.running.jobs, call.running.progress
            )
            found = work.outcomes(plan.pairs, size)
            folder = out if form.name == "peft" else out.with_name("peft")
            report = extract_adapter(
                found, sides, plan, options, folder, inputs, call.command, conform_in_place
            )
            report = _gated(report, call.writing.max_error)
        if form.name == "peft":
            return report
        made, names = open_adapter(folder), base_names(sides[0])
        if "differences" in form.keeps and made.whole:
            made = WithDifferences(made, sides[0])
        return written_as(report, made, form, names, out, {}, options.dtype, call.running.jobs)

    return Prepared(
        call.report(inputs, fates, totals=totals, notes=plan.notes),
        tuple(side.path for side in sides),
        2 * expected,
        sum(side.stored.nbytes for side in sides),
        write,
        is_folder=form.is_folder,
        passes=_passes(options, search),
        jobs=lambda: extract_jobs(plan.pairs, sides, fates, form.file_name),
    )


def _passes(options: Decomposition, search: Search) -> float | None:
    """What a number costs at a given rank."""
    given = search.activations, search.spectrum_cache
    if options.rule.policy != "rank" or options.exact or options.device != "cpu" or any(given):
        return None
    return rates.DECOMPOSE + rates.DECOMPOSE_RANK * options.rule.value


def _refuse_rounded(to: Format, form: AdapterForm) -> None:
    """Raises UsageError for a scale that would go into lora_B, and be rounded there once more than
    what was measured."""
    if to.alpha == "module" or not (form.alpha is not None or form.rslora):
        return
    if to.alpha == "folded" or to.one_rank or form.rslora:
        why = {"folded": "cannot store lora_alpha"}.get(to.alpha, "has one scale for all ranks")
        given = "--rslora" if to.alpha == "one" and not to.one_rank else "--alpha and --rslora"
        raise UsageError(
            f"{given}: {to.title} {why}; leave them out, because the effect does not depend on them"
        )


def _options(ranks: Ranks, form: AdapterForm, search: Search, to: Format) -> Decomposition:
    """How to decompose and to write. Raises UsageError for options that exclude each other."""
    rule = rank_rule(ranks, DEFAULT_RANK)
    assert rule is not None
    target = consumer_named(form.consumer)
    if to.name != "peft":
        if not target.loads:
            raise UsageError(
                f"--for {target.name} needs the format of PEFT, but --to is {to.name}; leave one "
                "of the two out"
            )
        target = readers_of(to)
        refuse_base_name(to, form.base_name)
        refuse_bytes(ranks, to)
        _refuse_rounded(to, form)
    refuse_shared(rule, target)
    if search.activations is not None and (ranks.noise_floor or ranks.gavish_donoho):
        raise UsageError(
            "--activations also weighs the rounding noise, but --noise-floor and --gavish-donoho "
            "need it unweighted; choose ranks with --rank, --energy or --budget"
        )
    cached = search.spectrum_cache is not None
    # One alpha of the whole file is that of each module from the start, whatever their ranks.
    alpha = form.alpha
    if alpha is None and to.alpha == "one" and not to.one_rank:
        alpha = rule.value if rule.policy == "rank" else DEFAULT_RANK
    return Decomposition(
        rule,
        alpha,
        form.rslora,
        parse_float_dtype(form.dtype) if form.dtype else None,
        search.svd == "exact",
        search.tolerance,
        search.seed,
        search.device,
        target,
        depth=(ranks.max_rank or _CACHE_DEPTH) if cached else 0,
        measured=ranks.noise_floor or cached,
        activations=Activations(Path(search.activations)) if search.activations else None,
        base_name=form.base_name,
    )


def _refuse_several(base: Checkpoint, form: Format) -> None:
    """Raises UsageError for a pipeline, where the format is of one model."""
    if base.models and not form.by_component:
        able = " or ".join(name for name, row in FORMATS.items() if row.by_component)
        raise UsageError(
            f"{base.path}: is a pipeline of several models, and {form.title} is for one model; "
            f"give --to {able}, or the folder of one of its parts, such as "
            f"{base.path / min(base.models)}"
        )


def _unread(options: Decomposition, form: Format, base: Checkpoint) -> Callable[[str], bool]:
    """Whether what is to load the adapter takes no factors of a module."""
    called = form.called
    if called is None:
        return lambda module: options.consumer.refuses_factors(module, base.config)
    places = Places(base_names(base))

    def is_unread(module: str) -> bool:
        try:
            called(places.of(module))
        except UnsupportedAdapter:
            return True
        return False

    return is_unread


def _sides(
    base: str | Path,
    tuned: str | Path,
    allow_pickle: bool,
    options: Decomposition,
    names: str,
    form: Format,
) -> tuple[Sides, Sequence[str]]:
    """Both checkpoints by the names that the adapter is to have, and what to say of these."""
    sides = open_whole(base, allow_pickle), open_whole(tuned, allow_pickle)
    said = []
    for side in sides:
        if side.scheme is None:
            continue
        said.append(f"{side.path}: is in {side.scheme.title}; its dequantized numbers are used")
        _refuse_noise(side, side.scheme, options.rule.policy)
        said[-1] += unknown_noise(side)
    if form.name != "peft":
        refuse_fused(sides[0].path, parts(sides[0].specs, sides[0].models))
    if form.names:
        sides = in_layout_of(sides[0], form.names), in_layout_of(sides[1], form.names)
    elif names == "loaded" and options.consumer.loads:
        sides = loaded_view(sides[0]), loaded_view(sides[1])
        said = [*notes_on_names(sides[0]), *said]
    return sides, said


def _refuse_noise(side: Checkpoint, scheme: StoredFormat, policy: str) -> None:
    """Raises UsageError for a policy that would take the rounding of such codes for a change."""
    unknown = side.noise_unknown() if policy == "noise_floor" else []
    if policy == "gavish_donoho" or unknown:
        instead = "" if side.noise_unknown() else "--noise-floor, "
        of = f" ({unknown[0]})" if unknown else ""
        raise UsageError(
            f"{side.path}: is in {scheme.title}{of}, and --{policy.replace('_', '-')} does not "
            f"know its rounding; choose ranks with {instead}--rank, --energy or --budget"
        )


def _gated(report: Report[ExtractTotals], max_error: float | None) -> Report[ExtractTotals]:
    """The report. Raises QualityGateError."""
    said = above(max_error, report.modules, report.totals)
    if said:
        raise QualityGateError(
            f"{said}; nothing was written. Allow more with --rank or --energy", report
        )
    return report
