"""XLabs' LoRAs of FLUX.1: factors of attention processors, which hold q, k and v as one.

``double_blocks.0.processor.qkv_lora1.down.weight`` and the like. By diffusers 0.42,
``_convert_xlabs_flux_lora_to_diffusers``; of single blocks q, k and v are the first rows of
``linear1`` only, so that the names are those of diffusers, where each is a module.
"""

from __future__ import annotations

import re

from lora_tools.formats.counterparts.family import ADDED, qkv

_KEY = re.compile(
    r"(diffusion_model\.)?(?P<module>(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?)"
    r"\.(?P<part>down|up)\.weight"
)
_PARTS = {"down": "A", "up": "B"}
_DOUBLE, _SINGLE = "transformer.transformer_blocks", "transformer.single_transformer_blocks"
_MODULES = {
    "double.qkv_lora1": qkv(f"{_DOUBLE}.#.attn"),
    "double.qkv_lora2": qkv(f"{_DOUBLE}.#.attn", ADDED),
    "double.proj_lora1": (f"{_DOUBLE}.#.attn.to_out.0",),
    "double.proj_lora2": (f"{_DOUBLE}.#.attn.to_add_out",),
    "single.qkv_lora": qkv(f"{_SINGLE}.#.attn"),
    "single.proj_lora": (f"{_SINGLE}.#.proj_out",),
}


def split(key: str) -> tuple[str, str] | None:
    """A key → its module in the file, and "A" or "B"."""
    match = _KEY.fullmatch(key)
    return (match["module"], _PARTS[match["part"]]) if match and modules(match["module"]) else None


def modules(module: str) -> tuple[str, ...]:
    """The modules that the outputs are of, each of as many; () for another's."""
    blocks, _, rest = module.partition("_blocks.")
    number, _, last = rest.partition(".processor.")
    return tuple(name.replace("#", number) for name in _MODULES.get(f"{blocks}.{last}", ()))
