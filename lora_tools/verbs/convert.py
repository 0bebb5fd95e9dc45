"""``convert``: an adapter in another format, its effect on the weights the same."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.adapters import open_adapter
from lora_tools.errors import NonFiniteError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapter_formats import FEATURES, Format, format_named
from lora_tools.formats.base_names import base_names
from lora_tools.formats.digest import PROVENANCE
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.peft import Adapter, LoraModule
from lora_tools.formats.view import BaseNames, parse_enable_lora
from lora_tools.linalg.layouts import Merged
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import Fate, Input, ModuleResult, ProgressCallback, Report
from lora_tools.verbs.common import (
    command_of,
    handed_on,
    layer_kinds,
    rank_rule,
    resized_totals,
    tool_version,
)
from lora_tools.verbs.convert_module import Options, convert_module, fold_of, writes_rslora
from lora_tools.verbs.merge_plan import adapter_digest

if TYPE_CHECKING:
    from lora_tools.linalg.layouts import Layout


def convert(
    adapter: str | Path,
    out: str | Path,
    *,
    to: str,
    base: str | Path | None = None,
    source: str | None = None,
    drop: Sequence[str] = (),
    alpha: float | None = None,
    enable_lora: str | None = None,
    layout: Sequence[str] = (),
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    dtype: str | None = None,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the adapter in the format ``to``.

    Factors are renamed, turned and reordered without a change to any number. Only where the format
    has no place for a module's alpha is its scale folded into lora_B, which rounds once. What the
    format cannot hold is refused unless ``drop`` names it.

    Args:
        base: the model it was trained on, a checkpoint or a diffusers pipeline; headers are read.
            Formats with names of their own need it (see ``FORMATS``).
        source: the format of ``adapter``; by default its content tells.
        drop: of ``FEATURES``, what is left out. Without DoRA's magnitudes the effect is another.
        alpha, enable_lora: what the file does not say (loralib, torchtune); ``"1,0,1"``.
        layout: ``REGEX=merged:BLOCKS/101``: modules that loralib is to have as MergedLinear.
        rank, energy, max_rank: cut the rank, as in ``rescale``. LoHa and LoKr become the exact
            LoRA that they are, which may be of a high rank; this lowers it, with the error stated.
        dtype: of the factors; by default each keeps its own (of ONNX Runtime, float32).

    Raises:
        UnsupportedAdapter: the format cannot hold a part of the adapter.
        LoraToolsError: any other of the tree, with nothing written.
    """
    command = command_of(convert, locals())
    started = time.perf_counter()
    target = format_named(to, "--to")
    rule = rank_rule({"rank": rank, "energy": energy}, max_rank)
    unknown = set(drop) - set(FEATURES)
    if unknown:
        raise UsageError(f"--drop {min(unknown)!r}: one of {', '.join(FEATURES)} is needed")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"--alpha {alpha}: a number above 0 is needed")
    written = parse_float_dtype(dtype) if dtype else target.dtype or None
    blocks = parse_enable_lora(enable_lora)
    kinds = layer_kinds(layout)
    names = base_names(base, allow_pickle) if base is not None else None
    given = open_adapter(
        adapter, allow_pickle, base=names, source_format=source, alpha=alpha, enable_lora=blocks
    )
    given.need_lora("factors to convert")
    found = features(given, names)
    if names is not None and names.tied:
        _refuse_tied(given, target, drop, found, names)
    options = _choose(given, target, frozenset(drop), rule, written, found)
    options = dataclasses.replace(options, blocks=_blocks(given, target, kinds))
    kept = _kept(given, options, found)
    report = Report(
        "convert",
        tool_version(),
        (Input("adapter", str(adapter)),),
        str(out),
        dry_run,
        _fates(given, kept, options),
        notes=tuple(_notes(given, kept, options, found)),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        inputs = [given.path, *([names.path] if names is not None else [])]
        check_destination(destination, inputs, force)
        check_space(destination, 3 * given.nbytes)
        with staged(destination) as staging:
            report = _convert(report, given, kept, names, options, staging / "out", jobs, progress)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def write_as(
    given: Adapter,
    to: Format,
    names: BaseNames | None,
    out: Path,
    blocks: Mapping[str, tuple[bool, ...]],
    jobs: int | None,
) -> tuple[str, ...]:
    """Write an adapter in a format to a path that does not exist; what was done comes back.

    Args:
        blocks: of modules that are MergedLinears, in loralib.

    Raises:
        UnsupportedAdapter: the format cannot hold a part of it.
    """
    found = features(given, names)
    options = _choose(given, to, frozenset(), None, None, found)
    options = dataclasses.replace(options, blocks=blocks)
    kept = _kept(given, options, found)
    made = {k: v for k, v in given.file.metadata.items() if k in PROVENANCE}
    _write(given, kept, names, options, made, out, jobs, None)
    return tuple(_notes(given, kept, options, found))


_MODULES = ("embedding", "conv", "experts", "head")  # features that are modules of their own


def features(given: Adapter, names: BaseNames | None = None) -> dict[str, list[str]]:
    """Which of ``FEATURES`` an adapter has, each with the modules or tensors that have it.

    ``names``: of its base, which alone tell that an output head is tied.
    """
    found = {
        "embedding": [m.name for m in given.modules.values() if m.form == "embedding"],
        "conv": [m.name for m in given.modules.values() if m.form == "conv"],
        "experts": [m.name for m in given.modules.values() if m.form == "experts"],
        "dora": [m.module for m in given.modules.values() if m.magnitude],
        "bias": [m.module for m in given.modules.values() if m.bias],
        "saved": list(given.whole),
        "tokens": list(given.tokens),
        "head": [m for m in given.modules if names is not None and m == names.tied],
    }
    return {feature: where for feature, where in found.items() if where}


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
            f"{given.path}: {min(where)} is the output head of {names.path}, too: {target.library} "
            "has one tensor for both and aborts on factors of it; --drop embedding leaves them "
            "out, and merging the adapter into the base keeps them"
        )


