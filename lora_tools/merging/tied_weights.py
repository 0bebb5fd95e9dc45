"""Weights of several names that are one tensor, such as an output head and the input embedding:
whether adapters act on all of them alike, and what is written where they do not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.peft import LoraModule, TokenRows
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import is_output_head
from lora_tools.formats.patterns import matches
from lora_tools.linalg.scaling import scaling
from lora_tools.merging.targets import BaseOutline, Part, blocks_of, key_of
from lora_tools.sources.transformers_names import why_unknown
from lora_tools.sources.untying import untie

if TYPE_CHECKING:
    import torch

_EMBEDDINGS = ("embed_tokens", "lm_head")  # PEFT's EMBEDDING_LAYER_NAMES


@dataclasses.dataclass(frozen=True)
class Ties:
    """Tensors of several names that adapters may act on.

    Attributes:
        groups: the names of each, as they are stored or would be; the first is stored.
        known: whether these are the names that a loader looks for.
    """

    groups: tuple[tuple[str, ...], ...]
    known: bool = True

    @property
    def sources(self) -> dict[str, str]:
        """Every name but the stored first → that."""
        return {name: group[0] for group in self.groups for name in group[1:]}


@dataclasses.dataclass(frozen=True)
class Parted:
    """What is written of tied weights once adapters acted on them.

    Attributes:
        names: those to be written that the base does not store → the tensor each is made of.
        config: the output's config.json where tensors that were one are no longer, else None.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def ties_of(base: Checkpoint | BaseOutline, wanted: Collection[str]) -> Ties:
    """Those that the wanted names may belong to. A head that is not stored goes by the name that is
    wanted of it, where that is another than expected."""
    weights = base.weights
    groups = weights.groups_with(wanted)
    if not groups:
        return Ties(())
    there = {*base.specs, *(name for group in groups for name in group)}
    asked = {name for name in wanted if is_output_head(name) and name.endswith(".weight")} - there
    head = weights.head
    if asked and head not in base.specs:
        groups = tuple(tuple(min(asked) if n == head else n for n in group) for group in groups)
    # Without the class, the one name that a head surely has is that which PEFT found it by.
    met = {*base.specs, *wanted}.issuperset(name for group in groups for name in group)
    return Ties(groups, weights.model is not None or met)


def part_tied(
    parts: dict[str, list[Part]], ties: Ties, base: Checkpoint | BaseOutline, notes: list[str]
) -> Parted:
    """Settle what acts on weights that are one tensor. What acts on all of its names alike is left
    to those that are stored; else every name that a loader then looks for is written.

    Raises:
        UnsupportedAdapter: they cannot be parted, or it is not known what a loader looks for.
    """
    for group in ties.groups:
        _let_follow(parts, group, base.weights.embedding)
    loose = [group for group in ties.groups if not _act_alike(parts, group)]
    if not loose:
        for name, source in ties.sources.items():
            if name not in base.specs and parts.pop(name, []):
                notes.append(
                    f"{name} stays tied to {source}: the adapters change both in the same way"
                )
        return Parted()
    mine = {group[0]: group for group in ties.groups}
    every = [mine.get(group[0], group) for group in base.weights.groups]
    _refuse_to_part(loose, every, ties, base)
    notes += map(_said_of, loose)
    if isinstance(base, BaseOutline) and base.renamed is not None:  # live: there is no loader
        return Parted({}, base.config)
    if isinstance(base, Checkpoint) and base.models:
        folder = loose[0][0].partition(".")[0]
        raise UnsupportedAdapter(
            f"{', '.join(loose[0])} are one tensor, and the adapter changes only some of them, "
            f"which needs another config; merge into {base.path / folder} alone"
        )
    after = untie(base.config, base.specs)
    if after.computes_otherwise:
        raise UnsupportedAdapter(
            f"{', '.join(loose[0][1:])} and {loose[0][0]} are tied, and the adapter changes only "
            f"some of them, but they cannot be separated, because {after.computes_otherwise} "
            "computes differently when they are not tied"
        )
    names = {}
    for group in every:
        for name in group[1:]:
            one = group not in loose and any({name, group[0]} <= set(g) for g in after.groups)
            if name not in base.specs and one:
                parts.pop(name, None)
            elif name not in base.specs:
                names[name] = group[0]
    return Parted(names, after.config)


def _said_of(group: Sequence[str]) -> str:
    two = len(group) == 2
    return (
        f"{', '.join(group[1:])} and {group[0]} were one tensor and are "
        f"{'two' if two else len(group)} now, because the adapters change them differently; "
        "tie_word_embeddings is set to false in config.json"
    )


