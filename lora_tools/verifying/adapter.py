"""How far is base + adapter from the tuned checkpoint? By the merged weights themselves in float64,
and not by the route that ``extract`` measures on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lora_tools.errors import MismatchError, NonFiniteError
from lora_tools.extracting.change import measured
from lora_tools.extracting.otherwise import refuse_stored_otherwise
from lora_tools.extracting.pairs import few_partners
from lora_tools.figures import Total, above, left_out_totals, no_floats
from lora_tools.formats import digest as hashing
from lora_tools.formats.adapters.peft import Adapter, LoraModule
from lora_tools.formats.alignment import align
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.merging.fit import fit_base
from lora_tools.merging.fitted import FittedBase
from lora_tools.merging.plan import MergePlan, adapter_digest, build_effects, plan_merge
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import as_matrix
from lora_tools.records import Action, Fate, Input, ModuleResult, ProgressCallback
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import VerifyTotals
from lora_tools.verifying.findings import Findings

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class _Distance:
    """‖merged − tuned‖², ‖tuned − base‖² and ‖base‖² of one tensor. What is no float has no such
    figures: 0 where the two are the same, else NaN."""

    error: float
    change: float
    base: float
    hashes: tuple[str, str]

    @property
    def known(self) -> bool:
        return not math.isnan(self.error + self.change)

    @property
    def relative(self) -> float:
        return Total(self.change, self.error).relative_error


@dataclasses.dataclass(frozen=True)
class _Compared:
    """One tensor of the tuned side by the base's ``name``, and by its ``own``; ``target`` is what
    the adapter makes of the base's, or None where the base lacks it."""

    name: str
    own: str
    target: Target | None
    brings: bool  # whether the adapter acts on it, or has it whole


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
    from lora_tools.engine.tasks import Call

    to_base, sentence = align(list(tuned.specs), list(base.specs))
    named = {to_base[name]: spec for name, spec in tuned.specs.items()}
    refuse_stored_otherwise((base.path, base.specs), (tuned.path, named), lambda module: True, "")
    fitted = fit_base(base, [weighted], allow_unmatched=True, add_heads=False)
    plan = plan_merge(fitted, [weighted], allow_unmatched=True)
    pairs, settled = _paired(plan, to_base, weighted.adapter, fitted, tuned)
    if not any(pair.target for pair in pairs):
        raise MismatchError(f"{base.path} and {tuned.path} have no tensor in common")
    few = few_partners(base, tuned, to_base)
    tasks = [Call(_distance, (p,), p.name, _size(p, fitted, tuned)) for p in pairs]
    sources = (weighted.adapter, fitted, tuned)
    distances = list(threads.run(tasks, sources, None, jobs=jobs, progress=progress))
    both = list(zip(pairs, distances, strict=True))
    modules = [_result(p.target, d) for p, d in both if p.target and _ranks(p.target)]
    totals = _totals(both, modules, settled)
    verdict = _verdict(both, totals)
    said = [f"tuned names: {sentence}"] if sentence else []
    notes = [*([few] if few else []), *plan.notes, *tuned.notes, *said]
    there = {pair.own for pair in pairs if pair.target is None} | {p.name for p in pairs}
    notes += [
        f"{fate.tensor}: matches nothing in the base"
        for fate in plan.unmatched
        if fate.tensor not in there
    ]
    notes += _one_sided(settled)
    notes += no_floats("not the same as in tuned", [p.name for p, d in both if not d.known])
    inputs = (
        Input("adapter", "", adapter_digest(weighted.adapter)),
        *(Input("", "", digest) for digest in _digests(both, base, tuned)),
    )
    return Findings(
        inputs,
        (*(_fate(p, d) for p, d in both), *settled),
        verdict,
        above(max_error, modules, totals),
        totals,
        tuple(notes),
        tuple(modules),
    )


def _paired(
    plan: MergePlan,
    to_base: Mapping[str, str],
    adapter: Adapter,
    base: Checkpoint,
    tuned: Checkpoint,
) -> tuple[list[_Compared], list[Fate]]:
    """Every tensor that the tuned side has, and what becomes of the others.

    An output head of its own is compared with the embedding where the tuned side has it as that;
    where it is the embedding on both sides, it goes with that.
    """
    theirs = {name: own for own, name in to_base.items()}
    tied = {to_base.get(name, name): own for name, own in tuned.weights.ties.items()}
    found, settled = [], []
    for target in (*plan.targets, *plan.untied):
        name = target.spec.name
        own = theirs.get(name) or ("" if name in base.weights.ties else tied.get(name, ""))
        if own:
            found.append(_Compared(name, own, target, bool(target.parts)))
        elif name in tied:
            settled.append(Fate(name, Action.TIED, f"the same tensor as {tied[name]}"))
        else:
            why = "the adapter acts on it" if target.parts else "the adapter leaves it as it is"
            settled.append(Fate(name, Action.ONLY_IN_BASE, why))
    met = {pair.own for pair in found}
    for own, name in to_base.items():
        if own == tuned.weights.head and own not in met:
            settled.append(Fate(name, Action.TIED, f"the same tensor as {tuned.weights.embedding}"))
        elif own not in met:
            found.append(_Compared(name, own, None, own in adapter.whole))
    return found, settled


