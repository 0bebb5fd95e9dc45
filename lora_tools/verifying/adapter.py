"""How far is base + adapter from the tuned checkpoint? By the merged weights themselves in float64,
and not by the route that ``extract`` measures on."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lora_tools.errors import MismatchError, NonFiniteError
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import align, split_tensor
from lora_tools.merging.plan import adapter_digest, build_effects, plan_merge
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import as_matrix
from lora_tools.options.gate import exceeded
from lora_tools.records import Fate, Input, ModuleResult, ProgressCallback
from lora_tools.sources.weighted import Weighted
from lora_tools.verifying.findings import Findings

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class _Distance:
    """‖merged − tuned‖², ‖tuned − base‖² and ‖base‖² of one tensor."""

    error: float
    change: float
    base: float
    hashes: tuple[str, str]

    @property
    def relative(self) -> float:
        if self.change:
            return math.sqrt(self.error / self.change)
        return math.inf if self.error else 0.0


def verify_adapter(
    weighted: Weighted,
    base: Checkpoint,
    tuned: Checkpoint,
    max_error: float | None,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Findings:
    """The true error of an extraction, module by module, and of whatever the adapter leaves out."""
    from lora_tools.engine import threads

    to_base, sentence = align(list(tuned.specs), list(base.specs))
    theirs = {ours: own for own, ours in to_base.items()}
    plan = plan_merge(base, [weighted], allow_unmatched=True)
    targets = [t for t in plan.targets if t.spec.name in theirs and t.spec.is_float]
    if not targets:
        raise MismatchError(f"{base.path} and {tuned.path} have no tensor in common")
    distances = list(
        threads.run(
            targets,
            lambda target: _distance(target, base, tuned, theirs[target.spec.name]),
            jobs=jobs,
            nbytes=lambda target: target.spec.nbytes,
            label=lambda target: target.spec.name,
            progress=progress,
        )
    )
    fates, modules = [], []
    for target, d in zip(targets, distances, strict=True):
        ranks = [p.source.r for p in target.parts if p.kind in ("lora", "dora")]  # type: ignore[union-attr]
        if not target.parts:
            left = "left out" if d.change else "unchanged"
            fates.append(Fate(target.spec.name, left, "the adapter does not act on it"))
            continue
        fates.append(Fate(target.spec.name, "compared", f"relative error {d.relative:.4g}"))
        if ranks:
            modules.append(_result(target, d, max(ranks)))
    error = math.fsum(d.error for d in distances)
    change = math.fsum(d.change for d in distances)
    held = [d for t, d in zip(targets, distances, strict=True) if t.parts]
    inside = math.fsum(d.error for d in held), math.fsum(d.change for d in held)
    totals: dict[str, Any] = {
        "modules": len(modules),
        "rank_min": min((m.rank for m in modules), default=0),
        "rank_max": max((m.rank for m in modules), default=0),
        "relative_error": math.sqrt(inside[0] / inside[1]) if inside[1] else 0.0,
        "energy": 1 - inside[0] / inside[1] if inside[1] else 1.0,
        "relative_error_of_all": math.sqrt(error / change) if change else 0.0,
    }
    worst = max(modules, key=lambda m: m.relative_error, default=None)
    offence = ""
    if worst is not None:
        offence = exceeded(
            max_error,
            worst.module,
            worst.relative_error,
            totals["relative_error"],
            f" at rank {worst.rank}",
        )
    verdict = (
        f"relative error {totals['relative_error']:.4g} over what the adapter acts on, "
        f"{totals['relative_error_of_all']:.4g} over all that changed"
    )
    notes = [*plan.notes, *([f"tuned names: {sentence}"] if sentence else [])]
    notes += [f"{fate.tensor}: matches nothing in the base" for fate in plan.unmatched]
    inputs = (
        Input("adapter", "", adapter_digest(weighted.adapter)),
        *(Input("", "", digest) for digest in _digests(targets, distances, base, tuned, theirs)),
    )
    return Findings(inputs, tuple(fates), verdict, offence, totals, tuple(notes), tuple(modules))


def _distance(target: Target, base: Checkpoint, tuned: Checkpoint, own: str) -> _Distance:
    import torch

    from lora_tools.linalg.lora import rows_per_run
    from lora_tools.linalg.merge import TensorMerge

    hashes = hashing.tensor_hash(base.raw(target.base_name)), hashing.tensor_hash(tuned.raw(own))
    W, T = as_matrix(base.tensor(target.base_name), target), as_matrix(tuned.tensor(own), target)
    if target.spec.shape != base.specs[target.base_name].shape or W.shape != T.shape:
        saved = target.parts[0] if target.parts else None
        if saved is None or saved.kind != "saved":
            raise MismatchError(
                f"{target.spec.name}: base is {list(W.shape)}, tuned {list(T.shape)}"
            )
        S = as_matrix(saved.weighted.adapter.tensor(str(saved.source)), target)
        energy = float(T.double().square().sum())
        return _Distance(float((S.double() - T.double()).square().sum()), energy, energy, hashes)

    def read(start: int, stop: int) -> torch.Tensor:
        return W[start:stop].to(torch.float64, copy=True)

    shape = (W.shape[0], W.shape[1])
    work = TensorMerge(build_effects(target), shape, read, torch.float64)
    error = change = energy = 0.0
    for start in range(0, shape[0], rows_per_run(shape)):
        stop = min(start + rows_per_run(shape), shape[0])
        wide, ours = T[start:stop].double(), read(start, stop)
        energy += float(ours.square().sum())
        change += float((wide - ours).square().sum())
        error += float((wide - work.forward(ours, start, stop)).square().sum())
    base.release(target.base_name)
    tuned.release(own)
    if not math.isfinite(error + change):
        raise NonFiniteError(f"{target.spec.name}: base, tuned or adapter holds an inf or a NaN")
    return _Distance(error, change, energy, hashes)


def _result(target: Target, d: _Distance, rank: int) -> ModuleResult:
    [layout, *_] = [p.layout.name for p in target.parts if p.layout is not None]
    energy = 1 - d.error / d.change if d.change else 0.0
    return ModuleResult(
        module=split_tensor(target.spec.name)[0],
        layout=layout,
        shape=target.spec.shape,
        rank=rank,
        relative_error=d.relative,
        energy=energy,
        gain_bound=math.nan,
        delta_norm=math.sqrt(d.change),
        relative_change=math.sqrt(d.change / d.base) if d.base else math.inf,
        method="difference",
    )


def _digests(
    targets: list[Target],
    distances: list[_Distance],
    base: Checkpoint,
    tuned: Checkpoint,
    theirs: dict[str, str],
) -> tuple[str, str]:
    known: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for target, d in zip(targets, distances, strict=True):
        known[0][target.base_name] = d.hashes[0]
        known[1][theirs[target.spec.name]] = d.hashes[1]
    result = []
    for side, hashes in zip((base, tuned), known, strict=True):
        for name in side.specs.keys() - hashes.keys():
            hashes[name] = hashing.tensor_hash(side.raw(name))
        result.append(hashing.digest(side.specs.values(), hashes))
    return result[0], result[1]
