"""``rescale``: another strength, alpha or rank for an adapter, or the form one consumer reads."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_tools.adapting.convert_module import rank_ceiling, strength_of
from lora_tools.adapting.scale import Rescaling, refuse_unread, rescale_adapter
from lora_tools.adapting.write import no_effect, uncovered, write_as
from lora_tools.errors import AdapterError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapters.base_names import BaseNames
from lora_tools.formats.adapters.format import Format
from lora_tools.formats.adapters.peft import Adapter
from lora_tools.formats.adapters.table import FORMATS
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.options import Size, consumer_named, most_factors, rank_rule, refuse_shared
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Action, Fate, Input, ProgressCallback, Report
from lora_tools.sources.adapters import open_adapter
from lora_tools.sources.base_names import base_names

if TYPE_CHECKING:
    pass


def rescale(
    adapter: str | Path,
    out: str | Path,
    *,
    scale: float | None = None,
    alpha: float | None = None,
    effect: Literal["keep", "change"] = "keep",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
    threshold: float | None = None,
    budget: str | None = None,
    sv_fro: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    max_rank: int | None = None,
    rslora: bool | None = None,
    dtype: str | None = None,
    consumer: str = "peft",
    base: str | Path | None = None,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the adapter with another scale, alpha, rank or form.

    Args:
        scale: multiply the adapter's effect; lora_alpha changes, the factors do not.
        alpha: set lora_alpha. With ``effect="keep"`` lora_B makes up for it; with "change" the
            factors stay and the effect changes in proportion.
        rank, energy, error, ratio, cumulative, threshold, max_rank: resize, as in ``extract``: by
            an exact SVD of B·A that never forms it (QR of both factors, SVD of the r x r core).
        budget: instead, ranks for all modules at once, as in ``extract``, but each at least 1.
        sv_fro, sv_ratio, sv_cumulative: the same by kohya's names and numbers: a share of the norm
            (not of its square), what σ₁ is divided by, a share of Σσ.
        rslora: write use_rslora or not, the effect kept.
        dtype: of the factors; by default each keeps its own.
        consumer: write what peft, vllm or llama.cpp reads.
        base: the model it was trained on, a checkpoint or a diffusers pipeline, for formats with
            names of their own. What came in another format than PEFT's is written in it, but for a
            ``consumer`` that reads PEFT's; LoHa, LoKr and whole differences as LoCon.

    Raises:
        UsageError: nothing to do, or options that contradict each other.
        UnsupportedAdapter: DoRA with ``scale`` (its magnitude fixes the norm, so that a factor on
            the delta does not scale the effect), or a part that the consumer does not read.
    """
    command = command_of(rescale, locals())
    started = time.perf_counter()
    policies = {
        "rank": rank,
        "energy": energy,
        "error": error,
        "ratio": ratio,
        "cumulative": cumulative,
        "threshold": threshold,
        "sv_fro": sv_fro,
        "sv_ratio": sv_ratio,
        "sv_cumulative": sv_cumulative,
        "budget": None if budget is None else 1,
    }
    size = Size(*most_factors(budget)) if budget is not None else None
    rule = rank_rule(policies, max_rank)
    target = consumer_named(consumer)
    refuse_shared(rule, target)
    if scale is not None and not math.isfinite(scale):
        raise UsageError(f"--scale {scale}: a finite number is needed")
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"--alpha {alpha}: a number above 0 is needed")
    asked = (scale, alpha, rule, rslora, dtype)
    if all(option is None for option in asked) and target.patterns:
        raise UsageError(
            "nothing to do: give --scale, --alpha, --rank or another way to "
            "choose one, --rslora, --dtype or --for"
        )
    if effect == "change" and (alpha is None or rule is not None):
        raise UsageError("--effect change goes with --alpha, and not with --rank or --energy")
    names = base_names(base, allow_pickle) if base is not None else None
    given = open_adapter(adapter, allow_pickle, base=names, as_stored=names is None)
    given.need_lora("rank or alpha to change")
    form = FORMATS[given.format if target.patterns else "peft"]
    if given.unresolved and not form.keeps_names:
        raise AdapterError(
            f"{adapter}: {given.unresolved}; give the model it was trained on with --base"
        )
    if size is not None and size.in_bytes and form.name != "peft":
        raise UsageError(
            f"--budget {budget}: a size in bytes is for PEFT's file; for {form.title} "
            "give numbers, such as 10M"
        )
    if given.use_dora and (scale is not None or effect == "change"):
        raise UnsupportedAdapter(
            f"{adapter}: a DoRA adapter cannot be scaled: its magnitudes fix the norm of each "
            "output; merge it with a weight instead (ADAPTER=0.5)"
        )
    refuse_unread(given, target, names is not None and bool(names.tied))
    pad_to = None
    if not target.patterns:
        ranks = [rank_ceiling(m, given, rule) for m in given.modules.values()]
        pad_to = target.rank_for(max(ranks, default=1))
    options = Rescaling(
        1.0 if scale is None else scale,
        alpha,
        effect == "keep",
        rule,
        given.use_rslora if rslora is None else rslora,
        parse_float_dtype(dtype) if dtype else None,
        target,
        pad_to,
        size,
    )
    report = Report(
        "rescale",
        tool_version(),
        (Input("adapter", str(adapter)),),
        str(out),
        dry_run,
        _fates(given, options),
        notes=tuple(_notes(given, options, scale, form)),
        command=command,
    )
    if not dry_run:
        destination = Path(out)
        inputs = [given.path, *([names.path] if names is not None else [])]
        check_destination(destination, inputs, force)
        check_space(destination, 6 * given.nbytes)
        with staged(destination) as staging:
            folder = staging / ("out" if form.name == "peft" else "peft")
            report = rescale_adapter(report, given, options, folder, jobs, progress)
            if form.name != "peft":
                report = _written_as(report, form, names, given, folder, staging / "out", jobs)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _written_as(
    report: Report,
    form: Format,
    names: BaseNames | None,
    given: Adapter,
    folder: Path,
    out: Path,
    jobs: int | None,
) -> Report:
    """The PEFT adapter in ``folder`` in the format that it came in."""
    notes = write_as(open_adapter(folder), form, names, out, given.blocks, jobs)
    files = list(out.iterdir()) if out.is_dir() else [out]
    totals = {**report.totals, "bytes": sum(file.stat().st_size for file in files)}
    return dataclasses.replace(report, totals=totals, notes=(*report.notes, *notes))


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
            f"written in the format that it came in, {form.title}"
            if form.name == given.format
            else "written in PEFT's format"
        )
    idle = [m for m in given.modules.values() if not strength_of(m, given)]
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
            notes[-1] += "; lora_B is zero now, since lora_alpha no longer is"
    elif idle:
        notes.append(
            f"{len(idle)} modules had lora_alpha 0 and no effect, and have one now, such as "
            f"{idle[0].name}"
        )
    if options.rule is not None:
        notes += uncovered([*given.whole, *given.tokens])
    if options.pad_to is not None:
        notes.append(
            f"for {options.consumer.name}: every module has rank {options.pad_to}, "
            "alpha the same, zeros where it had less"
        )
    return notes
