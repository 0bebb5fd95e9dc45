"""The plan of a quantization: which tensors are stored otherwise, which stay and why, in which
file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import CheckpointError, MismatchError, UsageError
from lora_tools.formats.activations import Activations
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.checkpoint_writer import Shard, lay_out_units
from lora_tools.formats.names import split_tensor
from lora_tools.formats.quantized.bitsandbytes import STATE, QuantizedTensor
from lora_tools.formats.quantized.forms import Form
from lora_tools.formats.quantized.loaded_in_four_bits import ADDED_HEADS, reason_to_keep
from lora_tools.formats.quantized.packed import ASIDE, PackedWeight
from lora_tools.formats.weights import Weight
from lora_tools.merging.plan import MergePlan
from lora_tools.merging.targets import Target
from lora_tools.records import DTYPE_BITS, Action, Fate, TensorSpec
from lora_tools.sources.four_bit_layers import (
    FourBitLayers,
    experts_by_name,
    four_bit_layers,
    is_surely_linear,
)
from lora_tools.sources.schemes import SCHEMES
from lora_tools.sources.schemes.row import Scheme
from lora_tools.sources.transformers_names import keeps_names

if TYPE_CHECKING:
    from lora_tools.linalg.error_feedback import Factor
    from lora_tools.sources.schemes.row import Parts

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Feeding:
    """Statistics of a module's inputs, by which its rounding errors are fed forward.

    Attributes:
        by: their factor, where it has been made.
    """

    activations: Activations
    module: str
    by: Factor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the plain checkpoint, ``spec``, and what becomes of it.

    Attributes:
        packed: its quantized form, or None where it stays.
        scheme: the row that it is in then.
        reason: why it stays.
        searched: its scales are searched for (``linalg.nf4_search``).
        joined: the tensors, itself among them, that it has a scale in common with.
        feeding: what its rounding errors are fed forward by (``linalg.error_feedback``).
        rounding: how it is rounded, where statistics of inputs were given, for the plan.
        before: what was stored of it, in the same form, of which scales are kept that still fit.
    """

    target: Target
    spec: TensorSpec
    packed: PackedWeight | None
    scheme: Scheme[Any] | None = None
    reason: str = ""
    searched: bool = False
    joined: tuple[tuple[Target, TensorSpec], ...] = ()
    feeding: Feeding | None = None
    rounding: str = ""
    before: Parts | None = None

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def transposed(self) -> bool:
        """Whether it is stored as (in, out) and quantized as (out, in)."""
        return isinstance(self.packed, QuantizedTensor) and self.packed.transposed

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is stored of it."""
        return (self.spec,) if self.packed is None else tuple(self.packed.specs.values())

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


def read_by(item: Item) -> tuple[Target, ...]:
    """The tensors that are read for it: of those with a common scale the first reads all."""
    others = [target for target, spec in item.joined if spec.name != item.name]
    is_first = bool(item.joined) and item.joined[0][1].name == item.name
    return (item.target, *others) if is_first else (item.target,)


@dataclasses.dataclass(frozen=True)
class QuantizePlan:
    """Every tensor of the output in file order; ``skip`` names linear layers that stay."""

    items: tuple[Item, ...]
    skip: tuple[str, ...]
    merge: MergePlan

    def fates(self) -> tuple[Fate, ...]:
        """The fate of every tensor, and of every adapter key that matched nothing."""
        fates = []
        for item, merged in zip(self.items, self.merge.fates(), strict=False):
            nbytes = item.nbytes
            if item.packed is not None:
                bits = 8 * nbytes / item.spec.numel
                reason = f"{item.packed.label}, {bits:.3f} bits per parameter{item.rounding}"
                action = Action.QUANTIZE
            else:
                bits = DTYPE_BITS[item.spec.dtype]
                reason, action = f"{item.reason}, {bits} bits per parameter", merged.action
            if merged.reason:
                reason += f"; {merged.reason}"
            fates.append(Fate(item.name, action, reason, nbytes))
        return (*fates, *self.merge.unmatched)

    def shards(self, source: Checkpoint, shard_size: int | None) -> list[Shard]:
        """Files for the output. What belongs to one weight shares a file; in each file wider
        dtypes come first, so that all is aligned, and the JSONs, whose sizes may shrink, last."""
        units: dict[str, tuple[TensorSpec, ...]] = {}
        for item in self.items:
            name = item.target.base_name
            units[name] = (*units.get(name, ()), *item.specs)
        return [
            dataclasses.replace(
                shard,
                specs=tuple(
                    sorted(shard.specs, key=lambda s: (STATE in s.name, -DTYPE_BITS[s.dtype]))
                ),
            )
            for shard in lay_out_units(source, units, shard_size)
        ]


def plan_quantize(
    base: Checkpoint,
    merge: MergePlan,
    specs: Mapping[str, TensorSpec],
    form: Form,
    chosen: Callable[[str], bool],
    head: bool,
    search: bool = False,
) -> QuantizePlan:
    """Choose what to quantize.

    Args:
        specs: the plain checkpoint's tensors by name, as they would be written.
        chosen: whether a module is wanted.
        head: quantize the output head as well, where it has weights of its own.
        search: for scales of less error.

    Raises:
        MismatchError: nothing is left to quantize.
        CheckpointError: no such model in that form would load.
        UsageError: a weight is float64, which no form has.
    """
    targets = (*merge.targets, *merge.untied)
    tied = bool(base.weights.head) and not merge.unties
    layers = four_bit_layers(merge.config or base.config, specs)
    if form.parts_experts:
        _refuse_parted(
            base, experts_by_name(base.config, specs) if layers is None else layers.parted
        )
    reasons: dict[str, str] = {}
    skip: set[str] = set()
    weights = [base.weights.of(specs[target.spec.name]) for target in targets]
    named = bool(base.config.get("architectures")) and not keeps_names(base.config, base.specs)
    for weight in weights:
        reason, linear = _reason(weight, base, layers, form, head and not tied, named)
        if not reason and not chosen(weight.module):
            reason = "left out by --include or --exclude"
        reasons[weight.spec.name] = reason
        if reason and linear:
            skip.update(map(form.entry, _modules(weight.spec.name, layers)))
    for weight in _all_experts_or_none(base, weights, reasons, form):
        skip.update(map(form.entry, _modules(weight.spec.name, layers)))
    _follow_the_loader(reasons, skip, layers, form)
    quantized = {m for name, why in reasons.items() if not why for m in _modules(name, layers)}
    absent = {split_tensor(base.weights.head)[0]} if tied else set()
    if layers is not None:
        absent |= layers.absent | (layers.kin if form.tells_all else set())
    for module in absent.union(ADDED_HEADS) - {""}:
        if not any(form.skips(name, {module}) for name in quantized):
            skip.add(module)
    items = tuple(
        _item(target, weight, reasons[weight.spec.name], form, search)
        for target, weight in zip(targets, weights, strict=True)
    )
    if not any(item.packed for item in items):
        loader = "" if layers is None else " that transformers' loader quantizes"
        why = _commonest(reasons, [w for w in weights if w.layout in ("linear", "conv1d")])
        raise MismatchError(f"{base.path}: has no linear layer to quantize{loader}{why}")
    return QuantizePlan(joined(items) if form.joins else items, tuple(sorted(skip)), merge)


def is_stored_alike(one: PackedWeight, other: PackedWeight) -> bool:
    """Whether two forms of a weight are of the same tensors, whatever numbers these hold."""

    def said(weight: PackedWeight) -> object:
        parts = {
            part: (spec.dtype, () if STATE in spec.name else spec.shape)
            for part, spec in weight.specs.items()
            if not part.startswith(ASIDE)
        }
        return weight.label, weight.plain.dtype, parts

    return said(one) == said(other)


def _commonest(reasons: Mapping[str, str], linears: Sequence[Weight]) -> str:
    """Why most linear layers stay, and one of them."""
    if not linears:
        return ""
    [(why, _)] = Counter(reasons[w.spec.name] for w in linears).most_common(1)
    first = next(w.spec.name for w in linears if reasons[w.spec.name] == why)
    stay = f"all {len(linears)} are left out, such as" if len(linears) > 1 else "one stays,"
    return f"; {stay} {first}: {why}"


def joined(items: Sequence[Item]) -> tuple[Item, ...]:
    """Those that may have a scale in common: layers of one module with as many inputs, whether a
    loader puts them into one or not, which depends on its own class of the model."""

    def place(item: Item) -> tuple[str, int]:
        return split_tensor(item.name)[0].rpartition(".")[0], item.spec.shape[-1]

    together: dict[tuple[str, int], list[tuple[Target, TensorSpec]]] = {}
    for item in items:
        if item.packed is not None:
            together.setdefault(place(item), []).append((item.target, item.spec))
    return tuple(
        item
        if item.packed is None
        else dataclasses.replace(item, joined=tuple(together[place(item)]))
        for item in items
    )


def _refuse_parted(base: Checkpoint, experts: Sequence[str]) -> None:
    if experts:
        raise CheckpointError(
            f"{base.path}: {experts[0]}: in a quantized checkpoint, transformers does not find "
            "these fused experts and would make them at random; keep this model plain"
        )


def _reason(
    weight: Weight,
    base: Checkpoint,
    layers: FourBitLayers | None,
    form: Form,
    head: bool,
    named: bool,
) -> tuple[str, bool]:
    """Why a weight stays ("" if it does not), and whether a loader must be told of it.

    Args:
        named: config.json names a class, and it may be one whose names do not tell its layers.
    """
    name = weight.spec.name
    reason, linear = reason_to_keep(weight, base.config, head)
    told = form.tells_all and (linear or ".experts." in name)
    if form.experts is not False and is_expert(weight, form):
        return form.unfit(weight.spec), told
    if form.only_fused:
        return reason or f"in such a model only experts can be in {form.name}", False
    if layers is None:
        if not reason and named and not is_surely_linear(name, base.config, base.specs):
            reason = "not known to be a linear layer"
    elif name not in layers.modules:
        return reason or "not in a layer that transformers quantizes", told
    else:
        linear = True
        reason = reason or layers.kept.get(name, "")
        if not reason and (weight.layout == "conv1d") != (name in layers.transposed):
            reason = "stored in another orientation than in its architecture"
    if not reason and weight.layout == "conv1d" and not form.turns:
        return f"a Conv1D, which programs do not load in {form.name}", False
    return reason or form.unfit(weight.spec), linear or told


def is_expert(weight: Weight, form: Form) -> bool:
    """Whether it is that of one expert by itself; of all experts, where the form is for those."""
    if form.only_fused:
        return weight.layout == "experts-transposed"
    return weight.layout == "linear" and _EXPERT.search(weight.module) is not None


def form_for(base: Checkpoint, form: Form) -> Form:
    """The form as loaders take it of this model, by its experts."""
    of_model = form.fused.get(str(base.config.get("model_type")))
    if of_model is not None:
        return of_model
    if form.singles is None:
        return form
    weights = (base.weights.of(spec) for spec in base.specs.values())
    return form.singles if any(is_expert(weight, form) for weight in weights) else form


def _all_experts_or_none(
    base: Checkpoint, weights: Sequence[Weight], reasons: dict[str, str], form: Form
) -> list[Weight]:
    """Experts that stay since others do, as transformers fuses those of a layer into one.

    Raises:
        CheckpointError: experts stay beside layers in this form, which no loader takes.
    """
    takes = form.experts is not False
    experts = [weight for weight in weights if takes and is_expert(weight, form)]
    staying = [weight for weight in experts if reasons[weight.spec.name]]
    if staying and form.experts is not True:
        name = staying[0].spec.name
        raise CheckpointError(
            f"{base.path}: {name} is not quantized ({reasons[name]}), and programs do not load "
            f"plain experts beside layers in {form.name}; use fp8-block or fp8-channel"
        )
    others = [weight for weight in experts if not reasons[weight.spec.name]] if staying else []
    for weight in others:
        reasons[weight.spec.name] = (
            "another expert is not quantized, and programs load all experts in one format"
        )
    return others


def _modules(name: str, layers: FourBitLayers | None) -> set[str]:
    """The names of a weight's layer: in the file, and in memory."""
    module = split_tensor(name)[0]
    return {module} if layers is None else {module, layers.modules.get(name, module)}


def _follow_the_loader(
    reasons: dict[str, str], skip: set[str], layers: FourBitLayers | None, form: Form
) -> None:
    """A loader takes a name in its list for every layer whose name ends or begins alike; those
    cannot be quantized either."""
    again = True
    while again:
        again = False
        for name, reason in reasons.items():
            modules = _modules(name, layers)
            if not reason and any(form.skips(module, skip) for module in modules):
                reasons[name] = "its name is too similar to that of a layer that is not quantized"
                skip.update(map(form.entry, modules))
                again = True


def _item(target: Target, weight: Weight, reason: str, form: Form, search: bool) -> Item:
    spec = weight.spec
    if reason:
        return Item(target, spec, None, reason=reason)
    if spec.dtype == "F64":
        raise UsageError(f"{spec.name}: float64 cannot be quantized; pass --dtype float32")
    packed = form.lay_out(spec, weight.layout == "conv1d")
    scheme = next(scheme for scheme in SCHEMES if scheme.name == form.scheme)
    return Item(target, spec, packed, scheme, searched=search)
