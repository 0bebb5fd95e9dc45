"""The plan of a merge: which adapter keys act on which tensor of the base. Shared by ``merge`` and
``unmerge``. Names and shapes decide; no tensor is read until an effect is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import AdapterError, MismatchError, UnsupportedAdapter
from lora_tools.formats import digest as hashing
from lora_tools.formats.adapters.changes import ChangedModule
from lora_tools.formats.adapters.components import ENCODERS, aligned, held, of_another
from lora_tools.formats.adapters.peft import Adapter, LoraModule, Multiplier, TokenRows
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import stores_transposed
from lora_tools.linalg.layouts import Layout, clip, of_form
from lora_tools.linalg.scaling import scaling
from lora_tools.merging import ia3
from lora_tools.merging.added_heads import note_on_no_head
from lora_tools.merging.changed import (
    Read,
    change_effects,
    may_lack,
    refuse_mixtures,
    stored_as,
    wanted_changes,
)
from lora_tools.merging.doubts import doubts
from lora_tools.merging.experts import as_base_holds, fit_share
from lora_tools.merging.fitted import FittedBase
from lora_tools.merging.names_in_memory import by_own_names, differed, refuse_overlaps, replaced
from lora_tools.merging.orientation import as_stored
from lora_tools.merging.passed_by import part_passed_by
from lora_tools.merging.targets import BaseOutline, Part, Target, blocks_of, key_of, need_float
from lora_tools.merging.tied_weights import part_tied, ties_of
from lora_tools.records import Action, Fate, TensorSpec
from lora_tools.sources.weighted import Weighted

if TYPE_CHECKING:
    from lora_tools.linalg.merge import Effect


@dataclasses.dataclass(frozen=True)
class MergePlan:
    """Every tensor of the output, in file order; ``untied`` are those the base does not store.

    ``config`` is the output's config.json where weights that are tied in the base come to differ,
    such as output head and input embedding; else None.
    """

    targets: tuple[Target, ...]
    untied: tuple[Target, ...]
    config: Mapping[str, Any] | None
    unmatched: tuple[Fate, ...]
    notes: tuple[str, ...]

    @property
    def unties(self) -> bool:
        """Whether weights that are tied in the base come to differ."""
        return self.config is not None

    def fates(self) -> tuple[Fate, ...]:
        """The fate of every tensor, and of every adapter key that matched nothing."""
        fates = []
        for target in (*self.targets, *self.untied):
            kinds = sorted({part.kind for part in target.parts})
            action = Action.MERGE if kinds else Action.COPY
            reason = ", ".join(kinds)
            if target in self.untied:
                reason = f"untied from {target.base_name}" + (f"; {reason}" if reason else "")
                action = Action.ADD
            fates.append(Fate(target.spec.name, action, reason, target.spec.nbytes))
        return (*fates, *self.unmatched)


def adapter_digest(adapter: Adapter) -> str:
    """Content digest of an adapter's tensors, of the kind that is used here."""
    hashes = {name: hashing.tensor_hash(adapter.file.raw(name)) for name in adapter.file.specs}
    return hashing.digest(adapter.file.specs.values(), hashes)