def _choose(
    given: Adapter,
    target: Format,
    drop: frozenset[str],
    rule: RankRule | None,
    dtype: str | None,
    found: Mapping[str, list[str]],
) -> Options:
    """Check that the format holds the adapter; settle on its one alpha and rank, if it has one."""
    lacks = {f: where for f, where in found.items() if f not in target.keeps and f not in drop}
    if lacks:
        parts = " or ".join(f"{FEATURES[f]} ({min(where)})" for f, where in lacks.items())
        raise UnsupportedAdapter(
            f"{given.path}: {target.title} has no place for {parts}; "
            f"{' '.join(f'--drop {f}' for f in lacks)} leaves them out"
        )
    alpha, pad_to = None, None
    if target.alpha == "one":
        modules = given.modules.values()
        top = max((_ceiling(m, given, rule) for m in modules), default=1)
        alphas, ranks = {m.alpha for m in modules}, {m.r for m in modules}
        plain = rule is None and not given.use_rslora and len(alphas) == 1
        if target.one_rank:
            plain, pad_to = plain and len(ranks) == 1, top
        alpha = alphas.pop() if plain else float(top)
    return Options(target, drop, rule, dtype, alpha, pad_to, {})


def _blocks(
    given: Adapter, target: Format, kinds: Sequence[tuple[re.Pattern[str], Layout | None]]
) -> dict[str, tuple[bool, ...]]:
    """The modules that are to be MergedLinears, and their blocks. Raises UsageError."""
    if kinds and not target.own_forms:
        raise UsageError(f"--layout goes with --to loralib; {target.title} has plain factors only")
    found: dict[str, tuple[bool, ...]] = dict(given.blocks)
    for pattern, kind in kinds:
        matching = [m for m in given.modules if pattern.search(m)]
        if not isinstance(kind, Merged) or len(set(kind.sizes)) > 1:
            raise UsageError(
                "--layout: merged:BLOCKS, such as merged:3/101, is what loralib needs to be told; "
                "its blocks are of one size"
            )
        if not matching:
            raise UsageError(f"--layout {pattern.pattern!r}: is found in no module's name")
        found |= dict.fromkeys(matching, kind.enabled)
    return found


def _ceiling(module: LoraModule, given: Adapter, rule: RankRule | None) -> int:
    if rule is None:
        return module.r
    rows, cols = given.shape(module.B)[0], math.prod(given.shape(module.A)[1:])
    return min(rule.ceiling(rows, cols), module.r)


def _kept(
    given: Adapter, options: Options, where: Mapping[str, list[str]]
) -> dict[str, LoraModule]:
    """The modules that are written."""
    gone = {m for f in _MODULES if f in options.dropped for m in where.get(f, ())}
    kept = {name: module for name, module in given.modules.items() if name not in gone}
    if not kept and not (options.to.name == "peft" and (given.whole or given.tokens)):
        raise UnsupportedAdapter(f"{given.path}: nothing would be left of it")
    return kept


def _fates(given: Adapter, kept: Mapping[str, LoraModule], options: Options) -> tuple[Fate, ...]:
    fates = []
    for name, module in given.modules.items():
        lost = [
            f
            for f, have in (("dora", module.magnitude), ("bias", module.bias))
            if have and f in options.dropped
        ]
        reason = f"rank {module.r}, alpha {module.alpha:g}"
        if lost:
            reason += "; without " + " and ".join(FEATURES[f] for f in lost)
        fates.append(Fate(name, "convert" if name in kept else "drop", reason))
    for feature, names in (("saved", given.whole), ("tokens", given.tokens)):
        action = "drop" if feature in options.dropped else "copy"
        fates += [Fate(name, action, FEATURES[feature]) for name in names]
    return tuple(fates)


