"""``merge``: a base checkpoint with one or more adapters added to its weights."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UsageError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint, open_checkpoint
from lora_tools.formats.checkpoint_writer import lay_out, parse_size
from lora_tools.formats.dtypes import parse_float_dtype, torch_dtype
from lora_tools.formats.output import check_destination, check_space, staged
from lora_tools.formats.safetensors_file import encode_header
from lora_tools.formats.sidecar import NAME as SIDECAR_NAME
from lora_tools.records import Input, ProgressCallback, Report, TensorSpec
from lora_tools.verbs.common import command_of, tool_version
from lora_tools.verbs.merge_plan import MergePlan, Target, plan_merge
from lora_tools.verbs.merge_tensor import Merged, merge_tensor, survival_totals
from lora_tools.verbs.plain_view import PlainView, plain_files, plain_view
from lora_tools.verbs.rewrite import Rewrite, signed
from lora_tools.verbs.weighted import Weighted, open_weighted

if TYPE_CHECKING:
    from lora_tools.formats.sidecar import SidecarWriter
    from lora_tools.linalg.merge import Survival


def merge(
    base: str | Path,
    adapters: Sequence[str | Path | tuple[str | Path, float]],
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: str | None = None,
    reversible: bool = False,
    requantize: bool = False,
    allow_unmatched: bool = False,
    allow_other_base: bool = False,
    jobs: int | None = None,
    allow_pickle: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
) -> Report:
    """Write to ``out`` the base with every adapter added: W + Σ weight · (its effect on W).

    Args:
        base: a checkpoint folder, a safetensors file or a hub id. One in four bits (bitsandbytes)
            is dequantized on the way, and the report states how much of the adapters was kept.
        adapters: of any format that is read: ``path``, ``"path=weight"`` or ``(path, weight)``;
            none is enough where ``dtype`` is given.
        dtype: of the output's float tensors; by default each keeps its own.
        shard_size: such as ``"5GB"``; by default the base's files again.
        reversible: write a sidecar by which ``unmerge`` gives the base back bit for bit.
        requantize: put what was in four bits back into four bits, which loses most of a small
            change; the report states how much.
        allow_unmatched: leave out adapter keys that match no tensor instead of refusing.
        allow_other_base: merge an adapter whose metadata names another base.
        dry_run: return the plan; read headers only and write nothing.

    The sum is formed in float32 (float64 for float64 tensors) and rounded once.

    Raises:
        LoraToolsError: any of the tree; the destination is untouched then.
    """
    command = command_of(merge, locals())
    started = time.perf_counter()
    wanted = parse_float_dtype(dtype) if dtype else None
    limit = parse_size(shard_size) if shard_size else None
    checkpoint = open_checkpoint(base, allow_pickle)
    view = plain_view(checkpoint)
    if view is not None and reversible:
        raise UsageError("--reversible cannot give back a four-bit BASE")
    if view is None and requantize:
        raise UsageError("--requantize needs a BASE in four bits (bitsandbytes)")
    checkpoint = view or checkpoint
    weighted = []
    if adapters or not dtype:
        weighted = open_weighted(adapters, allow_pickle, checkpoint)
    destination = Path(out)
    if (
        reversible
        and wanted
        and any(s.is_float and s.dtype != wanted for s in checkpoint.specs.values())
    ):
        raise UsageError("--reversible keeps the base's dtypes: leave --dtype out")
    if limit is not None and not checkpoint.is_folder:
        raise UsageError("--shard-size needs a folder as BASE: a bare file stays one file")
    plan = plan_merge(checkpoint, weighted, allow_unmatched)
    if reversible:
        _refuse_resized(plan, checkpoint)
    if view is not None and requantize:
        from lora_tools.verbs.requantize import plan_requantize, requantized

        work = plan_requantize(view, plan, out_specs(plan, wanted))
        shards = work.shards(view, limit)
    else:
        shards = lay_out(checkpoint, out_specs(plan, wanted), limit)
    shards = signed(shards, command, weighted)
    nbytes = sum(shard.nbytes for shard in shards)
    inputs = [Input("base", str(base)), *(Input("adapter", shown(w)) for w in weighted)]
    report = Report(
        "merge",
        tool_version(),
        tuple(inputs),
        str(out),
        dry_run,
        plan.fates(),
        totals={"bytes": nbytes},
        notes=plan.notes,
        command=command,
    )
    if not dry_run:
        paths = [checkpoint.path, *(w.adapter.path for w in weighted)]
        check_destination(destination, paths, force)
        beside = destination.with_name(destination.name + ".sidecar")
        if not checkpoint.is_folder and reversible:
            check_destination(beside, paths, force)
        check_space(destination, nbytes)
        with staged(destination) as staging:
            job = Rewrite(
                report,
                checkpoint,
                weighted,
                plan,
                shards,
                staging / "out",
                jobs,
                progress,
                allow_other_base,
            )
            if view is not None and requantize:
                report = requantized(job, view, work)
            else:
                report = _merge(job, reversible)
        if force and not checkpoint.is_folder and not reversible:
            beside.unlink(missing_ok=True)  # that of the file replaced
    return dataclasses.replace(report, seconds=time.perf_counter() - started)


def _refuse_resized(plan: MergePlan, base: Checkpoint) -> None:
    for target in plan.targets:
        if target.spec.shape != base.specs[target.base_name].shape:
            raise UsageError(
                f"--reversible: {target.spec.name} is replaced by one of another shape, which "
                "cannot be undone from a sidecar; keep the base instead"
            )


def shown(weighted: Weighted) -> str:
    """An adapter as it was given."""
    return weighted.path if weighted.weight == 1 else f"{weighted.path}={weighted.weight:g}"


def out_specs(plan: MergePlan, wanted: str | None) -> dict[str, TensorSpec]:
    """The output's tensors by name, floats in the dtype wanted."""
    specs = {}
    for target in (*plan.targets, *plan.untied):
        spec = target.spec
        if wanted and spec.is_float:
            spec = dataclasses.replace(spec, dtype=wanted)
        specs[spec.name] = spec
    return specs


