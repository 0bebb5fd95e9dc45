"""Output heads and input embeddings that are one tensor, and whether adapters act on both alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.peft import LoraModule, TokenRows
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import is_output_head
from lora_tools.linalg.scaling import scaling
from lora_tools.merging.targets import BaseOutline, Part, blocks_of, key_of

if TYPE_CHECKING:
    import torch


def tied_pair(base: Checkpoint | BaseOutline, wanted: Collection[str]) -> tuple[str, str]:
    """(output head, input embedding) where the base ties them, the head by the name that is wanted
    of one that is not stored; else two ""."""
    head, embedding = base.weights.tied_pair
    if not head:
        return "", ""
    asked = {name for name in wanted if is_output_head(name) and name.endswith(".weight")}
    return (min(asked) if asked and head not in base.specs else head), embedding


def differ(parts: dict[str, list[Part]], head: str, embedding: str) -> bool:
    """Whether the effects on the two sides of a tied pair differ.

    What PEFT lets the head follow is put there first: trained rows always, the rest where the
    adapter asks for it. (PEFT 0.21 writes the factors of both sides then, or both weights.)
    """
    mine, theirs = parts.get(embedding, []), parts.get(head, [])
    for part in mine:
        follows = part.kind == "rows" or part.weighted.adapter.config.get("ensure_weight_tying")
        if follows and not any(p.weighted is part.weighted and p.kind == part.kind for p in theirs):
            theirs = parts.setdefault(head, [])
            theirs.append(part)
    return len(mine) != len(theirs) or not all(any(_alike(p, q) for q in theirs) for p in mine)


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


def take_followers(
    parts: dict[str, list[Part]], followers: Mapping[str, str], notes: list[str]
) -> None:
    """Take out what acts on weights that are another tensor, too, which it acts on alike.

    Raises:
        UnsupportedAdapter: it does not.
    """
    for name, source in followers.items():
        acting = parts.pop(name, [])
        if not all(any(_alike(part, other) for other in parts.get(source, [])) for part in acting):
            raise UnsupportedAdapter(
                f"{acting[0].weighted.path}: acts on {name}, which is the same tensor as {source}, "
                "and not alike on both: they cannot be parted"
            )
        if acting:
            notes.append(f"{name} stays tied to {source}: the adapters act on both alike")


def refuse_unless_untiable(head: str, embedding: str) -> None:
    """Raises UnsupportedAdapter where a head cannot be parted from its embedding."""
    if head.startswith(("cls.", "lm_head.decoder")):
        raise UnsupportedAdapter(
            f"{head} is tied to {embedding}, the adapter acts on one of them only, and this "
            "architecture ties a bias with them, so that they cannot be parted. If the head is to "
            "follow, set ensure_weight_tying to true in the adapter's adapter_config.json"
        )
