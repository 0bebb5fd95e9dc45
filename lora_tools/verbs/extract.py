"""``extract``: the low-rank adapter that turns a base checkpoint into its fine-tuned copy."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_tools.errors import (
    MismatchError,
    QualityGateError,
    UsageError,
)
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint, open_checkpoint
from lora_tools.formats.dtypes import parse_float_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.records import Fate, Input, ProgressCallback, Report
from lora_tools.verbs.common import (
    consumer_named,
    layer_kinds,
    name_filter,
    rank_rule,
    tool_version,
)
from lora_tools.verbs.decompose import Options, Outcome, work_on
from lora_tools.verbs.extract_output import complete_saved, totals
from lora_tools.verbs.pairing import Plan, make_plan

if TYPE_CHECKING:
    from lora_tools.formats.peft_writer import PeftWriter

DEFAULT_RANK = 32


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_rank: int | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    layout: Sequence[str] = (),
    alpha: float | None = None,
    rslora: bool = False,
    dtype: str | None = None,
    embeddings: Literal["lora", "save", "skip"] = "lora",
    rest: Literal["save", "skip", "error"] = "save",
    consumer: str = "peft",
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
        energy: instead, the smallest rank that holds this share of ‖Δ‖²_F, up to ``max_rank``.
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
        svd: "exact" for the exact decomposition whatever the size.
        tolerance: the energy captured is within this share of the best possible at that rank.
        max_error: raise if a module's relative error, or the total's, exceeds this.
        dry_run: return the plan; read headers only and write nothing.

    Raises:
        QualityGateError: with the report; nothing is written then.
        LoraToolsError: any other of the tree, with nothing written.
    """
    started = time.perf_counter()
    rule = rank_rule(rank, energy, max_rank, DEFAULT_RANK)
    assert rule is not None
    if alpha is not None and not (alpha > 0 and math.isfinite(alpha)):
        raise UsageError(f"--alpha {alpha}: a number above 0 is needed")
    if not 0 < tolerance < 1:
        raise UsageError(f"--tolerance {tolerance}: a number between 0 and 1 is needed")
    options = Options(
        rule, alpha, rslora, parse_float_dtype(dtype) if dtype else None,
        svd == "exact", tolerance, seed, device, None, consumer_named(consumer),
    )  # fmt: skip
    chosen, kinds = name_filter(include, exclude), layer_kinds(layout)
    destination = Path(out)
    sides = open_checkpoint(base, allow_pickle), open_checkpoint(tuned, allow_pickle)
    if not dry_run:
        check_destination(destination, [side.path for side in sides], force)
    plan = make_plan(*sides, chosen=chosen, kinds=kinds, embeddings=embeddings, rest=rest)
    fates = plan.fates(rule)
    expected = sum(fate.nbytes for fate in fates)
    inputs = (Input("base", str(base)), Input("tuned", str(tuned)))
    if dry_run:
        return Report(
            "extract", tool_version(), inputs, str(out), True, fates,
            totals={"expected_bytes_at_most": expected}, notes=plan.notes,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
    check_space(destination, 2 * expected)
    with staged(destination) as staging:
        report = _extract(sides, plan, options, staging / "out", inputs, jobs, progress)
        report = dataclasses.replace(report, output=str(out))
        _gate(report, max_error)
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _extract(
    sides: tuple[Checkpoint, Checkpoint],
    plan: Plan,
    options: Options,
    folder: Path,
    inputs: tuple[Input, Input],
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Report:
    from lora_tools import engine
    from lora_tools.formats.peft_writer import PeftWriter

    device = engine.pick_device(options.device)
    options = dataclasses.replace(options, half=engine.half_products(device))
    folder.mkdir()
    writer = PeftWriter(folder)
    outcomes: list[Outcome] = []
    buffers = engine.Buffers()
    # What may be refused goes first, so that it is refused at once.
    pairs = sorted(plan.pairs, key=lambda pair: pair.action == "decompose")
    try:
        for outcome in engine.run(
            pairs,
            lambda pair: work_on(pair, sides, options, buffers),
            jobs=jobs,
            nbytes=lambda pair: 4 * pair.spec.numel if pair.action == "decompose" else 0,
            label=lambda pair: pair.name,
            progress=progress,
        ):
            _add(outcome, sides[1], options, writer)
            outcome.lora = None
            outcomes.append(outcome)
        if not writer.ranks:
            raise MismatchError(
                "no module has a low-rank change, and PEFT loads no adapter without one; "
                "are BASE and TUNED the same model?"
            )
        notes = [*plan.notes, *complete_saved(outcomes, plan, sides[1], writer)]
        digests = _digests(outcomes, sides)
        _finish(writer, plan, options, inputs[0].path, outcomes, digests)
    finally:
        writer.close()
    if not options.consumer.patterns:
        from lora_tools.verbs.rescale import conform_in_place

        conform_in_place(folder, options.consumer)
    place = {pair: i for i, pair in enumerate(plan.pairs)}
    outcomes.sort(key=lambda outcome: place[outcome.pair])
    modules = tuple(o.result for o in outcomes if o.result is not None)
    return Report(
        "extract", tool_version(),
        tuple(dataclasses.replace(i, digest=d) for i, d in zip(inputs, digests, strict=True)),
        "", False,
        (*(Fate(o.pair.name, o.action, o.pair.reason) for o in outcomes), *plan.settled),
        modules, totals(modules, sum(o.parameters for o in outcomes), folder), tuple(notes),
    )  # fmt: skip


def _add(outcome: Outcome, tuned: Checkpoint, options: Options, writer: PeftWriter) -> None:
    pair = outcome.pair
    if outcome.lora is not None:
        lora_A, lora_B, alpha = outcome.lora
        assert pair.layout is not None
        form = pair.layout.written
        if form not in options.consumer.forms:
            raise options.consumer.refuse(
                f"factors of a layer of kind {pair.layout.name} ({pair.name} changed)",
                "leave it out with --exclude, or extract for peft",
            )
        writer.add_lora(
            pair.module, lora_A, lora_B, alpha, form=form, parameter=pair.parameter, r=outcome.r
        )
        if pair.followed_by and options.consumer.head:
            # The same delta as a Linear's: the head's weight is stored as the embedding's is.
            writer.add_lora(pair.followed_by, lora_B.T.contiguous(), lora_A.T.contiguous(), alpha)
    elif outcome.action == "saved whole" and not options.consumer.saved:
        raise options.consumer.refuse(
            f"tensors saved whole ({pair.name} changed)",
            "leave such changes out with --rest skip (and --embeddings lora or skip), or extract "
            "for peft",
        )


def _finish(
    writer: PeftWriter,
    plan: Plan,
    options: Options,
    base_name: str,
    outcomes: Sequence[Outcome],
    digests: tuple[str, str],
) -> None:
    transposed = any(
        o.pair.layout.transposed and o.pair.layout.written == "matrix"
        for o in outcomes
        if o.result is not None and o.pair.layout is not None
    )
    config: dict[str, Any] = {
        "base_model_name_or_path": base_name,
        "use_rslora": options.rslora,
        "fan_in_fan_out": transposed,
    }
    if any(o.pair.followed_by and o.action in ("decomposed", "saved whole") for o in outcomes):
        config["ensure_weight_tying"] = True
    metadata = {
        "loratools": tool_version(), "base_digest": digests[0], "tuned_digest": digests[1],
    }  # fmt: skip
    writer.finish(config, plan.modules, metadata)


def _digests(outcomes: Sequence[Outcome], sides: tuple[Checkpoint, Checkpoint]) -> tuple[str, str]:
    """Content digests of both sides; tensors outside every pair are hashed here."""
    hashes: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for outcome in outcomes:
        if outcome.pair.base is not None:
            hashes[0][outcome.pair.base.name] = outcome.base_hash
        if outcome.pair.tuned is not None:
            hashes[1][outcome.pair.tuned.name] = outcome.tuned_hash
    result = []
    for side, known in zip(sides, hashes, strict=True):
        for name in side.specs.keys() - known.keys():
            known[name] = hashing.tensor_hash(side.raw(name))
            side.release(name)
        result.append(hashing.digest(side.specs.values(), known))
    return result[0], result[1]


def _gate(report: Report, max_error: float | None) -> None:
    if max_error is None:
        return
    worst = max(report.modules, key=lambda m: m.relative_error)
    total = report.totals["relative_error"]
    if worst.relative_error > max_error or total > max_error:
        raise QualityGateError(
            f"relative error above --max-error {max_error:g}: worst is {worst.module} with "
            f"{worst.relative_error:.4g} at rank {worst.rank}, total is {total:.4g}; nothing was "
            "written. Allow more with --rank or --energy",
            report,
        )
