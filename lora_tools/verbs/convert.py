"""``convert``: an adapter in another format, its effect on the weights the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_tools.adapting.changes_to_lora import lora_jobs, plan_lora, write_lora
from lora_tools.adapting.convert_module import Conversion, product_energy
from lora_tools.adapting.input_dora import take_input_dora
from lora_tools.adapting.other_layout import in_layout
from lora_tools.adapting.write import (
    ConvertJob,
    choose_conversion,
    conversion_notes,
    convert_jobs,
    features,
    kept_modules,
    without_factors,
    write_factors,
)
from lora_tools.errors import UnsupportedAdapter, UsageError
from lora_tools.figures import resized_totals
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import FEATURES, Format
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.adapters.training_metadata import is_carried
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import Prepared
from lora_tools.linalg.layouts import Merged
from lora_tools.merging.plan import adapter_digest, names_in_base
from lora_tools.options import AdapterForm, Formats, Origin, Ranks, Running
from lora_tools.options.parse import enable_lora, layer_kinds
from lora_tools.options.ranks import rank_rule
from lora_tools.provenance import handed_on
from lora_tools.records import Action, Fate, Input, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.auto_class import identify
from lora_tools.sources.base_names import model_at
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import ConvertTotals
from lora_tools.verbs.frame import Call, verb

if TYPE_CHECKING:
    from lora_tools.linalg.layouts import Layout


@verb
def convert(
    call: Call,
    adapter: str | Path,
    formats: Formats,
    origin: Origin,
    adapter_form: AdapterForm,
    ranks: Ranks,
) -> Prepared:
    """Write to ``out`` the adapter in the format ``to``.

    Factors are renamed, turned and reordered without a change to any number. Only where the format
    has no place for a module's alpha is its scale folded into lora_B, which rounds once. What the
    format cannot hold is refused unless ``drop`` names it; without DoRA's magnitudes the effect is
    another. LoHa and LoKr become the exact LoRA that they are, which may be of a high rank; a cut
    of the rank lowers it, with the error stated.

    Raises:
        UnsupportedAdapter: the format cannot hold a part of the adapter.
        LoraToolsError: any other of the tree, with nothing written.
    """
    target, rule = FORMATS[formats.to].at(call.out), rank_rule(ranks)
    dtype = adapter_form.dtype
    written = parse_float_dtype(dtype) if dtype else target.dtype or None
    enabled, kinds = enable_lora(formats.enable_lora), layer_kinds(formats.layout)
    allow_pickle = call.running.allow_pickle
    base, names = model_at(origin.base, allow_pickle)
    given = open_adapter(
        adapter,
        allow_pickle,
        base=names,
        source_format=formats.source,
        alpha=formats.alpha,
        enable_lora=enabled,
    )
    identify(given, target, names, adapter_form.base_name)
    take_input_dora(given, target)
    if given.changes:
        return _made_lora(call, str(adapter), given, base, names, formats, adapter_form, ranks)
    if not given.differences:
        given.need_lora("factors to convert")
    if base is not None:
        names_in_base(Weighted(given, 1.0, str(adapter)), base)
    given, said = in_layout(given, target, names, formats.drop)
    found = features(given, names)
    if names is not None and names.tied:
        _refuse_tied(given, target, formats.drop, found, names)
    options = choose_conversion(given, target, frozenset(formats.drop), rule, written, found)
    options = dataclasses.replace(options, blocks=_blocks(given, target, kinds))
    kept = kept_modules(given, options, found)
    report = call.report(
        (Input("adapter", str(adapter)),),
        _fates(given, kept, options),
        notes=(*said, *conversion_notes(given, kept, options, found, names)),
    )

    def write(out: Path) -> Report[ConvertTotals]:
        return _convert(report, given, kept, names, options, out, call.running)

    read = (given.path, *([names.path] if names is not None else []))
    nbytes, read_bytes = 3 * given.nbytes, given.original.nbytes
    job = ConvertJob(given, kept, names, options, {}, Path(call.out))
    return Prepared(
        report,
        read,
        nbytes,
        read_bytes,
        write,
        is_folder=target.is_folder,
        jobs=lambda: convert_jobs(job, target.file_name, report.plan),
    )


def _made_lora(
    call: Call,
    path: str,
    given: Adapter,
    base: Checkpoint | None,
    names: BaseNames | None,
    formats: Formats,
    adapter_form: AdapterForm,
    ranks: Ranks,
) -> Prepared:
    """An adapter of a type that is no LoRA, to be made one."""
    works, rule = plan_lora(given, base, formats.to), rank_rule(ranks)
    assert base is not None
    dtype = parse_float_dtype(adapter_form.dtype) if adapter_form.dtype else None
    if rule is None:
        raise UsageError(
            f"{path} is an adapter of {works[0].source.kind.title}, which is not a product of two "
            "factors; say how close a LoRA should come, with --rank or --energy"
        )
    fates = [
        *(Fate(w.source.module, Action.CONVERT, w.source.kind.title) for w in works),
        *(Fate(name, Action.COPY, FEATURES["saved"]) for name in given.whole),
    ]
    report = call.report((Input("adapter", path),), tuple(fates), notes=given.notes)

    def write(out: Path) -> Report[ConvertTotals]:
        digest = adapter_digest(given)
        made = handed_on(given.file.metadata, report.command, digest)
        running = call.running
        results = write_lora(
            given,
            works,
            base,
            names,
            rule,
            dtype,
            made,
            out,
            jobs=running.jobs,
            progress=running.progress,
        )
        totals: ConvertTotals = {
            "modules": len(works),
            "bytes": sum(f.stat().st_size for f in out.iterdir()),
            **resized_totals(results, ()),
        }
        inputs = tuple(dataclasses.replace(i, digest=digest) for i in report.inputs)
        return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)

    nbytes = sum(4 * sum(w.target.spec.shape) * 64 for w in works)
    is_folder = FORMATS[formats.to].is_folder
    read_bytes = given.original.nbytes + sum(w.target.spec.nbytes for w in works)
    read = (given.path, base.path)
    return Prepared(
        report,
        read,
        nbytes,
        read_bytes,
        write,
        is_folder=is_folder,
        jobs=lambda: lora_jobs(given, works, base, rule, dtype, FORMATS[formats.to], fates),
    )


def _refuse_tied(
    given: Adapter,
    target: Format,
    drop: Sequence[str],
    found: Mapping[str, list[str]],
    names: BaseNames,
) -> None:
    """Raises UnsupportedAdapter for an embedding's factors that the format's reader fails on."""
    where = found.get("embedding", [])
    if where and not target.tied_embedding and "embedding" not in drop:
        raise UnsupportedAdapter(
            f"{given.path}: {min(where)} is also the output head of {names.path}: {target.library} "
            "has one tensor for both, and aborts if there are factors of it; leave them out with "
            "--drop embedding, or merge the adapter into the base to keep them"
        )


def _blocks(
    given: Adapter, target: Format, kinds: Sequence[tuple[re.Pattern[str], Layout | None]]
) -> dict[str, tuple[bool, ...]]:
    """The modules that are to be MergedLinears, and their blocks. Raises UsageError."""
    if kinds and not target.own_forms:
        raise UsageError(f"--layout is for --to loralib; {target.title} has plain factors only")
    found: dict[str, tuple[bool, ...]] = dict(given.blocks)
    for pattern, kind in kinds:
        matching = [m for m in given.modules if pattern.search(m)]
        if not isinstance(kind, Merged) or len(set(kind.sizes)) > 1:
            raise UsageError(
                "--layout: loralib needs merged:BLOCKS, such as merged:3/101, with blocks of "
                "equal size"
            )
        if not matching:
            raise UsageError(f"--layout {pattern.pattern!r}: matches no module name")
        found |= dict.fromkeys(matching, kind.enabled)
    return found


def _fates(given: Adapter, kept: Mapping[str, LoraModule], options: Conversion) -> tuple[Fate, ...]:
    fates = []
    for name, module in given.modules.items():
        lost = [
            f
            for f, have in (
                ("dora", module.magnitude),
                ("bias", module.bias or f"{module.module}.bias" in given.differences),
            )
            if have and f in options.dropped
        ]
        reason = f"rank {module.r}, alpha {module.alpha:g}"
        if lost:
            reason += "; without " + " and ".join(FEATURES[f] for f in lost)
        fates.append(Fate(name, Action.CONVERT if name in kept else Action.DROP, reason))
    for feature, names in (
        ("saved", [*given.whole]),
        ("tokens", [*given.tokens]),
        ("differences", without_factors(given)),
    ):
        action = Action.DROP if feature in options.dropped else Action.COPY
        fates += [Fate(name, action, FEATURES[feature]) for name in names]
    return tuple(fates)


def _dropped(given: Adapter, kept: Mapping[str, LoraModule]) -> list[tuple[str, float]]:
    """The modules that are left out, and the energy of their changes."""
    gone = (module for name, module in given.modules.items() if name not in kept)
    return [(module.name, product_energy(module, given)) for module in gone]


def _convert(
    report: Report[ConvertTotals],
    given: Adapter,
    kept: Mapping[str, LoraModule],
    names: BaseNames | None,
    options: Conversion,
    out: Path,
    running: Running,
) -> Report[ConvertTotals]:
    digest = adapter_digest(given.original)
    said = {key: text for key, text in given.file.metadata.items() if is_carried(key)}
    made = said | handed_on(said, report.command, digest)
    job = ConvertJob(given, kept, names, options, made, out)
    results = write_factors(job, running.jobs, running.progress)
    files = list(out.iterdir()) if out.is_dir() else [out]
    totals: ConvertTotals = {
        "modules": len(kept),
        "bytes": sum(f.stat().st_size for f in files),
        **resized_totals(results, _dropped(given, kept) if options.rule is not None else ()),
    }
    inputs = tuple(dataclasses.replace(i, digest=digest) for i in report.inputs)
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)
