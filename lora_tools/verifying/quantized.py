"""Is a four-bit checkpoint what quantizing a plain one, or base + adapter, gives? Tensor by tensor,
by quantizing again into a writer that compares; and where it is not, how far off it is."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lora_tools.figures import Total
from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.names import align
from lora_tools.formats.quantized.bitsandbytes import QuantizedTensor, config_faults
from lora_tools.merging.plan import MergePlan, adapter_digest, plan_merge
from lora_tools.merging.targets import Target
from lora_tools.quantizing.pack import pack, totals_of
from lora_tools.quantizing.plan import Item, QuantizePlan
from lora_tools.quantizing.tensor import QuantizeItem, merged_for
from lora_tools.records import Action, Fate, Input, ProgressCallback, TensorResult
from lora_tools.sources.dequantized import Dequantized, FourBits
from lora_tools.sources.schemes import four_bit_scales
from lora_tools.sources.weighted import Weighted
from lora_tools.totals import VerifyTotals
from lora_tools.verifying.findings import FINE, NEAR, Findings, times
from lora_tools.verifying.merged import check_tensor, left_over, tied_astray

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.compare import Coded

_LITTLE_MORE = 1.2  # quantizing other numbers of the like costs as much, to a fifth
_PLAIN, _SEARCHED = "byte for byte", "byte for byte, with --scale-search"


@dataclasses.dataclass(frozen=True)
class _Checked:
    """One tensor of the plain checkpoint.

    Attributes:
        hashes: of the tensors that store it, by name.
        result, coded: of a quantized one; ``coded`` where it is not byte for byte as expected.
    """

    item: Item
    fate: Fate
    source_hash: str
    hashes: dict[str, str]
    result: TensorResult | None = None
    coded: Coded | None = None


class _Stored:
    """Takes a tensor's bytes as a writer does, and compares them with those that are stored."""

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored
        self.differing: set[str] = set()

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Some bytes of a tensor."""
        there = self._stored.raw(name)[offset : offset + data.nbytes]
        if there != data.cast("B"):
            self.differing.add(name)
        self._stored.release(name, offset, offset + data.nbytes)

    def write_last(self, name: str, data: bytes) -> None:
        """The whole of a tensor."""
        if bytes(self._stored.raw(name)) != data:
            self.differing.add(name)


def verify_nf4(
    view: FourBits,
    source: Checkpoint,
    weighted: Sequence[Weighted],
    max_error: float | None,
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
    tasks = [_CheckItem(_item(target, view), max_error) for target in targets]
    checked = list(threads.run(tasks, (view, source), None, jobs=jobs, progress=progress))
    fates = [c.fate for c in checked] + left_over(view, targets) + tied_astray(view, plan)
    if view.stored.config:
        faults = config_faults(view.stored.config, view.stored.specs, view.quantized)
        fates += [Fate("config.json", Action.DIFFERENT, said) for said in faults]
    totals = _totals(view, checked, plan)
    wrong = [fate for fate in fates if fate.action not in FINE]
    name = "base + adapter" if weighted else "the checkpoint"
    offence = _diagnosis(checked, wrong, totals, name) if wrong else ""
    verdict = f"not {name} in four bits" if wrong else _verdict(checked, name, max_error)
    notes = [*plan.notes, *([f"its names: {sentence}"] if sentence else [])]
    inputs = _inputs(checked, view, source, weighted)
    notes += _provenance(view, inputs, weighted)
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
    """The target under the name that the four-bit checkpoint has for it."""
    spec = dataclasses.replace(target.spec, name=own) if own else target.spec
    return dataclasses.replace(target, spec=spec)


def _item(target: Target, view: FourBits) -> Item:
    """The tensor as the four-bit checkpoint has it: its scheme, dtype and orientation."""
    spec = view.specs.get(target.spec.name, target.spec)
    packed = view.quantized.get(spec.name)
    return Item(target, spec, packed, packed is not None and packed.transposed, "")


@dataclasses.dataclass(frozen=True)
class _CheckItem:
    """A task: compare what is stored of one tensor with what quantizing the source's gives."""

    item: Item
    max_error: float | None

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        return (12 if self.item.packed else 4) * self.item.spec.numel

    def run(self, sources: tuple[FourBits, Checkpoint], _: None, buffers: Buffers) -> _Checked:
        """What it comes to."""
        return _Comparison(self.item, self.max_error, *sources, buffers).checked()


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """One tensor of ``view`` with that of ``source``."""

    item: Item
    max_error: float | None
    view: FourBits
    source: Checkpoint
    buffers: Buffers

    def checked(self) -> _Checked:
        item, target, packed = self.item, self.item.target, self.item.packed
        hashes = self._hashes()
        if packed is None:
            plain = check_tensor(target, self.view, self.source)
            return _Checked(item, plain.fate, plain.hashes[0], hashes)
        if item.spec.shape != target.spec.shape or not target.spec.is_float:
            why = f"is of {item.spec}, and should be of {target.spec}"
            return self._said(Fate(item.name, Action.DIFFERENT, why), hashes)
        if self._is_untouched(packed):
            return self._said(Fate(item.name, Action.COPIED, "its codes and scales"), hashes)
        return self._quantized(packed, hashes)

    def _hashes(self) -> dict[str, str]:
        stored = self.view.stored
        packed = self.item.packed
        specs = [self.item.spec] if packed is None else list(packed.specs.values())
        hashes = {}
        for name in (spec.name for spec in specs if spec.name in stored.specs):
            hashes[name] = hashing.tensor_hash(stored.raw(name))
            stored.release(name)
        return hashes

    def _said(self, fate: Fate, hashes: dict[str, str]) -> _Checked:
        source_hash = hashing.tensor_hash(self.source.raw(self.item.target.base_name))
        return _Checked(self.item, fate, source_hash, hashes)

    def _is_untouched(self, packed: QuantizedTensor) -> bool:
        """Of a four-bit base: codes that no adapter acts on stay as they are."""
        if not isinstance(self.source, Dequantized) or self.item.target.parts:
            return False
        theirs = self.source.quantized.get(self.item.target.base_name)
        mine, other = self.view.stored, self.source.stored
        return (
            theirs is not None
            and theirs.state == packed.state
            and all(
                other.raw(theirs.specs[end].name) == mine.raw(packed.specs[end].name)
                for end in packed.specs
            )
        )

    def _quantized(self, packed: QuantizedTensor, hashes: dict[str, str]) -> _Checked:
        """Only scales that were searched for can be negative: then that is tried first."""
        item, name = self.item, self.item.name
        bits = 8 * packed.nbytes / item.spec.numel
        searched_first = _has_negative_scales(packed, self.view)
        tried: list[tuple[set[str], Coded]] = []
        for searched in sorted((False, True), key=lambda s: s != searched_first):
            stored = _Stored(self.view.stored)
            again = dataclasses.replace(item, searched=searched)
            done = QuantizeItem(again).run(self.source, stored, self.buffers)
            if not stored.differing:
                assert done.result is not None
                fate = Fate(name, Action.SAME, _SEARCHED if searched else _PLAIN)
                result = dataclasses.replace(done.result, bits_per_parameter=bits)
                return _Checked(item, fate, done.base_hash, hashes, result)
            coded = self._measure(again, packed)
            tried.append((stored.differing, coded))
            if not coded.off:
                break
        differing, coded = min(tried, key=lambda each: each[1].off)
        error, norm = coded.relative_error, math.sqrt(coded.energy)
        result = TensorResult(name, item.spec.shape, bits, error, norm)
        fate = _judge(item, packed, differing, coded, self.max_error)
        return _Checked(item, fate, done.base_hash, hashes, result, coded)

    def _measure(self, item: Item, packed: QuantizedTensor) -> Coded:
        """The numbers read back, against those that should have been quantized, and what quantizing
        makes of those."""
        import torch

        from lora_tools.linalg import nf4
        from lora_tools.linalg.compare import Coded

        target, dtype = item.target, torch_dtype(item.spec.dtype)

        def flat(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.T if item.transposed else tensor).reshape(-1)

        with (
            merged_for(item, self.source, self.buffers) as (x, _),
            self.buffers.lend((item.spec.numel,), torch.float32) as back,
        ):
            wanted, stored = x.reshape(-1), flat(self.view.tensor(item.name))
            base = flat(self.source.tensor(target.base_name)) if target.parts else None
            pack(item, wanted, None, self.buffers, back=back)
            coded = Coded()
            for start, stop in nf4.runs(item.spec.numel):
                coded.add(
                    wanted[start:stop].float(),
                    stored[start:stop].to(dtype).float(),
                    back[start:stop].to(dtype).float(),
                    packed.state.blocksize,
                    base[start:stop].float() if base is not None else None,
                )
        return coded


