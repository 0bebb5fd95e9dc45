"""``extract``: the low-rank adapter that turns a base checkpoint into its fine-tuned copy."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_tools.adapting.scale import conform_in_place
from lora_tools.errors import QualityGateError, UsageError
from lora_tools.extracting.adapter import extract_adapter, kept_spectra
from lora_tools.extracting.decompose import Decomposition
from lora_tools.extracting.pair_work import PairWork
from lora_tools.extracting.pairs import make_plan
from lora_tools.figures import above
from lora_tools.formats.activations import Activations
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.options import (
    Size,
    consumer_named,
    layer_kinds,
    most_factors,
    name_filter,
    rank_rule,
    refuse_shared,
)
from lora_tools.provenance import command_of, tool_version
from lora_tools.records import Input, ProgressCallback, Report
from lora_tools.sources.as_loaded import loaded_view, notes_on_names
from lora_tools.sources.checkpoints import open_checkpoint

if TYPE_CHECKING:
    pass

DEFAULT_RANK = 32
_CACHE_DEPTH = 128  # directions a spectrum cache holds, where --max-rank does not say


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    ratio: float | None = None,
    cumulative: float | None = None,
    threshold: float | None = None,
    noise_floor: bool = False,
    gavish_donoho: bool = False,
    budget: str | None = None,
    max_rank: int | None = None,
    activations: str | Path | None = None,
    spectrum_cache: str | Path | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layout: Sequence[str] = (),
    alpha: float | None = None,
    rslora: bool = False,
    dtype: str | None = None,
    embeddings: Literal["lora", "save", "skip"] = "lora",
    rest: Literal["save", "skip", "error"] = "save",
    consumer: str = "peft",
    names: Literal["loaded", "stored"] = "loaded",
    svd: Literal["auto", "exact"] = "auto",
    tolerance: float = 1e-3,
    seed: int = 0,
    device: str = "cpu",
    jobs: int | None = None,
    max_error: float | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` a PEFT LoRA adapter with base + adapter ≈ tuned, by truncated SVD.

    Args:
        base, tuned: checkpoint folders, safetensors files or hub ids.
        rank: cap on each module's rank (default 32); a module of lower rank gets its own.
        energy, error, ratio, cumulative, threshold, noise_floor, gavish_donoho: instead, the rank
            that this policy chooses for each module, up to ``max_rank``; see ``linalg.ranks``.
        budget: instead, ranks for all modules at once, by which the adapter's file is no larger
            than "50MB", or its factors hold no more numbers than "10M", at the least whole error.
        activations: a file of ``collect_stats``: what is made small is the error of each layer's
            output on such inputs, E‖(Δ − BA)x‖², and not that of its weight.
        spectrum_cache: a file that keeps decompositions; those in it that fit are not made again.
        include, exclude: regular expressions on module names.
        layout: ``"REGEX=KIND"``: the layer kind of modules in whose name REGEX is found, where name
            and shape do not tell it (``linalg.layouts.named``).
        alpha: lora_alpha; by default each module's rank, so that the scaling is 1.
        rslora: write use_rslora, scaling alpha / √r; the effect is the same.
        dtype: of the factors; by default that of each base tensor.
        embeddings: decompose them, save them whole, or leave them out.
        rest: changed tensors without a low-rank form (norms, biases) are saved whole, left out, or
            an error.
        consumer: who will load the adapter: peft, vllm or llama.cpp.
        names: of modules: "loaded" for those that the installed transformers gives them in memory,
            which PEFT goes by; "stored" for those in BASE's files, as for other consumers always.
        svd: "exact" for the exact decomposition whatever the size.
        tolerance: the energy captured is within this share of the best possible at that rank.
        max_error: raise if a module's relative error, or the total's, exceeds this.
        dry_run: return the plan; read headers only and write nothing.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """
    command = command_of(extract, locals())
    started = time.perf_counter()
    size = Size(*most_factors(budget)) if budget is not None else None
    policies = {
        "rank": rank,
        "energy": energy,
        "error": error,
        "ratio": ratio,
        "cumulative": cumulative,
        "threshold": threshold,
        "noise_floor": noise_floor,
        "gavish_donoho": gavish_donoho,
        "budget": size.most if size is not None else None,
    }
    rule = rank_rule(policies, max_rank, DEFAULT_RANK)
    assert rule is not None
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"--alpha {alpha}: a number above 0 is needed")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance}: a number between 0 and 1 is needed")
    target = consumer_named(consumer)
    refuse_shared(rule, target)
    if activations is not None and (noise_floor or gavish_donoho):
        raise UsageError(
            "--activations weighs the rounding noise as well, and --noise-floor and "
            "--gavish-donoho judge it unweighed: choose ranks by --rank, --energy or --budget"
        )
    options = Decomposition(
        rule,
        alpha,
        rslora,
        parse_float_dtype(dtype) if dtype else None,
        svd == "exact",
        tolerance,
        seed,
        device,
        target,
        depth=(max_rank or _CACHE_DEPTH) if spectrum_cache else 0,
        measured=noise_floor or spectrum_cache is not None,
        activations=Activations(Path(activations)) if activations is not None else None,
    )
    keep = Path(spectrum_cache) if spectrum_cache is not None else None
    chosen, kinds = name_filter(include, exclude), layer_kinds(layout)
    destination = Path(out)
    sides = open_checkpoint(base, allow_pickle), open_checkpoint(tuned, allow_pickle)
    quantized = [side for side in sides if side.scheme is not None]
    if quantized and (noise_floor or gavish_donoho):
        raise UsageError(
            f"{quantized[0].path}: quantized, and --noise-floor and --gavish-donoho know the noise "
            "of rounding only: choose ranks by --rank, --energy or --budget"
        )
    said: list[str] = []
    if names == "loaded" and target.loads:
        sides = loaded_view(sides[0]), loaded_view(sides[1])
        said = notes_on_names(sides[0])
    if not dry_run:
        check_destination(destination, [side.path for side in sides], force)
        if keep is not None:
            check_destination(keep, [side.path for side in sides], force=True)
    plan = make_plan(*sides, chosen=chosen, kinds=kinds, embeddings=embeddings, rest=rest)
    said += [f"{side.path}: quantized; seen as what it dequantizes to" for side in quantized]
    plan = dataclasses.replace(plan, notes=(*said, *plan.notes))
    fates = plan.fates(rule)
    expected = sum(fate.nbytes for fate in fates)
    if size is not None and size.in_bytes:
        expected = min(expected, size.most)
    inputs = [Input("base", str(base)), Input("tuned", str(tuned))]
    if options.activations is not None:
        options.activations.match(plan.modules)
        inputs.append(Input("activations", str(activations), options.activations.digest))
    if dry_run:
        return Report(
            "extract",
            tool_version(),
            tuple(inputs),
            str(out),
            True,
            fates,
            totals={"expected_bytes_at_most": expected},
            notes=plan.notes,
            seconds=time.perf_counter() - started,
            command=command,
        )
    check_space(destination, 2 * expected)
    with staged(destination) as staging, kept_spectra(keep, staging, size is not None) as spectra:
        work = PairWork(sides, options.on_device(), spectra, jobs, progress)
        report = extract_adapter(
            work.outcomes(plan.pairs, size),
            sides,
            plan,
            options,
            staging / "out",
            inputs,
            command,
            conform_in_place,
        )
        report = dataclasses.replace(report, output=str(out))
        _gate(report, max_error)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _gate(report: Report, max_error: float | None) -> None:
    said = "" if max_error is None else above(max_error, report.modules, report.totals)
    if said:
        raise QualityGateError(
            f"{said}; nothing was written. Allow more with --rank or --energy", report
        )
