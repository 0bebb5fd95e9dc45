"""An adapter written in a format: what the format holds of it, and by which numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lora_tools.adapting.convert_module import (
    Conversion,
    convert_module,
    factor_bytes,
    fold_of,
    rank_ceiling,
    strength_of,
    writes_rslora,
)
from lora_tools.adapting.jobs import copying_jobs, module_jobs
from lora_tools.engine.tasks import Call
from lora_tools.errors import NonFiniteError, UnsupportedAdapter
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.components import aligned
from lora_tools.formats.adapters.format import FEATURES, Format
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.adapters.places import Places
from lora_tools.formats.adapters.training_metadata import is_carried, note_on_hashes, updated
from lora_tools.jobs import Job
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import Fate, ModuleResult, ProgressCallback, Report

if TYPE_CHECKING:
    from lora_tools.formats.adapters.writer import Factors

T = TypeVar("T")


def write_as(
    given: Adapter,
    to: Format,
    names: BaseNames | None,
    out: Path,
    blocks: Mapping[str, tuple[bool, ...]],
    dtype: str | None,
    jobs: int | None,
) -> tuple[str, ...]:
    """Write an adapter in a format to a path that does not exist; what was done comes back.

    Args:
        blocks: of modules that are MergedLinears, in loralib.
        dtype: of the factors; None: the format's, or that of each.

    Raises:
        UnsupportedAdapter: the format cannot hold a part of it.
    """
    found = features(given, names)
    options = choose_conversion(given, to, None, None, dtype or to.dtype or None, found)
    options = dataclasses.replace(options, blocks=blocks)
    kept = kept_modules(given, options, found)
    made = {k: v for k, v in given.file.metadata.items() if is_carried(k)}
    write_factors(ConvertJob(given, kept, names, options, made, out), jobs, None)
    return tuple(conversion_notes(given, kept, options, found, names))


def written_as(
    report: Report[T],
    given: Adapter,
    to: Format,
    names: BaseNames | None,
    out: Path,
    blocks: Mapping[str, tuple[bool, ...]],
    dtype: str | None,
    jobs: int | None,
) -> Report[T]:
    """``write_as`` as the end of a verb: its report, with what this did."""
    notes = [*report.notes, *write_as(given, to, names, out, blocks, dtype, jobs)]
    files = list(out.iterdir()) if out.is_dir() else [out]
    old: Any = report.totals
    totals: Any = {**old, "bytes": sum(file.stat().st_size for file in files)}
    return dataclasses.replace(report, totals=totals, notes=tuple(dict.fromkeys(notes)))


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
        "bias": [
            m.module
            for m in given.modules.values()
            if m.bias or f"{m.module}.bias" in given.differences
        ],
        "saved": list(given.whole),
        "differences": without_factors(given),
        "tokens": list(given.tokens),
        "head": [m for m in given.modules if names is not None and m == names.tied],
    }
    return {feature: where for feature, where in found.items() if where}


def without_factors(given: Adapter) -> list[str]:
    """The tensors that it has a difference of, less the biases of modules with factors."""
    beside = {f"{module.module}.bias" for module in given.modules.values()}
    return sorted(given.differences.keys() - beside)


def choose_conversion(
    given: Adapter,
    target: Format,
    drop: frozenset[str] | None,
    rule: RankRule | None,
    dtype: str | None,
    found: Mapping[str, list[str]],
) -> Conversion:
    """Check that the format holds the adapter; settle on its one alpha and rank, if it has one.

    Args:
        drop: features that are left out; None where that cannot be asked for.
    """
    lacks = {
        f: where for f, where in found.items() if f not in target.keeps and f not in (drop or ())
    }
    if lacks:
        parts = " or ".join(f"{FEATURES[f]} ({min(where)})" for f, where in lacks.items())
        flags = " ".join(f"--drop {feature}" for feature in lacks)
        command = f"loratools convert --to {target.name} {flags}"
        raise UnsupportedAdapter(
            f"{given.path}: {target.title} has no place for {parts}; "
            + (f"{flags} leaves them out" if drop is not None else f"`{command}` leaves them out")
        )
    dora = () if "dora" in (drop or ()) else found.get("dora", ())
    without = sorted({m.module for m in given.modules.values()} - {*dora})
    if dora and without and not target.mixes_dora:
        raise UnsupportedAdapter(
            f"{given.path}: {min(dora)} has DoRA's magnitudes and {without[0]} has none, and "
            f"{target.title} needs them for all modules or for none; use --to kohya, or merge the "
            "adapter into the base"
        )
    alpha, pad_to = None, None
    if target.alpha == "one":
        modules = given.modules.values()
        top = max((rank_ceiling(m, given, rule) for m in modules), default=1)
        alphas, ranks = {m.alpha for m in modules}, {m.r for m in modules}
        plain = rule is None and not given.use_rslora and len(alphas - {0.0}) == len(alphas) == 1
        if target.one_rank:
            plain, pad_to = plain and len(ranks) == 1, top
        alpha = alphas.pop() if plain else float(top)
    return Conversion(target, drop or frozenset(), rule, dtype, alpha, pad_to, {})


def kept_modules(
    given: Adapter, options: Conversion, where: Mapping[str, list[str]]
) -> dict[str, LoraModule]:
    """The modules that are written."""
    gone = {m for f in _MODULES if f in options.dropped for m in where.get(f, ())}
    kept = {name: module for name, module in given.modules.items() if name not in gone}
    alone = options.to.name == "peft" and bool(given.whole or given.tokens)
    if "differences" in options.to.keeps - options.dropped:
        alone = alone or bool(without_factors(given))
    if not kept and not alone:
        raise UnsupportedAdapter(f"{given.path}: nothing would be left of the adapter")
    return kept


def conversion_notes(
    given: Adapter,
    kept: Mapping[str, LoraModule],
    options: Conversion,
    found: Mapping[str, list[str]],
    names: BaseNames | None = None,
) -> list[str]:
    """What a person should know of the conversion; ``names`` are the base's."""
    notes = [*given.notes, *note_on_hashes(given.stored.metadata)]
    if options.to.by_component and not given.unresolved:
        notes += places_of(given, kept, names).notes(kept)
    lost = [f for f in found if f in options.dropped]
    if lost:
        what = " and ".join(FEATURES[f] for f in lost)
        notes.append(f"left out: {what}; the effect is no longer that of the given adapter")
    idle = [m for m in kept.values() if not strength_of(m, given)]
    if idle:
        notes.append(no_effect(idle, given))
        if options.rule is not None or options.to.name != "peft":
            notes[-1] += "; lora_B is written as zeros, because programs differ on an alpha of 0"
    folded = sum(fold_of(m, m.r, given, options) != 1 for m in kept.values() if m not in idle)
    if options.rule is None and folded:
        place = "no field for lora_alpha" if options.to.alpha == "folded" else "one alpha for all"
        notes.append(
            f"{options.to.title} has {place}: the scale went into lora_B of {folded} of "
            f"{len(kept)} modules, which was rounded once"
        )
    if options.rule is not None:
        notes += uncovered([*given.whole, *given.tokens, *without_factors(given)])
    if options.pad_to is not None and any(m.r != options.pad_to for m in kept.values()):
        notes.append(f"every module has rank {options.pad_to}, padded with zeros")
    return notes