def plan_merge(
    base: Checkpoint | BaseOutline,
    adapters: Sequence[Weighted],
    allow_unmatched: bool | None = None,
    undoing: bool = False,
) -> MergePlan:
    """Match every key of every adapter to a tensor.

    Args:
        allow_unmatched: leave out what matches none; None where that cannot be asked for.
        undoing: the base is the merged checkpoint, and whether it was meant is past asking.

    Raises:
        AdapterError: a key matches nothing (unless allowed), or two adapters replace one tensor.
        UnsupportedAdapter: factors have no effect in PEFT's own model (unless allowed).
        MismatchError: shapes that do not fit.
    """
    parts: dict[str, list[Part]] = {}
    unmatched: list[Fate] = []
    notes = [*base.notes, *(f"{w.path}: {said}" for w in adapters for said in w.adapter.notes)]
    each = [as_base_holds(_wanted(weighted), base) for weighted in adapters]
    ties = ties_of(base, {name for mine in each for name, _ in mine})
    sources = ties.sources
    for weighted, mine in zip(adapters, each, strict=True):
        matched, sentence = _matched(mine, base, sources, weighted.adapter.config)
        if sentence:
            notes.append(f"{weighted.path}: {sentence} to match the base")
        matched, passed_by = part_passed_by(matched, base, allow_unmatched)
        unmatched += passed_by
        notes += note_on_no_head(base.config, weighted)
        for name, target, part in matched:
            optional = may_lack(part, target) or (part.kind == "ia3" and target.endswith(".bias"))
            if optional and target not in base.specs:
                continue  # they change a module's output; not every module adds a bias to it
            if target in base.specs or target in sources:
                spec = base.specs.get(target) or base.specs[sources[target]]
                parts.setdefault(target, []).append(_fit(part, target, spec, base))
            elif allow_unmatched:
                unmatched.append(Fate(name, Action.UNMATCHED, f"{weighted.path}: no such tensor"))
            else:
                hint = "" if allow_unmatched is None else " --allow-unmatched leaves such keys out"
                raise AdapterError(f"{_no_such_tensor(weighted, name, base)}{hint}")
    if adapters and not parts:
        raise AdapterError(f"no key of {', '.join(w.path for w in adapters)} matches {base.path}")
    notes += [] if undoing else doubts(base, adapters, parts)
    for name, acting in parts.items():
        refuse_mixtures(name, acting)
        spec = base.specs.get(name) or base.specs[sources[name]]
        refuse_overlaps(name, acting, spec)
    parted = part_tied(parts, ties, base, notes)
    _refuse_two_replacements(parts)
    untied = tuple(
        Target(
            dataclasses.replace(base.specs[source], name=name), source, tuple(parts.get(name, ()))
        )
        for name, source in parted.names.items()
    )
    targets = tuple(
        Target(spec, name, tuple(parts.get(name, ()))) for name, spec in base.specs.items()
    )
    if isinstance(base, FittedBase):
        unmatched += base.left_out
    return MergePlan(targets, untied, parted.config, tuple(unmatched), tuple(notes))


def names_in_base(weighted: Weighted, base: Checkpoint) -> tuple[dict[str, str], str]:
    """Which tensor of the base each module of an adapter acts on, where it is one and has no other
    name in memory; and a sentence on a prefix that was left out or put before, or "".

    Raises:
        AdapterError: a key matches nothing, as in a merge; of what is saved whole that is not
            asked, since a model may come to have it.
    """
    wanted = [(n, p) for n, p in as_base_holds(_wanted(weighted), base) if p.kind != "saved"]
    ties = ties_of(base, {name for name, _ in wanted}).sources
    matched, sentence = _matched(wanted, base, ties, weighted.adapter.config)
    asked = {id(part): name for name, part in wanted if part.expert is None}
    found = {}
    for name, target, part in matched:
        if target not in base.specs and target not in ties:
            raise AdapterError(_no_such_tensor(weighted, name, base))
        if isinstance(part.source, LoraModule) and asked.get(id(part)) == name:
            found[part.source.name] = target
    return found, sentence


def _no_such_tensor(weighted: Weighted, name: str, base: Checkpoint | BaseOutline) -> str:
    asked = f"{weighted.path}: {name} matches no tensor of {base.path}; is this the right base?"
    part = name.partition(".")[0]
    if part in ENCODERS and not any(spec.startswith(f"{part}.") for spec in base.specs):
        asked += f" It has no {part}: give one that has, such as the whole pipeline."
    return asked


def _matched(
    wanted: list[tuple[str, Part]],
    base: Checkpoint | BaseOutline,
    ties: Mapping[str, str],
    config: Mapping[str, Any],
) -> tuple[list[tuple[str, str, Part]], str]:
    """Names that are asked for and the base's names for them, and what ``align`` says."""
    known = [*base.specs, *(name for name in ties if name not in base.specs)]
    wanted = by_own_names(wanted, base, known)
    own = base.models if isinstance(base, Checkpoint) else {}
    components = tuple(own) or held(base.path, base.config, base.specs)
    asked = [n for n, _ in wanted if n in base.specs or not of_another(n, components)]
    mapping, sentence = aligned(asked, known, own, config.get("base_model_name_or_path"))
    return [(name, mapping.get(name, name), part) for name, part in wanted], sentence


