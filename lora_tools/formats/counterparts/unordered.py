"""Fused weights whose order of rows no file tells: q, k and v of MiniMax-H3's attention lie one
above the other in single files, and head by head in MiniMaxAI's shards and in DiffSynth-Studio's
adapters (diffusers 0.42, ``_convert_non_diffusers_minimax_h3_lora_to_diffusers``). Taking one for
the other gives a model that loads and is wrong, so it is refused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lora_tools.errors import UnsupportedAdapter
from lora_tools.formats.counterparts.family import Pair
from lora_tools.formats.counterparts.table import Part

_FUSED = re.compile(r"(?:.*\.)?blocks\.\d+\.attn\.qkv_proj")
_CUT = re.compile(r"(?:.*\.)?(?:transformer|refiner)_blocks\.\d+\.attn\.to_[qkv]")
_ORDERS = (
    "of MiniMax-H3 has q, k and v one above the other in some files and head by head in others"
)
_USE = "use the model in the layout of diffusers (its transformer folder)"


def may_be(module: str) -> bool:
    """Whether it is called as one of these is, or as a part of it."""
    return bool(_FUSED.fullmatch(module) or _CUT.fullmatch(module))


def refuse_unordered(
    adapter: Path, by_peft: bool, modules: Iterable[str], base: Path, parts: Iterable[Part]
) -> None:
    """Raises UnsupportedAdapter for modules of an adapter that are of such a weight, where the base
    has it fused, or the adapter has and may be of either order.

    Args:
        by_peft: whether it is an adapter of PEFT's, which may be of either; files of kohya,
            ComfyUI and diffusers have them one above the other.
        parts: those of the base that have two layouts.
    """
    found = sorted(filter(may_be, modules))
    if not found:
        return
    layouts = {part.layout for part, _ in _unordered(parts)}
    if "original" in layouts:
        raise UnsupportedAdapter(
            f"{adapter}: {found[0]}: attn.qkv_proj {_ORDERS}, and nothing in {base} shows which; "
            f"{_USE} as the base, where they are separate"
        )
    fused = next(filter(_FUSED.fullmatch, found), "")
    if layouts and by_peft and fused:
        raise UnsupportedAdapter(
            f"{adapter}: {fused}: attn.qkv_proj {_ORDERS}, and a PEFT adapter does not show which; "
            "train or extract it on the model in the layout of diffusers, or give the file that "
            "the trainer wrote"
        )


def refuse_untold(adapter: Path, modules: Iterable[str]) -> None:
    """Raises UnsupportedAdapter for such modules of a PEFT adapter that is to be another file, with
    no base to tell the model by."""
    found = min(filter(_FUSED.fullmatch, modules), default="")
    if found:
        raise UnsupportedAdapter(
            f"{adapter}: {found}: attn.qkv_proj {_ORDERS}, and a PEFT adapter does not show which, "
            "but the output needs to; give the model it was trained on with --base"
        )


def refuse_fused(base: Path, parts: Iterable[Part]) -> None:
    """Raises UnsupportedAdapter where the base has such a weight, and what is written says which
    order it is."""
    for part, pair in _unordered(parts):
        if part.layout == "original":
            raise UnsupportedAdapter(
                f"{base}: {part.wrapper}{pair.original}: attn.qkv_proj {_ORDERS}, and nothing in "
                f"the file shows which, but the output needs to; {_USE}"
            )


def refuse_interleaved(
    adapter: Path, keys: Iterable[str], modules: Iterable[str], parts: Iterable[Part] | None
) -> None:
    """Raises UnsupportedAdapter for DiffSynth-Studio's adapters of such a weight: their rows are
    head by head, which only their spelling tells.

    Args:
        parts: as above; None where no base is given, and the modules' names alone tell.
    """
    found = min(filter(_FUSED.fullmatch, modules), default="")
    spelt = any(".lora_A.default." in key or ".lora_B.default." in key for key in keys)
    if found and spelt and (parts is None or any(_unordered(parts))):
        raise UnsupportedAdapter(
            f"{adapter}: {found}: attn.qkv_proj {_ORDERS}. DiffSynth-Studio's files (.default. in "
            "their keys) have it head by head, which cannot be read; load it with diffusers' "
            "load_lora_weights and give the file that its save_lora_adapter writes"
            + ("; if it is for another model, give that with --base" if parts is None else "")
        )


def _unordered(parts: Iterable[Part]) -> Iterable[tuple[Part, Pair]]:
    return ((part, pair) for part in parts for pair in part.pairs if pair.unordered)