def no_effect(idle: Sequence[LoraModule], given: Adapter) -> str:
    """A note on modules whose scaling is 0, before and after."""
    return (
        f"{len(idle)} of {len(given.modules)} modules have lora_alpha 0, so they have no effect: "
        f"{idle[0].name}{', …' if idle[1:] else ''}"
    )


def uncovered(names: Collection[str]) -> list[str]:
    """A note, where ranks are chosen anew, on tensors that replace the base's: without the base
    their change is not known."""
    if not names:
        return []
    return [
        f"the figures do not cover {len(names)} tensors saved whole or trained tokens, such as "
        f"{min(names)}"
    ]


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
    options = choose_conversion(
        given, target, None, None, target.dtype or None, features(given, names)
    )
    kept = {name: given.modules[name] for name in modules}
    options = dataclasses.replace(options, weight=weight)
    write_factors(ConvertJob(given, kept, names, options, {}, out, saved), jobs, None)


@dataclasses.dataclass(frozen=True)
class ConvertJob:
    """An adapter to be written in another format.

    Attributes:
        kept: the modules that are written.
        names: of the base, where it is at hand.
        made: metadata that says how it was made.
        out: a path that does not exist.
        saved: which of the tensors saved whole are written; None: all.
    """

    given: Adapter
    kept: Mapping[str, LoraModule]
    names: BaseNames | None
    options: Conversion
    made: Mapping[str, str]
    out: Path
    saved: Collection[str] | None = None

    def tasks(self) -> list[Call[tuple[Factors, ModuleResult | None]]]:
        """One for each module."""
        return [
            Call(convert_module, (m,), m.module, 2 * factor_bytes(m, self.given))
            for m in self.kept.values()
        ]

    def copied(self) -> dict[str, str]:
        """Keys of what is written as it is, by the names that fates have for it."""
        kinds = (
            ("saved", self.given.whole),
            ("tokens", {name: rows.key for name, rows in self.given.tokens.items()}),
            ("differences", {n: self.given.differences[n] for n in without_factors(self.given)}),
        )
        kept = [mine for feature, mine in kinds if feature not in self.options.dropped]
        return {name: key for mine in kept for name, key in mine.items()}

    def base_modules(self) -> Mapping[str, str]:
        """The modules by the base's names, where it has all of them under other prefixes. PEFT goes
        by names in memory, which need not be those of the files."""
        if self.names is None or self.options.to.name == "peft":
            return {}
        modules = {module.module for module in self.kept.values()}
        parts = self.names.components if self.names.pipeline else ()
        trained_on = self.given.config.get("base_model_name_or_path")
        own, _ = aligned(sorted(modules), list(self.names.weights), parts, trained_on)
        return own if self.names.weights.keys() >= set(own.values()) else {}