def _wanted(weighted: Weighted) -> list[tuple[str, Part]]:
    """Every part of an adapter with the tensor name it asks for."""
    adapter = weighted.adapter
    wanted: list[tuple[str, Part]] = []
    for name, key in sorted(adapter.whole.items()):
        wanted.append((name, Part(weighted, key, "saved")))
    for name, key in sorted(adapter.differences.items()):
        wanted.append((name, Part(weighted, key, "difference")))
    for module in (adapter.modules[name] for name in sorted(adapter.modules)):
        part = Part(weighted, module, "dora" if module.magnitude else "lora")
        wanted.append((module.weight, part))
        if module.bias:
            wanted.append((f"{module.module}.bias", Part(weighted, module, "bias")))
    wanted += wanted_changes(weighted)
    for name, multiplier in sorted(adapter.multipliers.items()):
        wanted.append((f"{name}.weight", Part(weighted, multiplier, "ia3")))
        if not multiplier.on_input:
            wanted.append((f"{name}.bias", Part(weighted, multiplier, "ia3")))
    for name, tokens in sorted(adapter.tokens.items()):
        wanted.append((f"{name}.weight", Part(weighted, tokens, "rows")))
    return wanted


def _fit(part: Part, name: str, spec: TensorSpec, base: Checkpoint | BaseOutline) -> Part:
    """Check shapes and choose the layout."""
    adapter = part.weighted.adapter
    if part.expert is not None:
        return fit_share(part, name, spec, base)
    if part.shape and (part.kind not in ("lora", "saved", "difference") or len(spec.shape) > 2):
        what = part.source.kind.title if isinstance(part.source, ChangedModule) else part.kind
        raise UnsupportedAdapter(
            f"{part.weighted.path}: has {what} for a tensor of {part.shape} that {base.path} "
            f"stores in parts or in one tensor with others ({name}), and this cannot be merged; "
            "take a base that stores it as the adapter has it (a diffusion model's other layout)"
        )
    if isinstance(part.source, LoraModule) and part.kind != "bias":
        whole = dataclasses.replace(spec, shape=part.shape or spec.shape)
        layout = _layout(part.source, whole, base, adapter)
        need_float(name, spec)
        if part.source.magnitude:
            found, wanted = adapter.shape(part.source.magnitude), layout.magnitudes(whole.shape)
            if math.prod(found) != wanted:
                raise MismatchError(
                    f"{name}: {whole.shape} needs {wanted} magnitudes, {part.weighted.path} has "
                    f"{found}"
                )
        return dataclasses.replace(part, layout=layout, shape=whole.shape)
    if isinstance(part.source, ChangedModule):
        return dataclasses.replace(part, layout=stored_as(part, spec, base), shape=spec.shape)
    if isinstance(part.source, Multiplier):
        stored = ia3.multiplier_layout(adapter, part.source, spec, base)
        return dataclasses.replace(part, layout=stored, shape=spec.shape)
    key = key_of(part)
    shape = adapter.shape(key)
    if part.kind == "difference":
        need_float(name, spec)
    if isinstance(part.source, TokenRows):
        rows = part.source.indices
        fits = shape == (len(rows), *spec.shape[1:]) and all(0 <= i < spec.shape[0] for i in rows)
    else:
        fits = shape == (part.shape or spec.shape)
    if not fits:
        of_a_model = isinstance(base, BaseOutline) and base.renamed is not None
        raise MismatchError(
            f"{name}: base is {spec.shape}, {part.weighted.path} has {shape} ({part.kind})"
            + ("; resize the model's vocabulary first" if of_a_model else "")
        )
    return part


