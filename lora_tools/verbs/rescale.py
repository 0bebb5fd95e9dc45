"""``rescale``: another strength, alpha or rank for an adapter, or the form one consumer reads."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.adapters import open_adapter
from lora_tools.errors import AdapterError, NonFiniteError, UnsupportedAdapter, UsageError
from lora_tools.formats.adapter_formats import FORMATS, Format
from lora_tools.formats.base_names import base_names
from lora_tools.formats.consumers import Consumer
from lora_tools.formats.dtypes import parse_float_dtype, torch_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.peft import Adapter, LoraModule
from lora_tools.formats.view import BaseNames
from lora_tools.linalg.ranks import RankRule
from lora_tools.records import Fate, Input, ModuleResult, ProgressCallback, Report
from lora_tools.verbs.allot import Size
from lora_tools.verbs.common import (
    command_of,
    consumer_named,
    handed_on,
    most_factors,
    rank_rule,
    refuse_shared,
    resized_totals,
    tool_version,
)
from lora_tools.verbs.convert import write_as
from lora_tools.verbs.convert_module import module_layout, resized
from lora_tools.verbs.merge_plan import adapter_digest
from lora_tools.verbs.rescale_budget import shared_ranks

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class _Options:
    scale: float
    alpha: float | None
    keep_effect: bool
    rule: RankRule | None
    rslora: bool
    dtype: str | None
    consumer: Consumer
    pad_to: int | None  # the one rank of a consumer that reads no patterns
    size: Size | None = None  # what a shared rule must not exceed

    def with_rank(self, rank: int | None) -> _Options:
        """For a module whose rank a shared rule has chosen, if it has."""
        rule = self.rule if rank is None else RankRule("rank", rank)
        return dataclasses.replace(self, rule=rule)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """One module's new factors; ``result`` where its rank was chosen anew."""

    module: LoraModule
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    r: int
    alpha: float
    bias: torch.Tensor | None
    magnitude: torch.Tensor | None
    result: ModuleResult | None


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
    _refuse_unread(given, target, names is not None and bool(names.tied))
    pad_to = None
    if not target.patterns:
        ranks = [_ceiling(m, given, rule) for m in given.modules.values()]
        pad_to = target.rank_for(max(ranks, default=1))
    options = _Options(
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
            report = _rescale(report, given, options, folder, jobs, progress)
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


def conform_in_place(folder: Path, consumer: Consumer) -> None:
    """Rewrite an adapter folder as the consumer reads it: one rank, alpha = r, scale in lora_B."""
    given = open_adapter(folder)
    _refuse_unread(given, consumer, False)
    pad_to = consumer.rank_for(max(m.r for m in given.modules.values()))
    options = _Options(1.0, None, True, None, False, None, consumer, pad_to)
    new = folder.with_name(folder.name + "-conformed")
    report = Report("rescale", tool_version(), (Input("adapter", ""),), "", False, ())
    _rescale(report, given, options, new, 1, None)
    shutil.rmtree(folder)
    new.rename(folder)


def _refuse_unread(given: Adapter, consumer: Consumer, tied: bool) -> None:
    tied = tied or bool(given.config.get("ensure_weight_tying"))
    if tied and not consumer.head and any(m.form == "embedding" for m in given.modules.values()):
        raise consumer.refuse(
            "factors of an embedding that is the output head, too",
            "merge the adapter into the base instead",
        )
    if given.use_dora and not consumer.dora:
        raise consumer.refuse("DoRA", "merge the adapter into the base instead")
    if (given.whole or given.tokens) and not consumer.saved:
        first = min([*given.whole, *given.tokens])
        raise consumer.refuse(
            f"tensors saved whole ({first})", "merge the adapter into the base instead"
        )
    for module in given.modules.values():
        if module.form not in consumer.forms:
            raise consumer.refuse(
                f"factors of form {module.form} ({module.module})",
                "merge the adapter into the base instead",
            )
    if any(m.bias for m in given.modules.values()) and not consumer.bias:
        raise consumer.refuse("lora_bias", "merge the adapter into the base instead")


def _ceiling(module: LoraModule, given: Adapter, rule: RankRule | None) -> int:
    if rule is None:
        return module.r
    rows, cols = given.shape(module.B)[0], given.shape(module.A)[1]
    return min(rule.ceiling(rows, cols), module.r)


def _fates(given: Adapter, options: _Options) -> tuple[Fate, ...]:
    action = "resize" if options.rule is not None else "rescale"
    return (
        *(
            Fate(name, action, f"rank {m.r}, alpha {m.alpha:g}")
            for name, m in given.modules.items()
        ),
        *(Fate(name, "copy", "saved whole") for name in given.whole),
        *(Fate(name, "copy", "trained rows") for name in given.tokens),
    )


def _notes(given: Adapter, options: _Options, scale: float | None, form: Format) -> list[str]:
    notes = list(given.notes)
    if given.format != "peft":
        notes.append(
            f"written in the format that it came in, {form.title}"
            if form.name == given.format
            else "written in PEFT's format"
        )
    if scale is not None:
        notes.append(f"the effect is {scale:g} times what it was")
        if given.whole or given.tokens:
            notes.append("tensors saved whole are not scaled")
    elif not options.keep_effect:
        notes.append("the effect changes in proportion to lora_alpha")
    elif options.rule is None:
        notes.append("the effect is kept")
    if options.pad_to is not None:
        notes.append(
            f"for {options.consumer.name}: every module has rank {options.pad_to}, "
            "alpha the same, zeros where it had less"
        )
    return notes


def _rescale(
    report: Report,
    given: Adapter,
    options: _Options,
    folder: Path,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    from lora_tools import engine
    from lora_tools.formats.peft_writer import PeftWriter

    folder.mkdir()
    ranks: Mapping[str, int] = {}
    if options.size is not None and options.rule is not None:
        ranks = shared_ranks(given, options.rule, options.size, options.dtype, jobs)
    writer = PeftWriter(folder)
    results = []
    try:
        for scaled in engine.run(
            list(given.modules.values()),
            lambda module: _scale_module(module, given, options.with_rank(ranks.get(module.name))),
            jobs=jobs,
            nbytes=lambda m: 8 * (math.prod(given.shape(m.A)) + math.prod(given.shape(m.B))),
            label=lambda module: module.module,
            progress=progress,
        ):
            module = scaled.module
            writer.add_lora(
                module.module,
                scaled.lora_A,
                scaled.lora_B,
                scaled.alpha,
                form=module.form,
                parameter=module.parameter,
                r=scaled.r,
                bias=scaled.bias,
                magnitude=scaled.magnitude,
            )
            if scaled.result is not None:
                results.append(scaled.result)
        for key in (*given.whole.values(), *(rows.key for rows in given.tokens.values())):
            writer.add_raw(key, given.tensor(key))
        config = {**given.config, "use_rslora": options.rslora and options.pad_to is None}
        digest = adapter_digest(given)
        metadata = {k: v for k, v in given.file.metadata.items() if k != "format"}
        if report.command:  # none: this is a step of another verb, which has signed it
            metadata |= handed_on(metadata, report.command, digest)
        writer.finish(config, None, metadata)
    finally:
        writer.close()
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    totals: dict[str, Any] = {"modules": len(given.modules), "bytes": nbytes}
    totals |= resized_totals(results)
    inputs = tuple(dataclasses.replace(i, digest=digest) for i in report.inputs)
    return dataclasses.replace(report, inputs=inputs, modules=tuple(results), totals=totals)


def _scale_module(module: LoraModule, given: Adapter, options: _Options) -> _Scaled:
    from lora_tools.linalg import lora

    A, B = given.tensor(module.A), given.tensor(module.B)
    bias = given.tensor(module.bias) if module.bias else None
    before = lora.scaling(module.alpha, module.r, given.use_rslora)
    result, r = None, module.r
    if options.rule is not None:
        A, B, alpha, result = _resize(module, A, B, before * options.scale, options)
        r = result.rank
        now = lora.scaling(alpha, r, options.rslora)
        bias = _times(bias, before * options.scale / now)
    else:
        # Strength goes into alpha, which costs no rounding, unless alpha is given.
        strength = before * options.scale
        if options.alpha is not None:
            alpha = options.alpha
            if options.keep_effect:
                ratio = strength / lora.scaling(alpha, module.r, options.rslora)
                B, bias = _times(B, ratio), _times(bias, ratio)
        else:
            alpha = strength / lora.scaling(1.0, module.r, options.rslora)
            if options.scale == 1.0 and options.rslora == given.use_rslora:
                alpha = module.alpha
    if options.pad_to is not None:
        B = _times(B, lora.scaling(alpha, r, options.rslora))
        A, B = _pad(A, B, options.pad_to)
        r, alpha = options.pad_to, float(options.pad_to)
    if options.dtype is not None:
        dtype = torch_dtype(options.dtype)
        A, B, bias = A.to(dtype), B.to(dtype), None if bias is None else bias.to(dtype)
    magnitude = given.tensor(module.magnitude) if module.magnitude else None
    if not all(x.isfinite().all() for x in (A, B, bias, magnitude) if x is not None):
        raise NonFiniteError(
            f"{module.module}: the factors hold an inf or a NaN; were they so before? Otherwise "
            "choose a wider --dtype"
        )
    return _Scaled(module, A, B, r, alpha, bias, magnitude, result)


def _times(tensor: Any, factor: float) -> Any:
    """tensor · factor, rounded once to the tensor's dtype; None stays None."""
    if tensor is None or factor == 1.0:
        return tensor
    return (tensor.double() * factor).to(tensor.dtype)


def _pad(A: torch.Tensor, B: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero rows and columns up to rank r: the product stays."""
    from torch.nn.functional import pad

    missing = r - A.shape[0]
    return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))


def _resize(
    module: LoraModule, A: torch.Tensor, B: torch.Tensor, strength: float, options: _Options
) -> tuple[torch.Tensor, torch.Tensor, float, ModuleResult]:
    """The best factors of the rank the rule chooses, with the strength folded in."""
    import torch

    from lora_tools.linalg import lora
    from lora_tools.linalg.factors import cut_factors

    assert options.rule is not None
    layout = module_layout(module, A, B)

    def alpha(r: int) -> float:
        return options.alpha if options.alpha is not None else float(r)

    cut = cut_factors(
        layout,
        layout.split(A, B),
        (tuple(A.shape), tuple(B.shape)),
        strength,
        options.rule,
        torch.promote_types(A.dtype, B.dtype),
        lambda r: lora.scaling(alpha(r), r, options.rslora),
    )
    if not math.isfinite(cut.total):
        raise NonFiniteError(f"{module.module}: its factors hold an inf or a NaN")
    return cut.lora_A, cut.lora_B, alpha(cut.r), resized(module, layout, cut)