def _totals(
    both: Sequence[tuple[_Compared, _Distance]],
    modules: Sequence[ModuleResult],
    settled: Sequence[Fate],
) -> VerifyTotals:
    """Figures over all that changed, and beside them what of it the adapter leaves out."""
    counted = [(p, d) for p, d in both if d.known]
    total = Total.of((d.change, d.error) for _, d in counted)
    acted_on = Total.of((d.change, d.error) for p, d in counted if p.brings)
    left = [(p.name, d.change) for p, d in both if not p.brings and d.change]
    return {
        "modules": len(modules),
        "rank_min": min((m.rank for m in modules), default=0),
        "rank_max": max((m.rank for m in modules), default=0),
        "relative_error": total.relative_error,
        "energy": 1 - total.missing_share,
        "relative_error_acted_on": acted_on.relative_error,
        "relative_error_of_all": total.relative_error,
        **left_out_totals(left, total),
        "one_sided": sum(p.target is None for p, _ in both)
        + sum(fate.action == Action.ONLY_IN_BASE for fate in settled),
    }


def _verdict(both: Sequence[tuple[_Compared, _Distance]], totals: VerifyTotals) -> str:
    """How near it is, of what changed; or that nothing did, and how far the adapter takes it."""
    known = [d for _, d in both if d.known]
    if any(d.change for d in known):
        return (
            f"relative error {totals['relative_error']:.4g} over all that changed, "
            f"{totals['relative_error_acted_on']:.4g} over what the adapter acts on"
        )
    moved = math.sqrt(math.fsum(d.error for d in known))
    said = f"moves it by {moved:.4g} (Frobenius norm)" if moved else "has no effect either"
    return f"nothing changed from base to tuned, and the adapter {said}"


def _fate(pair: _Compared, d: _Distance) -> Fate:
    if pair.brings:
        said = f"relative error {d.relative:.4g}" if d.known else "not a float, and different"
        return Fate(pair.name, Action.COMPARED, said)
    if pair.target is None:
        return Fate(pair.name, Action.LEFT_OUT, "only on the tuned side")
    action = Action.LEFT_OUT if d.change else Action.UNCHANGED
    return Fate(pair.name, action, "the adapter does not act on it")


def _size(pair: _Compared, base: Checkpoint, tuned: Checkpoint) -> int:
    """Working memory: of what is mapped the tensor's bytes, of what is decoded both sides'."""
    decoded = tuned.decoded_bytes(pair.own)
    decoded += base.decoded_bytes(pair.target.base_name) if pair.target is not None else 0
    return max(tuned.specs[pair.own].nbytes, decoded)


def _distance(pair: _Compared, adapter: Adapter, base: Checkpoint, tuned: Checkpoint) -> _Distance:
    specs = [tuned.specs[pair.own]]
    if pair.target is None:
        found = _alone(pair, adapter, tuned)
    else:
        found = _from_base(pair.target, base, tuned, pair.own)
        specs.append(_given(base).specs[pair.target.base_name])
        base.release(pair.target.base_name)
    tuned.release(pair.own)
    floats = all(spec.is_float for spec in specs)
    if floats and not math.isfinite(found.error + found.change):
        raise NonFiniteError(f"{pair.name}: base, tuned or adapter holds an inf or a NaN")
    return found


def _alone(pair: _Compared, adapter: Adapter, tuned: Checkpoint) -> _Distance:
    """A tensor that the base lacks: all of it changed, and all of it is left out, unless the
    adapter has it whole."""
    theirs, hashes = tuned.tensor(pair.own), ("", tuned.hash(pair.own))
    ours = adapter.tensor(adapter.whole[pair.own]) if pair.brings else None
    if ours is not None and ours.shape != theirs.shape:
        raise MismatchError(
            f"{pair.name}: is {list(ours.shape)} in the adapter, {list(theirs.shape)} in tuned"
        )
    if not tuned.specs[pair.own].is_float:
        unlike = 0.0 if ours is not None and ours.equal(theirs) else math.nan
        return _Distance(unlike, unlike, 0.0, hashes)
    return _Distance(_apart(theirs, ours), _apart(theirs, None), 0.0, hashes)


def _given(base: Checkpoint) -> Checkpoint:
    """The base before it was given the adapter's vocabulary."""
    return base.source if isinstance(base, FittedBase) else base


