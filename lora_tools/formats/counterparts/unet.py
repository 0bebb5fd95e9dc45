"""The UNets of Stable Diffusion 1, 2 and XL: diffusers groups the blocks that the original numbers
in one row. diffusers 0.42, ``convert_ldm_unet_checkpoint``; which blocks there are is read off
the names, so that no config is needed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from lora_tools.formats.counterparts.family import Family, Layout, Pair, has

_OTHERS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_BLOCK = re.compile(r"(input_blocks|output_blocks|down_blocks|up_blocks)\.(\d+)\.(.+)")


def _blocks(modules: Collection[str], kind: str) -> dict[int, set[str]]:
    """By the number of a block, what is in it; none where one is missing, for then the numbers of
    those after it tell nothing."""
    found: dict[int, set[str]] = {}
    for module in modules:
        match = _BLOCK.fullmatch(module)
        if match and match[1] == kind:
            found.setdefault(int(match[2]), set()).add(match[3])
    return {i: found[i] for i in sorted(found)} if len(found) == max(found, default=-1) + 1 else {}


def _of_original(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """Beginnings of names there and in diffusers."""
    block = layer = 0
    for i, names in _blocks(modules, "input_blocks").items():
        if i == 0:
            continue
        if "0.op" in names:
            yield f"input_blocks.{i}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            block, layer = block + 1, 0
        else:
            yield f"input_blocks.{i}.0", f"down_blocks.{block}.resnets.{layer}"
            yield f"input_blocks.{i}.1", f"down_blocks.{block}.attentions.{layer}"
            layer += 1
    block = layer = 0
    for i, names in _blocks(modules, "output_blocks").items():
        yield f"output_blocks.{i}.0", f"up_blocks.{block}.resnets.{layer}"
        sampler = next((name for name in ("1.conv", "2.conv") if name in names), "")
        if sampler != "1.conv":
            yield f"output_blocks.{i}.1", f"up_blocks.{block}.attentions.{layer}"
        layer += 1
        if sampler:
            yield f"output_blocks.{i}.{sampler}", f"up_blocks.{block}.upsamplers.0.conv"
            block, layer = block + 1, 0


def _of_diffusers(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    """The same, of a model as diffusers has it."""
    i = 1
    for block, names in _blocks(modules, "down_blocks").items():
        for layer in range(_layers(names)):
            yield f"input_blocks.{i}.0", f"down_blocks.{block}.resnets.{layer}"
            yield f"input_blocks.{i}.1", f"down_blocks.{block}.attentions.{layer}"
            i += 1
        if "downsamplers.0.conv" in names:
            yield f"input_blocks.{i}.0.op", f"down_blocks.{block}.downsamplers.0.conv"
            i += 1
    i = 0
    for block, names in _blocks(modules, "up_blocks").items():
        for layer in range(_layers(names)):
            yield f"output_blocks.{i}.0", f"up_blocks.{block}.resnets.{layer}"
            yield f"output_blocks.{i}.1", f"up_blocks.{block}.attentions.{layer}"
            i += 1
        place = 2 if any(name.startswith("attentions.") for name in names) else 1
        yield f"output_blocks.{i - 1}.{place}.conv", f"up_blocks.{block}.upsamplers.0.conv"


def _layers(names: Collection[str]) -> int:
    numbers = [int(m[1]) for name in names if (m := re.match(r"resnets\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _pairs(modules: Collection[str], layout: Layout) -> Iterator[Pair]:
    """All modules of the UNet that have a name in the other layout."""
    original = layout == "original"
    found = dict(_of_original(modules) if original else _of_diffusers(modules)) | _MIDDLE
    heads = found if original else {theirs: own for own, theirs in found.items()}
    others = _OTHERS if original else {theirs: own for own, theirs in _OTHERS.items()}
    inner = _RESNET if original else {theirs: own for own, theirs in _RESNET.items()}
    for module in modules:
        other = others.get(module) or _renamed(module, heads, inner)
        if other:
            pair = (module, other) if original else (other, module)
            yield Pair(pair[0], (pair[1],))


def _renamed(module: str, heads: Mapping[str, str], inner: Mapping[str, str]) -> str:
    """A module of a block in the other layout, or ""."""
    if module in heads:
        return heads[module]
    parts = module.split(".")
    for size in (2, 3, 4):
        head, rest = ".".join(parts[:size]), ".".join(parts[size:])
        if rest and head in heads:
            is_resnet = ".resnets." in head or ".resnets." in heads[head]
            rest = inner.get(rest, "") if is_resnet else rest
            return f"{heads[head]}.{rest}" if rest else ""
    return ""


UNET = Family(
    "UNet of Stable Diffusion",
    has("input_blocks."),
    has("down_blocks.", "mid_block."),
    _pairs,
    # sd-scripts trains SDXL in the original's layout and the others in diffusers'.
    lambda modules: (
        "original"
        if any(m.startswith(("label_emb.", "add_embedding.")) for m in modules)
        else "diffusers"
    ),
)