def _let_follow(parts: dict[str, list[Part]], group: Sequence[str], embedding: str) -> None:
    """Put what PEFT lets the tied weights follow their embedding in onto them: trained rows, unless
    they have others of their own, and the rest where the adapter asks for it. (PEFT 0.21 writes
    the factors of all of them then, or all weights.)"""
    if embedding not in group:
        return
    others = [name for name in group if name != embedding]
    for part in parts.get(embedding, []):
        beside = [
            other
            for name in others
            for other in parts.get(name, [])
            if other.weighted is part.weighted and other.kind == part.kind
        ]
        if part.kind == "rows" and any(not _same_rows(part, other) for other in beside):
            continue
        if part.kind == "rows" or _ensures_tying(part.weighted.adapter.config):
            for name in others:
                theirs = parts.setdefault(name, [])
                if not any(p.weighted is part.weighted and p.kind == part.kind for p in theirs):
                    theirs.append(part)


def _ensures_tying(config: Mapping[str, Any]) -> bool:
    """Whether PEFT 0.21 ties what an adapter adds: it looks for embeddings of two names only."""
    targets = config.get("target_modules") or ()
    saved = config.get("modules_to_save") or ()
    if isinstance(targets, str):
        try:
            named = any(matches(targets, name, whole=True) for name in _EMBEDDINGS)
        except re.error:  # nothing loads it
            named = False
    else:
        named = any(name.rpartition(".")[2] in _EMBEDDINGS for name in targets)
    named = named or any(name.rpartition(".")[2] in _EMBEDDINGS for name in saved)
    return bool(config.get("ensure_weight_tying")) and named


def _same_rows(one: Part, other: Part) -> bool:
    assert isinstance(one.source, TokenRows)
    assert isinstance(other.source, TokenRows)
    return one.source.indices == other.source.indices


def _act_alike(parts: Mapping[str, Sequence[Part]], group: Sequence[str]) -> bool:
    """Whether the effects on all names of a tensor are the same. PEFT writes a bias that it brings
    into the one tensor, whatever its other names."""
    mine = parts.get(group[0], ())
    others = group[1:] if group[0].endswith(".weight") else [n for n in group[1:] if n in parts]
    return all(
        len(mine) == len(theirs) and all(any(_alike(p, q) for q in theirs) for p in mine)
        for theirs in (parts.get(name, ()) for name in others)
    )


def _alike(one: Part, other: Part) -> bool:
    """Whether two parts of one adapter do the same to two tensors that are equal, to rounding.

    Reads them. Factors need not be the same numbers: a resize gives others with their product.
    """
    import torch

    from lora_tools.linalg.lora import difference_energy

    if one is other or one.weighted is not other.weighted or one.kind != other.kind:
        return one is other
    adapter = one.weighted.adapter
    if isinstance(one.source, LoraModule) and isinstance(other.source, LoraModule):
        if one.kind == "dora":  # a magnitude for each dimension, and one for each token
            return False
        mine, theirs = _scaled_factors(one), _scaled_factors(other)
        unit = max(torch.finfo(factor.dtype).eps for factor in (*mine[:2], *theirs[:2]))
        scale = difference_energy(mine, (mine[0], mine[1], 0.0))
        return difference_energy(mine, theirs) <= (4 * unit) ** 2 * scale
    if isinstance(one.source, TokenRows) and isinstance(other.source, TokenRows):
        if one.source.indices != other.source.indices:
            return False
    elif not (isinstance(one.source, str) and isinstance(other.source, str)):
        return False
    return torch.equal(adapter.tensor(key_of(one)), adapter.tensor(key_of(other)))


def _scaled_factors(part: Part) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Of a head or an embedding, which are one product."""
    assert isinstance(part.source, LoraModule)
    (block,) = blocks_of(part)
    scale = scaling(part.source.alpha, part.source.r, part.weighted.adapter.use_rslora)
    return block.left, block.right, scale


def _refuse_to_part(
    loose: Sequence[Sequence[str]],
    every: Sequence[Sequence[str]],
    ties: Ties,
    base: Checkpoint | BaseOutline,
) -> None:
    """Raises UnsupportedAdapter where no loader would find the weights one by one, or none is known
    to."""
    source, *others = loose[0]
    tied = (
        f"{', '.join(others)} {'is' if len(others) == 1 else 'are'} tied to {source}, the adapter "
        f"acts on {'one' if len(others) == 1 else 'some'} of them only, "
    )
    follow = (
        "set ensure_weight_tying to true in the adapter's adapter_config.json, and have lm_head "
        "or embed_tokens in its target_modules"
    )
    biases = any(not group[0].endswith(".weight") for group in every)
    if biases or others[0].startswith(("cls.", "lm_head.decoder")):
        raise UnsupportedAdapter(
            f"{tied}and this architecture ties a bias with them, so they cannot be separated; if "
            f"the head should follow, {follow}"
        )
    if not ties.known or (base.weights.model is None and base.config.get("is_encoder_decoder")):
        raise UnsupportedAdapter(
            f"{tied}and it is not known under which names a program would look for separate "
            f"tensors ({why_unknown(base.config, base.specs) or 'config.json names no class'}); "
            f"install transformers 5 with this class, or, if all should follow, {follow}"
        )
