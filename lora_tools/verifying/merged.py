"""Does a checkpoint hold base + adapter? Tensor by tensor, with a diagnosis where it does not."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.weights import untied
from lora_tools.merging.plan import MergePlan, adapter_digest, build_effects, plan_merge
from lora_tools.merging.targets import Target
from lora_tools.merging.tensor import MergedRuns, as_matrix
from lora_tools.records import Action, Fate, Input, ProgressCallback
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import AgreementTotals
from lora_tools.verifying.findings import FINE, NEAR, Findings, applied
from lora_tools.verifying.modules import compare_modules

if TYPE_CHECKING:
    from lora_tools.linalg.compare import Match


@dataclasses.dataclass(frozen=True)
class Checked:
    """One tensor compared; ``hashes`` are those of the base's and of the one compared with it."""

    target: Target
    fate: Fate
    hashes: tuple[str, str]
    match: Match | None = None


def verify_merged(
    merged: Checkpoint,
    base: Checkpoint,
    weighted: Sequence[Weighted],
    allow_pickle: bool,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Findings:
    """Compare every tensor of ``merged`` with what the merge should have made of it."""
    from lora_tools.engine import threads
    from lora_tools.engine.tasks import Call

    plan = plan_merge(base, weighted)
    targets = (*plan.targets, *plan.untied)
    sizes = [max(t.spec.nbytes, base.decoded_bytes(t.base_name)) for t in targets]
    tasks = [
        Call(check_tensor, (t,), t.spec.name, size) for t, size in zip(targets, sizes, strict=True)
    ]
    checked = list(threads.run(tasks, (merged, base), None, jobs=jobs, progress=progress))
    fates = [c.fate for c in checked]
    fates += left_over(merged, targets)
    fates += tied_astray(merged, plan)
    fates += compare_modules(merged, base, allow_pickle)
    base_hashes = {c.target.base_name: c.hashes[0] for c in checked}
    merged_hashes = {c.target.spec.name: c.hashes[1] for c in checked if c.hashes[1]}
    for name in merged.specs.keys() - merged_hashes.keys():
        merged_hashes[name] = hashing.tensor_hash(merged.raw(name))
    inputs = (
        Input("merged", "", hashing.digest(merged.specs.values(), merged_hashes)),
        Input("base", "", base.digest(base_hashes)),
        *(Input("adapter", "", adapter_digest(w.adapter)) for w in weighted),
    )
    totals = merge_totals(checked)
    wrong = [fate for fate in fates if fate.action not in FINE]
    name = "base + adapter"
    offence = diagnosis(checked, wrong, f"not {name}") if wrong else ""
    return Findings(
        inputs,
        tuple(fates),
        verdict_of(totals, name) if not wrong else f"not {name}",
        offence,
        {**totals},
        (*plan.notes, *merged.notes),
    )


def merge_totals(checked: Sequence[Checked]) -> AgreementTotals:
    """Figures over the tensors that an adapter acts on, or that are in another dtype."""
    matches = [c.match for c in checked if c.match is not None and c.fate.action != Action.CHANGED]
    return {
        "tensors_acted_on": len(matches),
        "bit_for_bit_once": sum(m.once == m.numel for m in matches),
        "bit_for_bit_twice": sum(m.twice == m.numel for m in matches),
        "share_once": sum(m.once for m in matches) / max(sum(m.numel for m in matches), 1),
        "share_twice": sum(m.twice for m in matches) / max(sum(m.numel for m in matches), 1),
    }


def check_tensor(target: Target, merged: Checkpoint, base: Checkpoint) -> Checked:
    """Compare one tensor of ``merged`` with what the merge makes of the base's."""
    try:
        return _compared(target, merged, base)
    finally:
        base.release(target.base_name)
        if target.spec.name in merged.specs:
            merged.release(target.spec.name)


def _compared(target: Target, merged: Checkpoint, base: Checkpoint) -> Checked:
    name, stored = target.spec.name, merged.specs.get(target.spec.name)
    base_hash = hashing.tensor_hash(base.raw(target.base_name))
    if stored is None:
        return Checked(target, Fate(name, Action.MISSING, "it is in the base"), (base_hash, ""))
    hashes = base_hash, hashing.tensor_hash(merged.raw(name))
    if stored.shape != target.spec.shape:
        why = f"is {list(stored.shape)}, but should be {list(target.spec.shape)}"
        return Checked(target, Fate(name, Action.DIFFERENT, why), hashes)
    if not target.parts and stored.dtype == base.specs[target.base_name].dtype:
        if hashes[0] == hashes[1]:
            return Checked(target, Fate(name, Action.COPIED), hashes)
        why = "no adapter acts on it, but it differs from the base"
        match = _match(target, merged, base) if stored.is_float else None
        if match is not None:
            why += f" in {match.outside:,} of its {match.numel:,} numbers"
        return Checked(target, Fate(name, Action.CHANGED, why), hashes, match)
    if not (stored.is_float and target.spec.is_float):
        return Checked(target, _count(target, merged, base), hashes)
    match = _match(target, merged, base)
    return Checked(target, _judge(name, match), hashes, match)


def _match(target: Target, merged: Checkpoint, base: Checkpoint) -> Match:
    """Formed as ``merge`` forms it, run by run."""
    from lora_tools.linalg.compare import Match
    from lora_tools.linalg.merge import others_dtype

    S = as_matrix(merged.tensor(target.spec.name), target)
    runs, match = MergedRuns(target, base, target.spec), Match()
    for run in runs:
        rows = slice(run.start, run.stop)
        slack = runs.work.slack(run.exact, run.start, run.stop, others_dtype(S.dtype))
        match.add(S[rows], runs.read(run.start, run.stop), run.exact, slack)
    return match


def _count(target: Target, merged: Checkpoint, base: Checkpoint) -> Fate:
    """Of a tensor of integers, such as a BatchNorm's counter."""
    from lora_tools.linalg.merge import merged_whole

    name = target.spec.name
    before, found = base.tensor(target.base_name), merged.tensor(name)
    if found.dtype != before.dtype:
        return Fate(name, Action.DIFFERENT, f"is stored as {merged.specs[name].dtype}")
    matrix = target.matrix(target.spec.shape)
    if merged_whole(before, build_effects(target, base.tensor), matrix).equal(found):
        return Fate(name, Action.SAME, "the adapter's")
    return Fate(name, Action.DIFFERENT, "differs from the adapter")


def _judge(name: str, match: Match) -> Fate:
    if match.once == match.numel:
        return Fate(name, Action.SAME, "bit for bit, rounded once")
    if match.twice == match.numel:
        return Fate(name, Action.SAME, "bit for bit, rounded twice as PEFT's safe_merge does")
    if not match.outside:
        share = max(match.once, match.twice) / match.numel
        return Fate(
            name, Action.ROUNDED, f"{share:.2%} of it bit for bit, the rest within rounding"
        )
    return Fate(
        name,
        Action.DIFFERENT,
        _reason(match) + f"; {match.outside:,} of {match.numel:,} "
        "elements differ by more than rounding",
    )


def _reason(match: Match) -> str:
    if not match.moved:
        return "the same as in the base, without the adapter"
    if match.unexplained > NEAR:
        share = f"{match.unexplained:.0%} of the change is not from the adapter"
        return f"another base or adapter: {share}"
    return f"the adapter is {applied(match.coefficient)}"


def left_over(merged: Checkpoint, targets: Sequence[Target]) -> list[Fate]:
    """Tensors that the base lacks."""
    known = {target.spec.name for target in targets}
    return [
        Fate(name, Action.EXTRA, "it is not in the base")
        for name in merged.specs
        if name not in known
    ]


def tied_astray(merged: Checkpoint, plan: MergePlan) -> list[Fate]:
    """An output head that should be the embedding and is not, or the other way round."""
    if untied(merged.config) == merged.config:  # transformers then keeps apart what differs
        return []
    head, embedding = merged.weights.tied_pair
    if not head:
        return []
    if plan.unties:
        return [
            Fate(
                head,
                Action.TIED,
                "the adapter changes only one of the two, but config.json still ties it to "
                f"{embedding}: a program would drop one",
            )
        ]
    if head in merged.specs and bytes(merged.raw(head)) != bytes(merged.raw(embedding)):
        return [Fate(head, Action.TIED, f"differs from {embedding}, but config.json ties the two")]
    return []


def diagnosis(checked: Sequence[Checked], wrong: Sequence[Fate], said: str) -> str:
    """One sentence: what is wrong of all, and the worst offender."""
    from lora_tools.linalg.compare import Match

    counts = Counter(fate.action for fate in wrong)
    many = ", ".join(f"{n} {action}" for action, n in counts.most_common())
    kinds = {c.target.spec.name: {p.kind for p in c.target.parts} for c in checked}
    low_rank = {name for name, acting in kinds.items() if acting & {"lora", "dora"}}
    low_rank = low_rank or {name for name, acting in kinds.items() if acting}
    off = [(c.fate, c.match) for c in checked if c.match is not None and c.match.outside]
    if not off:
        return f"{said} ({many}): {wrong[0].tensor}: {wrong[0].reason}"
    worst, _ = max(off, key=lambda pair: pair[1].outside / pair[1].numel)
    acted = [match for fate, match in off if fate.action != Action.CHANGED]
    whole = functools.reduce(operator.add, acted, Match())
    one = max((abs(match.coefficient - whole.coefficient) for match in acted), default=math.inf)
    every = bool(low_rank) and low_rank <= {fate.tensor for fate, _ in off}
    if every and counts.get(Action.CHANGED):
        first = next(fate for fate in wrong if fate.action == Action.CHANGED)
        what = f"another base: {first.tensor} differs from the base, though no adapter acts on it"
    elif every and whole.unexplained > NEAR:
        what = "another base, or another adapter"
    elif every and one <= NEAR * max(abs(whole.coefficient), 1):
        what = f"the adapter is {applied(whole.coefficient)}"
    else:
        what = "some tensors differ from what the merge gives"
    return f"{said} ({many}): {what}; worst is {worst.tensor}: {worst.reason}"


def verdict_of(totals: AgreementTotals, name: str) -> str:
    """One sentence where nothing is wrong."""
    n = totals["tensors_acted_on"]
    if totals["bit_for_bit_once"] == n:
        return f"{name}, bit for bit, rounded once (as merge does)"
    if totals["bit_for_bit_twice"] == n:
        return f"{name}, bit for bit, rounded twice (PEFT's safe_merge)"
    near = "twice" if totals["share_twice"] > totals["share_once"] else "once"
    share = max(totals["share_twice"], totals["share_once"])
    return f"{name}, within rounding: {share:.4%} of the elements equal those rounded {near}"