def _has_negative_scales(packed: QuantizedTensor, view: FourBits) -> bool:
    parts = {end: view.stored.tensor(spec.name) for end, spec in packed.specs.items()}
    return bool((four_bit_scales(packed, parts) < 0).any())


def _judge(
    item: Item, packed: QuantizedTensor, differing: set[str], coded: Coded, max_error: float | None
) -> Fate:
    errors = f"relative error {coded.relative_error:.4g}, {coded.own_error:.4g} from quantizing"
    if max_error is not None and coded.relative_error <= max_error:
        return Fate(item.name, Action.ROUNDED, errors)
    if not coded.off and max_error is None:
        why = "not byte for byte, and no number further off than quantizing takes it"
        return Fate(item.name, Action.ROUNDED, f"{why}; {errors}")
    if _is_scaled(coded):
        return Fate(
            item.name, Action.DIFFERENT, f"the adapter applied {times(coded.coefficient)}; {errors}"
        )
    ends = ", ".join(
        sorted(end or "codes" for end, spec in packed.specs.items() if spec.name in differing)
    )
    return Fate(
        item.name,
        Action.DIFFERENT,
        f"{coded.off:,} of {coded.numel:,} numbers are further off "
        f"than quantizing takes them; {errors} (differ: {ends})",
    )


