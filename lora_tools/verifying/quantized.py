"""Is a quantized checkpoint what quantizing a plain one, or base + adapter, gives? Tensor by
tensor, by quantizing again into a writer that compares; and where it is not, how far off it is."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import MismatchError
from lora_tools.figures import Total
from lora_tools.formats import digest as hashing
from lora_tools.formats.alignment import align
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.merging.plan import MergePlan, adapter_digest, plan_merge
from lora_tools.merging.targets import Target
from lora_tools.provenance import digest_like
from lora_tools.quantizing.pack import totals_of
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.records import Action, Fate, Input, ProgressCallback
from lora_tools.sources.dequantized import Dequantized
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import VerifyTotals
from lora_tools.verifying.findings import FINE, Findings, applied
from lora_tools.verifying.merged import left_over, tied_astray
from lora_tools.verifying.modules import compare_modules
from lora_tools.verifying.quantized_tensor import PLAIN, SEARCHED, Checked, CheckItem, is_scaled

View = Dequantized[Any]

if TYPE_CHECKING:
    from lora_tools.linalg.compare import Coded


def verify_quantized(
    view: View,
    source: Checkpoint,
    weighted: Sequence[Weighted],
    max_error: float | None,
    allow_pickle: bool,
    jobs: int | None,
    progress: ProgressCallback | None,
) -> Findings:
    """Compare every tensor with what ``quantize`` makes of ``source`` and the adapters.

    Args:
        max_error: take any codes whose relative error is no greater, instead of those only that
            are as near as quantizing gets.
    """
    from lora_tools.engine import threads

    mapping, sentence = align(list(view.specs), list(source.specs))
    theirs = {there: own for own, there in mapping.items()}
    plan = plan_merge(source, weighted)
    targets = [_named(t, theirs.get(t.spec.name)) for t in (*plan.targets, *plan.untied)]
    tasks = [CheckItem(_item(target, view), max_error) for target in targets]
    checked = list(threads.run(tasks, (view, source), None, jobs=jobs, progress=progress))
    fates = [c.fate for c in checked] + left_over(view, targets) + tied_astray(view, plan)
    fates += compare_modules(view, source, allow_pickle)
    if view.stored.config:
        faults = view.scheme.faults(view.stored.config, view.stored.specs, view.quantized)
        fates += [Fate("config.json", Action.DIFFERENT, said) for said in faults]
    totals = _totals(view, checked, plan)
    wrong = [fate for fate in fates if fate.action not in FINE]
    name = "base + adapter" if weighted else "the checkpoint"
    named = f"{name} in {view.scheme.title.partition(' (')[0]}"
    offence = _diagnosis(checked, wrong, totals, named) if wrong else ""
    verdict = f"not {named}" if wrong else _verdict(view, checked, named, max_error)
    notes = [*plan.notes, *view.notes, *([f"its names: {sentence}"] if sentence else [])]
    inputs = _inputs(checked, view, source, weighted)
    notes += _provenance(view, inputs, source, weighted)
    return Findings(
        inputs,
        tuple(fates),
        verdict,
        offence,
        totals,
        tuple(notes),
        tensors=tuple(c.result for c in checked if c.result is not None),
    )


def _named(target: Target, own: str | None) -> Target:
    """The target under the name that the quantized checkpoint has for it."""
    spec = dataclasses.replace(target.spec, name=own) if own else target.spec
    return dataclasses.replace(target, spec=spec)


def _item(target: Target, view: View) -> Item:
    """The tensor as the quantized checkpoint has it: its scheme, dtype and orientation."""
    spec = view.specs.get(target.spec.name, target.spec)
    packed = view.quantized.get(spec.name)
    return Item(target, spec, packed, view.scheme if packed is not None else None)


def _own_error(checked: Checked) -> float:
    """‖P − W‖² of what quantizing makes of it."""
    assert checked.result is not None
    if checked.coded is not None:
        return checked.coded.own
    return (checked.result.relative_error * checked.result.norm) ** 2


def _totals(view: View, checked: Sequence[Checked], merge: MergePlan) -> VerifyTotals:
    """Those of ``quantize``, of what is stored."""
    results = [c.result for c in checked if c.result is not None]
    items = tuple(c.item for c in checked if c.fate.action != Action.MISSING)
    nbytes = sum(file.path.stat().st_size for file in view.stored.files)
    own = Total.of((c.result.norm**2, _own_error(c)) for c in checked if c.result is not None)
    return {
        **(totals_of(QuantizePlan(items, (), merge), results, nbytes) if results else {}),
        "tensors_quantized": sum(item.packed is not None for item in items),
        "tensors_kept": sum(item.packed is None for item in items),
        "expected_error": own.relative_error,
        "bit_for_bit": sum(c.is_exact for c in checked),
    }


def _verdict(view: View, checked: Sequence[Checked], name: str, max_error: float | None) -> str:
    quantized = [c for c in checked if c.item.packed is not None]
    named = {c.item.name: c.item.packed for c in quantized}
    said = f"{name} ({', '.join(view.scheme.facts(named)['schemes'])})"
    inexact = [c for c in quantized if not c.is_exact]
    if not inexact:
        how = {c.fate.reason for c in quantized}
        ways = "byte for byte as quantize writes it"
        if SEARCHED in how:
            ways += " with --scale-search" + (" (and some without)" if PLAIN in how else "")
        return f"{said}, {ways}"
    if max_error is not None:
        return f"{said}, no error above {max_error:g}"
    return (
        f"{said}, to rounding: {len(quantized) - len(inexact)} of "
        f"{len(quantized)} weights byte for byte as quantize writes them"
    )


def _diagnosis(
    checked: Sequence[Checked], wrong: Sequence[Fate], totals: VerifyTotals, name: str
) -> str:
    """One sentence: what is wrong of all, and the worst offender."""
    counts = Counter(fate.action for fate in wrong)
    many = ", ".join(f"{n} {action}" for action, n in counts.most_common())
    bad = {fate.tensor for fate in wrong}
    off = [c for c in checked if c.coded is not None and c.fate.tensor in bad]
    said = f"not {name} ({many})"
    if not off:
        return f"{said}: {wrong[0].tensor}: {wrong[0].reason}"
    worst = max(off, key=lambda c: _excess(c.coded)).fate
    every = len(off) == sum(c.item.packed is not None for c in checked)
    acted = [c for c in checked if c.item.packed is not None and c.item.target.parts]
    whole = functools.reduce(operator.add, (c.coded for c in off if c.coded is not None))
    what = "some weights differ from what quantizing gives"
    if acted and all(
        c.item.name in bad and c.coded is not None and is_scaled(c.coded) for c in acted
    ):
        what = f"the adapter is {applied(whole.coefficient)}"
    elif every and (
        counts[Action.CHANGED] or totals["quantization_error"] > 1.5 * totals["expected_error"]
    ):
        what = "another checkpoint, or another adapter merged in or left out"
    elif every:
        what = (
            f"quantized differently: relative error {totals['quantization_error']:.4g} in all, "
            f"{totals['expected_error']:.4g} when quantized again; --max-error X allows an error "
            "of X"
        )
    return f"{said}: {what}; worst is {worst.tensor}: {worst.reason}"


def _excess(coded: Coded | None) -> float:
    """Of a tensor with the worst share of numbers that are off."""
    return coded.off / coded.numel if coded is not None else 0.0


def _inputs(
    checked: Sequence[Checked], view: View, source: Checkpoint, weighted: Sequence[Weighted]
) -> tuple[Input, ...]:
    stored = {name: h for c in checked for name, h in c.hashes.items()}
    for name in view.stored.specs.keys() - stored.keys():
        stored[name] = hashing.tensor_hash(view.stored.raw(name))
    hashes = {c.item.target.base_name: c.source_hash for c in checked}
    return (
        Input("checkpoint", "", hashing.digest(view.stored.specs.values(), stored)),
        Input("against", "", source.digest(hashes)),
        *(Input("adapter", "", adapter_digest(w.adapter)) for w in weighted),
    )


def _provenance(
    view: View, inputs: Sequence[Input], source: Checkpoint, weighted: Sequence[Weighted]
) -> list[str]:
    """What its metadata says it was made of, where that is something else."""
    said = view.stored.files[0].metadata
    notes: list[str] = []
    if inputs[0].digest == inputs[1].digest:  # it is compared with itself
        return notes
    recorded = said.get("base_digest", inputs[1].digest)
    try:
        if recorded != digest_like(recorded, inputs[1].digest, source):
            notes.append(f"its metadata names another checkpoint: {recorded}")
    except MismatchError as error:
        notes.append(f"its metadata cannot be compared with this checkpoint: {error}")
    made_with = len(said.get("adapter_digests", "").split())
    if "base_digest" in said and made_with != len(weighted):
        notes.append(f"its metadata says that {made_with} adapters were merged")
    return notes
