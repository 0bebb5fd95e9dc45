"""Small models of diffusers in both layouts, and which rows its converters put where: recorded in
``data/diffusers_layouts.json``, since diffusers takes seconds to import.

    python -m tests.diffusers_layouts     records it anew
"""

from __future__ import annotations

import bisect
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lora_tools.formats.counterparts.table import Counterpart, counterparts
from lora_tools.formats.dtypes import dtype_name
from lora_tools.records import TensorSpec

Tensors = dict[str, torch.Tensor]
Shapes = dict[str, tuple[int, ...]]
FILE = Path(__file__).parent / "data/diffusers_layouts.json"


def specs(tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorSpec]:
    return {k: TensorSpec(k, dtype_name(v.dtype), tuple(v.shape)) for k, v in tensors.items()}


def first_column(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: x[(slice(None), *[0] * (x.dim() - 1))] for name, x in tensors.items()}


def flux(head: int = 1536) -> Any:  # what the converter takes for granted
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=head,
        num_attention_heads=2,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(head - 4, 2, 2),
    )


def flux_2() -> Any:
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        axes_dims_rope=(1, 1, 1, 1),
    )


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        pos_embed_max_size=4,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=6,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=8,
        image_dim=7,
        added_kv_proj_dim=24,
    )


def z_image() -> Any:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=6, axes_dims=[4, 2, 2], axes_lens=[4, 4, 4],
    )  # fmt: skip


def hunyuan_video() -> Any:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=1536,  # as above
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=6,
        pooled_projection_dim=5,
        rope_axes_dim=(512, 512, 512),
    )


def unet(sdxl: bool = False) -> Any:
    from diffusers import UNet2DConditionModel

    more: dict[str, Any] = {}
    if sdxl:
        more = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 20,
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
        }
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


# What of an original no adapter acts on, so that no pair names it: as converters look for it.
NORM = ("query_norm", "key_norm")
BESIDE: dict[str, list[str]] = {
    "flux": [
        *(
            f"double_blocks.0.{s}_attn.norm.{n}.scale"
            for s in ("img", "txt") for n in NORM
        ),
        *(f"single_blocks.0.norm.{n}.scale" for n in NORM),
    ],
    "sd3": [
        "pos_embed",
        *(
            f"joint_blocks.{i}.{block}.ln_{n}.weight"
            for i, blocks in enumerate(
                (("x_block.attn", "context_block.attn", "x_block.attn2"),
                 ("x_block.attn", "context_block.attn"))
            )
            for block in blocks for n in "qk"
        ),
    ],
}  # fmt: skip
SINGLE = "diffusers.loaders.single_file_utils"
CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "flux": (flux, "convert_flux_transformer_checkpoint_to_diffusers"),
    "flux_2": (flux_2, "convert_flux2_transformer_checkpoint_to_diffusers"),
    "sd3": (sd3, "convert_sd3_transformer_checkpoint_to_diffusers"),
    "wan": (wan, "convert_wan_transformer_to_diffusers"),
    "z_image": (z_image, "convert_z_image_transformer_checkpoint_to_diffusers"),
    "hunyuan_video": (hunyuan_video, "convert_hunyuan_video_transformer_to_diffusers"),
    "sd1": (unet, "convert_ldm_unet_checkpoint"),
    "sdxl": (lambda: unet(sdxl=True), "convert_ldm_unet_checkpoint"),
}


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors whose rows have a number each, that take no memory."""
    result, first = {}, 0
    for name, shape in shapes.items():
        rows = torch.arange(first, first + shape[0], dtype=torch.float32)
        result[name] = rows.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        first += shape[0]
    return result


def converter(name: str) -> Callable[..., Tensors]:
    import importlib

    found: Callable[..., Tensors] = getattr(importlib.import_module(SINGLE), name)
    return found


def clip_text() -> Shapes:
    """An OpenCLIP of one layer."""
    block, d = "model.transformer.resblocks.0", 4
    return {
        "model.token_embedding.weight": (9, d),
        "model.ln_final.weight": (d,),
        f"{block}.attn.in_proj_weight": (3 * d, d),
        f"{block}.attn.in_proj_bias": (3 * d,),
        **{f"{block}.{n}.weight": (d, d) for n in ("attn.out_proj", "mlp.c_fc", "mlp.c_proj")},
        **{f"{block}.{n}.bias": (d,) for n in ("attn.out_proj", "mlp.c_fc", "ln_1", "ln_2")},
    }


def xlabs() -> Shapes:
    """XLabs' LoRA of a FLUX.1 of one block of each kind."""
    shapes: Shapes = {}
    for module, rows in (
        *((f"double_blocks.0.processor.qkv_lora{i}", 24) for i in "12"),
        *((f"double_blocks.0.processor.proj_lora{i}", 8) for i in "12"),
        ("single_blocks.0.processor.qkv_lora", 24),
        ("single_blocks.0.processor.proj_lora", 8),
    ):
        inside = 40 if module.startswith("single") and rows == 8 else 8
        shapes |= {f"{module}.down.weight": (2, inside), f"{module}.up.weight": (rows, 2)}
    return shapes