def _notes(
    given: Adapter, kept: Mapping[str, LoraModule], options: Options, found: Mapping[str, list[str]]
) -> list[str]:
    notes = list(given.notes)
    lost = [f for f in found if f in options.dropped]
    if lost:
        what = " and ".join(FEATURES[f] for f in lost)
        notes.append(f"left out: {what}; the effect is not that of the adapter given")
    folded = sum(fold_of(m, m.r, given, options) != 1 for m in kept.values())
    if options.rule is None and folded:
        place = "no place for lora_alpha" if options.to.alpha == "folded" else "one alpha for all"
        notes.append(
            f"{options.to.title} has {place}: the scale went into lora_B of {folded} of "
            f"{len(kept)} modules, rounded once"
        )
    if options.pad_to is not None and any(m.r != options.pad_to for m in kept.values()):
        notes.append(f"every module has rank {options.pad_to}, with zeros where it had less")
    return notes


def _convert(
    report: Report,
    given: Adapter,
    kept: Mapping[str, LoraModule],
    names: BaseNames | None,
    options: Options,
    out: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    digest = adapter_digest(given)
    made = handed_on(given.file.metadata, report.command, digest)
    results = _write(given, kept, names, options, made, out, jobs, progress)
    files = list(out.iterdir()) if out.is_dir() else [out]
    totals: dict[str, Any] = {
        "modules": len(kept),
        "bytes": sum(f.stat().st_size for f in files),
        **resized_totals(results),
    }
    inputs = tuple(dataclasses.replace(i, digest=digest) for i in report.inputs)
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)


def write_modules(
    given: Adapter,
    modules: Collection[str],
    out: Path,
    target: Format,
    names: BaseNames,
    *,
    saved: Collection[str] = (),
    weight: float = 1.0,
    jobs: int | None = None,
) -> None:
    """Write those modules of an adapter, times ``weight``, and those of its tensors saved whole, as
    ``convert`` would, and with its errors."""
    options = _choose(
        given, target, frozenset(), None, target.dtype or None, features(given, names)
    )
    kept = {name: given.modules[name] for name in modules}
    options = dataclasses.replace(options, weight=weight)
    _write(given, kept, names, options, {}, out, jobs, None, saved)


def _write(
    given: Adapter,
    kept: Mapping[str, LoraModule],
    names: BaseNames | None,
    options: Options,
    made: Mapping[str, str],
    out: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
    saved: Collection[str] | None = None,
) -> list[ModuleResult]:
    from lora_tools import engine
    from lora_tools.formats.peft_format import PeftFormat
    from lora_tools.linalg.recipes import compute

    writer = (options.to.writer or PeftFormat)(out, names, compute)
    results = []
    try:
        for factors, result in engine.run(
            list(kept.values()),
            lambda module: convert_module(module, given, options),
            jobs=jobs,
            nbytes=lambda m: 16 * m.r * (math.prod(given.shape(m.A)[1:]) + given.shape(m.B)[0]),
            label=lambda module: module.module,
            progress=progress,
        ):
            writer.add(factors)
            if result is not None:
                results.append(result)
        if isinstance(writer, PeftFormat):
            _add_peft(writer, given, options)
        elif "saved" in options.to.keeps - options.dropped:
            for name in given.whole if saved is None else saved:
                writer.add_saved(name, _saved(given, name))
        writer.made = made
        writer.finish()
    finally:
        writer.close()
    return results


def _saved(given: Adapter, name: str) -> Any:
    tensor = given.tensor(given.whole[name])
    if not tensor.isfinite().all():
        raise NonFiniteError(f"{given.path}: {name}, saved whole, holds an inf or a NaN")
    return tensor


def _add_peft(writer: Any, given: Adapter, options: Options) -> None:
    """What PEFT alone has a place for."""
    for feature, keys in (
        ("saved", list(given.whole.values())),
        ("tokens", [rows.key for rows in given.tokens.values()]),
    ):
        if feature not in options.dropped:
            for key in keys:
                writer.add_raw(key, given.tensor(key))
    none = {
        "dora": ("use_dora", False),
        "bias": ("lora_bias", False),
        "saved": ("modules_to_save", None),
        "tokens": ("trainable_token_indices", None),
    }
    config = {**given.config, "use_rslora": writes_rslora(given, options)}
    config |= dict(none[feature] for feature in none if feature in options.dropped)
    writer.config = config
