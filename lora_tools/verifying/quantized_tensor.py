"""One tensor of a quantized checkpoint against what quantizing the source's gives: byte for byte,
or else how far off it is."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from lora_tools.formats import digest as hashing
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.dtypes import torch_dtype
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.merging.in_memory import changes
from lora_tools.merging.tensor import MergedRuns
from lora_tools.quantizing.pack import into, pack, way_of
from lora_tools.quantizing.plan import Item, is_stored_alike
from lora_tools.quantizing.tensor import QuantizeItem, merged_for, with_scale
from lora_tools.records import Action, Fate, TensorResult
from lora_tools.sources.dequantized import Dequantized, stored_parts
from lora_tools.verifying.findings import NEAR, applied
from lora_tools.verifying.merged import check_tensor

if TYPE_CHECKING:
    import torch

    from lora_tools.engine.buffers import Buffers
    from lora_tools.linalg.compare import Coded

_LITTLE_MORE = 1.2  # quantizing other numbers of the like costs as much, to a fifth
PLAIN, SEARCHED = "byte for byte", "byte for byte, with --scale-search"


@dataclasses.dataclass(frozen=True)
class Checked:
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

    @property
    def is_exact(self) -> bool:
        """Whether it is a quantized tensor that is stored byte for byte as expected."""
        return self.item.packed is not None and self.fate.action in (Action.SAME, Action.COPIED)


class _Stored:
    """Takes a tensor's bytes as a writer does, and compares them with those that are stored."""

    def __init__(self, stored: Checkpoint) -> None:
        self._stored = stored
        self.written: set[str] = set()
        self.differing: set[str] = set()

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Some bytes of a tensor."""
        self.written.add(name)
        there = self._stored.raw(name)[offset : offset + data.nbytes]
        if there != data.cast("B"):
            self.differing.add(name)
        self._stored.release(name, offset, offset + data.nbytes)

    def write_last(self, name: str, data: bytes) -> None:
        """The whole of a tensor."""
        self.written.add(name)
        if bytes(self._stored.raw(name)) != data:
            self.differing.add(name)


@dataclasses.dataclass(frozen=True)
class CheckItem:
    """A task: compare what is stored of one tensor with what quantizing the source's gives."""

    item: Item
    max_error: float | None

    @property
    def label(self) -> str:
        return self.item.name

    @property
    def nbytes(self) -> int:
        return (12 if self.item.packed else 4) * self.item.spec.numel

    def run(
        self, sources: tuple[Dequantized[Any], Checkpoint], _: None, buffers: Buffers
    ) -> Checked:
        """What it comes to."""
        return _Comparison(self.item, self.max_error, *sources, buffers).checked()


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """One tensor of ``view`` with that of ``source``."""

    item: Item
    max_error: float | None
    view: Dequantized[Any]
    source: Checkpoint
    buffers: Buffers

    def checked(self) -> Checked:
        item, target, packed = self.item, self.item.target, self.item.packed
        hashes = self._hashes()
        if packed is None:
            plain = check_tensor(target, self.view, self.source)
            return Checked(item, plain.fate, plain.hashes[0], hashes)
        if item.spec.shape != target.spec.shape or not target.spec.is_float:
            why = f"is {item.spec}, but should be {target.spec}"
            return self._said(Fate(item.name, Action.DIFFERENT, why), hashes)
        if self._is_copied(packed):
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

    def _said(self, fate: Fate, hashes: dict[str, str]) -> Checked:
        source_hash = hashing.tensor_hash(self.source.raw(self.item.target.base_name))
        return Checked(self.item, fate, source_hash, hashes)

    def _is_copied(self, packed: PackedWeight) -> bool:
        """Of a base in the same scheme: codes that no adapter changes stay as they are."""
        theirs, target = self._theirs(), self.item.target
        return (
            theirs is not None
            and _how(theirs) == _how(packed)
            and all(self._is_the_same(part, theirs) for part in packed.specs)
            and not (target.parts and changes(MergedRuns(target, self.source, target.spec)))
        )

    def _theirs(self) -> PackedWeight | None:
        """What is stored of the source's tensor, where it is in the same scheme."""
        source = self.source
        if not isinstance(source, Dequantized) or source.scheme != self.view.scheme:
            return None
        found: PackedWeight | None = source.quantized.get(self.item.target.base_name)
        return found

    def _is_the_same(self, part: str, theirs: PackedWeight) -> bool:
        assert self.item.packed is not None
        mine, other = self.view.stored, self.source.stored
        return bool(
            other.raw(theirs.specs[part].name) == mine.raw(self.item.packed.specs[part].name)
        )

    def _carried(self, packed: PackedWeight, stored: _Stored) -> set[str]:
        """What quantizing does not make, and is not the source's either."""
        theirs = self._theirs()
        return {
            spec.name
            for part, spec in packed.specs.items()
            if spec.name not in stored.written
            and (theirs is None or part not in theirs.specs or not self._is_the_same(part, theirs))
        }

    def _quantized(self, packed: PackedWeight, hashes: dict[str, str]) -> Checked:
        """In each way that it may have been written."""
        item, name = self.item, self.item.name
        way = way_of(self.view.scheme)
        assert way is not None
        bits = 8 * sum(spec.nbytes for spec in packed.specs.values()) / item.spec.numel
        tried: list[tuple[set[str], Coded]] = []
        parts = self.view.parts(name)
        item = with_scale(item, self.view.scheme.shared(packed, parts))
        theirs, ways = self._theirs(), way.ways(item, parts)
        if theirs is not None and is_stored_alike(packed, theirs):  # of `merge --requantize`
            before = stored_parts(self.source.stored, theirs)
            ways = [*(dataclasses.replace(each, before=before) for each in ways), *ways]
        for again in ways:
            stored = _Stored(self.view.stored)
            done = QuantizeItem(again).run(self.source, stored, self.buffers)
            differing = stored.differing | self._carried(packed, stored)
            if not differing:
                assert done.result is not None
                fate = Fate(name, Action.SAME, SEARCHED if again.searched else PLAIN)
                result = dataclasses.replace(done.result, bits_per_parameter=bits)
                return Checked(item, fate, done.base_hash, hashes, result)
            coded = self._measure(again, way.block(packed))
            tried.append((differing, coded))
            if not coded.off:
                break
        differing, coded = min(tried, key=lambda each: each[1].off)
        error, norm = coded.relative_error, math.sqrt(coded.energy)
        result = TensorResult(name, item.spec.shape, bits, error, norm)
        fate = _judge(item, packed, differing, coded, self.max_error)
        return Checked(item, fate, done.base_hash, hashes, result, coded)

    def _measure(self, item: Item, block: int) -> Coded:
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
            pack(item, wanted, None, self.buffers, read=into(back))
            coded = Coded()
            for start, stop in nf4.runs(item.spec.numel):
                coded.add(
                    wanted[start:stop].float(),
                    stored[start:stop].to(dtype).float(),
                    back[start:stop].to(dtype).float(),
                    block,
                    base[start:stop].float() if base is not None else None,
                )
        return coded