def _layout(
    module: LoraModule, spec: TensorSpec, base: Checkpoint | BaseOutline, adapter: Adapter
) -> Layout:
    """The layer kind under which the factors have the stored shape. Square weights fit both
    orientations: then it is asked how they are stored."""
    a, b = adapter.shape(module.A), adapter.shape(module.B)
    kinds = (kind.fits(spec.shape, a, b) for kind in of_form(module.form, **module.parameters))
    found = [kind for kind in kinds if kind is not None]
    if not found:
        factors = f"(out, in) = {(b[0], a[1])}" if len(a) == 2 else f"lora_A {a}, lora_B {b}"
        raise MismatchError(
            f"{module.module}: base is {spec.shape}, the factors are for {factors}; is this the "
            "base the adapter was trained on?"
        )
    if module.experts and len(found) > 1:
        transposed = adapter.transposes_experts or stores_transposed(spec, base.config)
        found = [kind for kind in found if kind.transposed == transposed]
    elif module.form in ("matrix", "merged"):
        found = [as_stored(found, spec, base, adapter)]
    return found[0]


def _refuse_two_replacements(parts: Mapping[str, Sequence[Part]]) -> None:
    """Raises AdapterError where the last of several adapters would win."""
    for name, acting in parts.items():
        replacing = [p for p in acting if p.kind in ("saved", "rows")]
        for i, part in enumerate(replacing):
            for other in replacing[:i]:
                what = _both_replace(other, part)
                if what and other.weighted.path != part.weighted.path:
                    raise AdapterError(
                        f"{name}: {other.weighted.path} and {part.weighted.path} each replace "
                        f"{what}; merge one of them only"
                    )


def _both_replace(one: Part, other: Part) -> str:
    """What of a tensor both put something else in the place of, or ""."""
    if not (isinstance(one.source, TokenRows) and isinstance(other.source, TokenRows)):
        return "it whole" if one.kind == other.kind else "rows of it, or all of it"
    both = sorted({*one.source.indices} & {*other.source.indices})
    return f"its row of token {both[0]}" if both else ""


def build_effects(target: Target, read: Read | None) -> list[Effect]:
    """Read the factors that act on a tensor.

    Args:
        read: gives tensors of the base, of which some changes are made; None where it is not there:
            these are left out then.
    """
    import torch

    from lora_tools.linalg.merge import Added, LowRank, Multiplied, RowsReplaced, dense

    effects: list[Effect] = [*change_effects(target, read)]
    for part in target.parts:
        adapter, weight, source = part.weighted.adapter, part.weighted.weight, part.source
        if isinstance(source, TokenRows):
            indices = torch.tensor(source.indices)
            effects.append(RowsReplaced(indices, adapter.tensor(source.key), weight))
        elif isinstance(source, Multiplier):
            factor = ia3.factor(adapter.tensor(source.key), source, part.layout, target.spec)
            effects.append(Multiplied(factor, weight))
        elif isinstance(source, str) and part.kind == "difference":
            effects.append(differed(part, adapter.tensor(source), target))
        elif isinstance(source, str) and part.expert is not None:
            effects += part.expert.replaced(adapter.tensor(source), part.shape, weight)
        elif isinstance(source, str):
            effects.append(replaced(part, adapter.tensor(source), target))
        elif not isinstance(source, ChangedModule):
            scale = scaling(source.alpha, source.r, adapter.use_rslora)
            if part.kind == "bias":
                assert source.bias is not None
                bias = adapter.tensor(source.bias)
                effects.append(Added(bias.reshape(1, -1), weight * scale))
                continue
            assert part.layout is not None
            blocks, shape = blocks_of(part), target.matrix(target.spec.shape)
            magnitude = adapter.tensor(source.magnitude) if source.magnitude else None
            if part.start or part.shape != target.spec.shape:
                blocks = clip(blocks, part.start, part.start + shape[0])
            elif part.layout.matrix(part.shape) != shape:
                # Another adapter sees the tensor as another matrix.
                values = dense(blocks, part.layout.matrix(part.shape)).reshape(shape)
                effects.append(Added(values, weight * scale))
                continue
            effects.append(LowRank(part.layout, blocks, scale, weight, magnitude))
    return effects