def _merge(job: Rewrite, reversible: bool) -> Report:
    from lora_tools.formats.sidecar import SidecarWriter

    base, plan, out = job.source, job.plan, job.out
    specs = {spec.name: spec for shard in job.shards for spec in shard.specs}
    sidecar = SidecarWriter(out.parent) if reversible else None
    out_hashes: dict[str, str] = {}
    survivals: list[Survival] = []
    try:
        with job.writer() as writer:

            def work(target: Target) -> Merged:
                return merge_tensor(
                    target,
                    base,
                    specs[target.spec.name],
                    writer.write,
                    reversible,
                    measured=isinstance(base, PlainView),
                )

            targets = (*plan.targets, *plan.untied)
            for target, result in job.run(targets, work, lambda target: target.spec.nbytes):
                out_hashes[target.spec.name] = result.out_hash
                survivals += [result.survival] if result.survival else []
                listing = None if target in plan.untied else result.listing
                if sidecar is not None and listing is not None:
                    sidecar.add(target.base_name, listing)
            changed = changed_files(base, plan, specs)
            if isinstance(base, PlainView):
                changed = plain_files(base, changed)
            report = job.finish(writer, changed, (SIDECAR_NAME,))
        totals = {
            **report.totals,
            "tensors_merged": sum(bool(t.parts) for t in plan.targets) + len(plan.untied),
            "tensors_copied": sum(not t.parts for t in plan.targets),
            "output_digest": hashing.digest(specs.values(), out_hashes),
            **survival_totals(survivals),
        }
        if sidecar is not None:
            path = out / SIDECAR_NAME if base.is_folder else out.with_name("out.sidecar")
            _write_sidecar(sidecar, path, job, changed)
            totals["sidecar_bytes"] = path.stat().st_size
            totals["sidecar_share"] = path.stat().st_size / report.totals["bytes"]
    finally:
        if sidecar is not None:
            sidecar.close()
    return dataclasses.replace(report, totals=totals)


def changed_files(
    base: Checkpoint, plan: MergePlan, specs: dict[str, TensorSpec]
) -> dict[str, bytes]:
    """Small files of the output whose contents differ from the base's."""
    if not base.config:
        return {}
    config: dict[str, Any] = json.loads(json.dumps(base.config))
    inner = config.get("text_config")
    levels = [config, inner] if isinstance(inner, dict) else [config]
    for level in levels:
        if plan.unties:
            level["tie_word_embeddings"] = False
        for target in plan.targets:
            before = base.specs[target.base_name].shape
            if target.spec.shape != before and level.get("vocab_size") == before[0]:
                level["vocab_size"] = target.spec.shape[0]
    dtypes = {
        spec.dtype
        for name, spec in specs.items()
        if spec.is_float and name in base.specs and base.specs[name].dtype != spec.dtype
    }
    for key in ("torch_dtype", "dtype"):
        if dtypes and key in config:
            config[key] = str(torch_dtype(next(iter(dtypes)))).removeprefix("torch.")
    if config == base.config:
        return {}
    return {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _write_sidecar(
    sidecar: SidecarWriter, path: Path, job: Rewrite, changed: dict[str, bytes]
) -> None:
    base = job.source
    for file in base.files:
        header = file.header or encode_header(file.specs.values())[0][8:]
        sidecar.add_header(file.path.with_suffix(".safetensors").name, header)
    for name in {*changed, *([base.index_name] if base.index_name else [])}:
        sidecar.add_file(name, (base.path / name).read_bytes())
    digest, *others = job.digests
    used = [
        {"digest": other, "weight": w.weight} for other, w in zip(others, job.adapters, strict=True)
    ]
    sidecar.finish(path, digest, used)