def _is_scaled(coded: Coded) -> bool:
    """Whether it is what quantizing makes of W₀ + c·Δ, for a c that is not 1: then that leaves
    little more than the error of quantizing that."""
    explained = coded.unexplained <= (_LITTLE_MORE * coded.own_error) ** 2 * coded.held
    return bool(coded.change) and explained and abs(coded.coefficient - 1) > NEAR


def _is_exact(checked: _Checked) -> bool:
    return checked.item.packed is not None and checked.fate.action in (Action.SAME, Action.COPIED)


def _own_error(checked: _Checked) -> float:
    """‖P − W‖² of what quantizing makes of it."""
    assert checked.result is not None
    if checked.coded is not None:
        return checked.coded.own
    return (checked.result.relative_error * checked.result.norm) ** 2


def _totals(view: FourBits, checked: Sequence[_Checked], merge: MergePlan) -> VerifyTotals:
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
        "bit_for_bit": sum(_is_exact(c) for c in checked),
    }


def _verdict(checked: Sequence[_Checked], name: str, max_error: float | None) -> str:
    quantized = [c for c in checked if c.item.packed is not None]
    scheme = ", ".join(
        dict.fromkeys(c.item.packed.state.scheme for c in quantized if c.item.packed is not None)
    )
    inexact = [c for c in quantized if not _is_exact(c)]
    if not inexact:
        how = {c.fate.reason for c in quantized}
        ways = "byte for byte as quantize writes it"
        if _SEARCHED in how:
            ways += " with --scale-search" + (" (and some without)" if _PLAIN in how else "")
        return f"{name} in four bits ({scheme}), {ways}"
    if max_error is not None:
        return f"{name} in four bits ({scheme}), no error above {max_error:g}"
    return (
        f"{name} in four bits ({scheme}), to rounding: {len(quantized) - len(inexact)} of "
        f"{len(quantized)} weights byte for byte as quantize writes them"
    )


def _diagnosis(
    checked: Sequence[_Checked], wrong: Sequence[Fate], totals: VerifyTotals, name: str
) -> str:
    """One sentence: what is wrong of all, and the worst offender."""
    counts = Counter(fate.action for fate in wrong)
    many = ", ".join(f"{n} {action}" for action, n in counts.most_common())
    bad = {fate.tensor for fate in wrong}
    off = [c for c in checked if c.coded is not None and c.fate.tensor in bad]
    said = f"not {name} in four bits ({many})"
    if not off:
        return f"{said}: {wrong[0].tensor}: {wrong[0].reason}"
    worst = max(off, key=lambda c: _excess(c.coded)).fate
    every = len(off) == sum(c.item.packed is not None for c in checked)
    acted = [c for c in checked if c.item.packed is not None and c.item.target.parts]
    whole = functools.reduce(operator.add, (c.coded for c in off if c.coded is not None))
    what = "some weights are not what quantizing makes of them"
    if acted and all(
        c.item.name in bad and c.coded is not None and _is_scaled(c.coded) for c in acted
    ):
        what = f"the adapter is applied {times(whole.coefficient)}"
    elif every and (
        counts[Action.CHANGED] or totals["quantization_error"] > 1.5 * totals["expected_error"]
    ):
        what = "another checkpoint, or another adapter merged in or left out"
    elif every:
        what = (
            f"quantized otherwise: relative error {totals['quantization_error']:.4g} in all, "
            f"{totals['expected_error']:.4g} from quantizing; --max-error X allows one of X"
        )
    return f"{said}: {what}; worst is {worst.tensor}: {worst.reason}"


def _excess(coded: Coded | None) -> float:
    """Of a tensor with the worst share of numbers that are off."""
    return coded.off / coded.numel if coded is not None else 0.0


def _inputs(
    checked: Sequence[_Checked], view: FourBits, source: Checkpoint, weighted: Sequence[Weighted]
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


def _provenance(view: FourBits, inputs: Sequence[Input], weighted: Sequence[Weighted]) -> list[str]:
    """What its metadata says it was made of, where that is something else."""
    said = view.stored.files[0].metadata
    notes: list[str] = []
    if inputs[0].digest == inputs[1].digest:  # it is compared with itself
        return notes
    if said.get("base_digest", inputs[1].digest) != inputs[1].digest:
        notes.append(f"its metadata names another checkpoint: {said['base_digest']}")
    made_with = len(said.get("adapter_digests", "").split())
    if "base_digest" in said and made_with != len(weighted):
        notes.append(f"its metadata says that {made_with} adapters were merged")
    return notes