def _how(packed: PackedWeight) -> dict[str, object]:
    """What a record says of a weight besides its names: dtypes, shapes, settings."""
    names = [field.name for field in dataclasses.fields(packed)]  # type: ignore[arg-type]  # all are
    fields = {name: getattr(packed, name) for name in names}
    specs = {part: (spec.dtype, spec.shape) for part, spec in packed.specs.items()}
    plain = packed.plain
    return {**fields, "name": "", "specs": specs, "plain": (plain.dtype, plain.shape)}


def _judge(
    item: Item, packed: PackedWeight, differing: set[str], coded: Coded, max_error: float | None
) -> Fate:
    errors = (
        f"relative error {coded.relative_error:.4g}, {coded.own_error:.4g} when quantized again"
    )
    if max_error is not None and coded.relative_error <= max_error:
        return Fate(item.name, Action.ROUNDED, errors)
    if not coded.off and max_error is None:
        why = "other bytes, but no number differs by more than quantizing explains"
        return Fate(item.name, Action.ROUNDED, f"{why}; {errors}")
    if is_scaled(coded):
        return Fate(
            item.name, Action.DIFFERENT, f"the adapter is {applied(coded.coefficient)}; {errors}"
        )
    ends = ", ".join(
        sorted(end or "codes" for end, spec in packed.specs.items() if spec.name in differing)
    )
    return Fate(
        item.name,
        Action.DIFFERENT,
        f"{coded.off:,} of {coded.numel:,} numbers differ by more "
        f"than quantizing explains; {errors} (differ: {ends})",
    )


def is_scaled(coded: Coded) -> bool:
    """Whether it is what quantizing makes of W₀ + c·Δ, for a c that is not 1: then that leaves
    little more than the error of quantizing that."""
    explained = coded.unexplained <= (_LITTLE_MORE * coded.own_error) ** 2 * coded.held
    return bool(coded.change) and explained and abs(coded.coefficient - 1) > NEAR