def convert_jobs(job: ConvertJob, output: str, fates: Sequence[Fate]) -> Iterator[Job]:
    """One for each module, and for each tensor that is copied into the file ``output``."""
    given, options = job.given, job.options
    ranks = {
        name: options.pad_to or rank_ceiling(m, given, options.rule) for name, m in job.kept.items()
    }
    tasks = dict(zip(job.kept, job.tasks(), strict=True))
    yield from module_jobs(given, tasks, ranks, options.dtype, output, fates)
    yield from copying_jobs(given, job.copied(), output, fates)


def places_of(given: Adapter, kept: Collection[str], names: BaseNames | None) -> Places:
    """Where the modules that are written belong in a pipeline."""
    return Places(names, str(given.config.get("base_model_name_or_path") or ""), kept)


def write_factors(
    job: ConvertJob, jobs: int | None, progress: ProgressCallback | None
) -> list[ModuleResult]:
    """Write what is kept, and what else the format holds; results where ranks changed."""
    from lora_tools.engine import threads
    from lora_tools.formats.adapters.peft_format import PeftFormat
    from lora_tools.linalg.recipes import compute

    given, options, own = job.given, job.options, job.base_modules()
    writer = options.to.writer(job.out, job.names, compute)
    writer.places = places_of(given, job.kept, job.names)
    results, ranks, alphas = [], set[int](), set[float]()
    try:
        for factors, result in threads.run(
            job.tasks(), (given, options), None, jobs=jobs, progress=progress
        ):
            ranks.add(factors.r)
            alphas.add(factors.alpha)
            writer.add(dataclasses.replace(factors, module=own.get(factors.module, factors.module)))
            if result is not None:
                results.append(result)
        if isinstance(writer, PeftFormat):
            _add_peft(writer, given, options)
        elif "saved" in options.to.keeps - options.dropped:
            for name in given.whole if job.saved is None else job.saved:
                writer.add_saved(name, _finite(given, name, given.whole[name], "saved whole"))
        if "differences" not in options.dropped:
            for name in without_factors(given):
                key = given.differences[name]
                writer.add_difference(name, _finite(given, name, key, "a difference"))
        writer.made = updated(job.made, ranks, alphas)
        writer.finish()
    finally:
        writer.close()
    return results


def _finite(given: Adapter, name: str, key: str, what: str) -> Any:
    """What an adapter holds of a tensor that is no factor. Raises NonFiniteError."""
    tensor = given.tensor(key)
    if not tensor.isfinite().all():
        raise NonFiniteError(f"{given.path}: {name}, {what}, holds an inf or a NaN")
    return tensor


def _add_peft(writer: Any, given: Adapter, options: Conversion) -> None:
    """What PEFT alone has a place for."""
    for feature, keys in (
        ("saved", given.saved_keys),
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