def _from_base(target: Target, base: Checkpoint, tuned: Checkpoint, own: str) -> _Distance:
    """A tensor of both, with what the adapter makes of the base's."""
    from lora_tools.linalg.merge import merged_whole

    given = _given(base)
    hashes = hashing.tensor_hash(given.raw(target.base_name)), hashing.tensor_hash(tuned.raw(own))
    old, new = given.specs[target.base_name], tuned.specs[own]
    if not (old.is_float and new.is_float):
        return _uncounted(target, base, tuned.tensor(own), hashes)
    if target.spec.shape == old.shape == new.shape:
        return _Distance(*_merged(target, base, tuned.tensor(own)), hashes)
    if old.shape[1:] == new.shape[1:] and target.spec.shape in (old.shape, new.shape):
        change, energy = measured((given, old), (tuned, new))
        if target.spec.shape == new.shape:
            matrix, wide = target.matrix(new.shape), base.tensor(target.base_name).double()
            ours = merged_whole(wide, build_effects(target, base.tensor), matrix)
            return _Distance(_apart(tuned.tensor(own), ours), change, energy, hashes)
        if not target.parts:
            return _Distance(change, change, energy, hashes)
    raise MismatchError(
        f"{target.spec.name}: base is {list(old.shape)}, tuned is {list(new.shape)}, and with the "
        f"adapter it is {list(target.spec.shape)}"
    )


def _uncounted(
    target: Target, base: Checkpoint, theirs: torch.Tensor, hashes: tuple[str, str]
) -> _Distance:
    """A tensor that is no float, such as a BatchNorm's counter."""
    from lora_tools.linalg.merge import merged_whole

    found = base.tensor(target.base_name)
    if target.parts:
        found = merged_whole(
            found, build_effects(target, base.tensor), target.matrix(target.spec.shape)
        )
    unlike = 0.0 if found.dtype == theirs.dtype and found.equal(theirs) else math.nan
    return _Distance(unlike, unlike, 0.0, hashes)


def _merged(target: Target, base: Checkpoint, theirs: torch.Tensor) -> tuple[float, float, float]:
    """‖merged − tuned‖², ‖tuned − base‖² and ‖base‖², in float64."""
    import torch

    from lora_tools.linalg.merge import TensorMerge
    from lora_tools.linalg.runs import RUN_ELEMENTS, row_runs

    W, T = as_matrix(base.tensor(target.base_name), target), as_matrix(theirs, target)

    def read(start: int, stop: int) -> torch.Tensor:
        return W[start:stop].to(torch.float64, copy=True)

    shape = (W.shape[0], W.shape[1])
    work = TensorMerge(build_effects(target, base.tensor), shape, read, torch.float64)
    error = change = energy = 0.0
    for start, stop in row_runs(*shape, RUN_ELEMENTS):
        wide, ours = T[start:stop].double(), read(start, stop)
        energy += float(ours.square().sum())
        change += float((wide - ours).square().sum())
        error += float((wide - work.forward(ours, start, stop)).square().sum())
    return error, change, energy


def _apart(one: torch.Tensor, other: torch.Tensor | None) -> float:
    """‖one − other‖²_F, or ‖one‖²_F, in float64, run by run."""
    from lora_tools.linalg.runs import RUN_ELEMENTS

    flat = one.reshape(-1)
    total = 0.0
    for start in range(0, flat.numel(), RUN_ELEMENTS):
        run = flat[start : start + RUN_ELEMENTS].double()
        if other is not None:
            run = run - other.reshape(-1)[start : start + RUN_ELEMENTS].double()
        total += float(run.square().sum())
    return total


def _ranks(target: Target) -> list[int]:
    """Of the factors that act on it."""
    sources = (p.source for p in target.parts if p.kind in ("lora", "dora"))
    return [source.r for source in sources if isinstance(source, LoraModule)]


def _result(target: Target, d: _Distance) -> ModuleResult:
    [layout, *_] = [p.layout.name for p in target.parts if p.layout is not None]
    return ModuleResult(
        module=split_tensor(target.spec.name)[0],
        layout=layout,
        shape=target.spec.shape,
        rank=max(_ranks(target)),
        relative_error=d.relative,
        energy=1 - Total(d.change, d.error).missing_share,
        gain_bound=math.nan,
        delta_norm=math.sqrt(d.change),
        relative_change=math.sqrt(d.change / d.base) if d.base else math.inf,
        method="difference",
    )


def _one_sided(settled: Sequence[Fate]) -> list[str]:
    """A note on tensors that no figure covers."""
    names = [fate.tensor for fate in settled if fate.action == Action.ONLY_IN_BASE]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [f"only in the base, and not in the figures: {names[0]}{more}"]


def _digests(
    both: Sequence[tuple[_Compared, _Distance]], base: Checkpoint, tuned: Checkpoint
) -> tuple[str, str]:
    ours = {p.target.base_name: d.hashes[0] for p, d in both if p.target}
    return base.digest(ours), tuned.digest({p.own: d.hashes[1] for p, d in both})