def by_makers(known: Mapping[str, Counterpart]) -> dict[str, Counterpart]:
    """Of tensors that have several names in the makers' layout, by the first of them."""
    first = {each.pieces: name for name, each in reversed(known.items())}
    return {name: each for name, each in known.items() if first[each.pieces] == name}


def original_of(case: str, theirs: Mapping[str, tuple[int, ...]]) -> Tensors:
    """The makers' layout of a model with these shapes in diffusers', its rows numbered."""
    held = {k: TensorSpec(k, "F32", v) for k, v in theirs.items()}
    known = by_makers(counterparts(held))
    covered = {piece.stored for each in known.values() for piece in each.pieces}
    same = {k: v for k, v in theirs.items() if k not in covered}
    shapes = {name: each.spec.shape for name, each in known.items()}
    return numbered({**shapes, **dict.fromkeys(BESIDE.get(case, ()), (4,)), **same})


def pieces(original: Tensors, there: Tensors) -> dict[str, list[tuple[str, int, int]]]:
    """By the name of a tensor: which rows of which other it is, one run after the other."""
    starts = {int(x.flatten()[0]): name for name, x in original.items()}
    order = sorted(starts)
    result = {}
    for name, rows in there.items():
        runs: list[tuple[str, int, int]] = []
        for row in map(int, rows):
            first = order[bisect.bisect(order, row) - 1]
            last = runs[-1] if runs else ("", 0, 0)
            if last[0] == starts[first] and last[1] + last[2] == row - first:
                runs[-1] = (last[0], last[1], last[2] + 1)
            else:
                runs.append((starts[first], row - first, 1))
        result[name] = runs
    return result


def laid_out(original: Tensors, rows: Mapping[str, Any]) -> Tensors:
    """The inverse: those tensors."""
    return {
        name: torch.cat([original[stored][first : first + count] for stored, first, count in runs])
        for name, runs in rows.items()
    }


def recorded_anew() -> dict[str, Any]:
    """By diffusers itself."""
    found: dict[str, Any] = {}
    for case, (build, convert) in CASES.items():
        with torch.device("meta"):
            model = build()
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        original = original_of(case, shapes)
        prefix = "model.diffusion_model." if convert == "convert_ldm_unet_checkpoint" else ""
        given = {prefix + name: x for name, x in original.items()}
        there = first_column(converter(convert)(given, config=dict(model.config)))
        found[case] = {"shapes": shapes, "rows": pieces(first_column(original), there)}
    with torch.device("meta"):
        small = flux(8).state_dict()
    found["flux_8"] = {"shapes": {k: tuple(v.shape) for k, v in small.items()}}
    wrapper = "conditioner.embedders.1."
    clip = numbered({wrapper + name: shape for name, shape in clip_text().items()})
    text = SimpleNamespace(config=SimpleNamespace(hidden_size=4))
    there = converter("convert_open_clip_checkpoint")(text, dict(clip), wrapper + "model.")
    found["open_clip"] = {"rows": pieces(first_column(clip), first_column(there))}
    utils = importlib.import_module("diffusers.loaders.lora_conversion_utils")
    lora = numbered(xlabs())
    there = utils._convert_xlabs_flux_lora_to_diffusers(dict(lora))
    found["xlabs"] = {"rows": pieces(first_column(lora), first_column(there))}
    whole: dict[str, Any] = json.loads(json.dumps(found))
    return whole


def recorded() -> dict[str, Any]:
    """As the file has it."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    lines = (f" {json.dumps(k)}: {json.dumps(v)}" for k, v in recorded_anew().items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
