"""Factors that PEFT's own model passes by: those of layers whose weights their model reads, instead
of calling them. The trained model never had them, and the merged one would."""

from __future__ import annotations

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.adapters.peft import LoraModule
from lora_tools.formats.checkpoint import Checkpoint
from lora_tools.formats.names import split_tensor
from lora_tools.merging.targets import BaseOutline, Part
from lora_tools.records import Action, Fate
from lora_tools.sources.transformers_names import calls_in_four_bits, is_read_past

Matched = list[tuple[str, str, Part]]


def part_passed_by(
    matched: Matched, base: Checkpoint | BaseOutline, allow_unmatched: bool | None
) -> tuple[Matched, list[Fate]]:
    """What of (name asked for, name in the base, part) acts in PEFT's model, too; and the fates of
    the rest, which is left out. Factors of a product 0, as training leaves those, change nothing
    either way and stay.

    Args:
        allow_unmatched: leave out the rest; None where that cannot be asked for.

    Raises:
        UnsupportedAdapter: there is a rest, and it may not be left out.
    """
    kept, left_out = [], []
    for name, target, part in matched:
        if not _is_passed_by(target, part, base):
            kept.append((name, target, part))
            continue
        said = f"{part.weighted.path}: the model uses this weight without PEFT's layer around it"
        if not allow_unmatched:
            hint = "" if allow_unmatched is None else "; --allow-unmatched leaves them out"
            if calls_in_four_bits(base.config):
                hint += "; if they were trained on a base in four bits, merge them into that base"
            raise UnsupportedAdapter(
                f"{said}, so the factors of {name} have no effect in PEFT, but would have one once "
                f"merged{hint}"
            )
        left_out.append(Fate(name, Action.UNMATCHED, said))
    return kept, left_out


def _is_passed_by(target: str, part: Part, base: Checkpoint | BaseOutline) -> bool:
    if not isinstance(part.source, LoraModule) or part.kind == "bias":
        return False
    if not is_read_past(split_tensor(target)[0], base.config):
        return False
    in_codes = isinstance(base, Checkpoint) and base.scheme is not None
    if in_codes and calls_in_four_bits(base.config):
        return False
    adapter = part.weighted.adapter
    return all(bool(adapter.tensor(key).any()) for key in (part.source.A, part.source.B))
