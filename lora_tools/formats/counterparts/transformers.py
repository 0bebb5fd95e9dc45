"""The transformers of SD3, Wan, Z-Image and HunyuanVideo. diffusers 0.42, ``convert_sd3_…``,
``convert_wan_…``, ``convert_z_image_…`` and ``convert_hunyuan_video_transformer_to_diffusers``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from lora_tools.formats.counterparts.family import (
    ADDED,
    FINAL,
    FINAL_SWAPPED,
    Family,
    Layout,
    Pair,
    Rules,
    both,
    by_rules,
    has,
    lacks,
    qkv,
)

_X, _C, _T = "joint_blocks.#.x_block", "joint_blocks.#.context_block", "transformer_blocks.#"
_EMBED = "time_text_embed"
_SD3: Rules = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
    "y_embedder.mlp.0": f"{_EMBED}.text_embedder.linear_1",
    "y_embedder.mlp.2": f"{_EMBED}.text_embedder.linear_2",
    f"{_X}.attn.qkv": qkv(f"{_T}.attn"),
    f"{_C}.attn.qkv": qkv(f"{_T}.attn", ADDED),
    f"{_X}.attn2.qkv": qkv(f"{_T}.attn2"),
    f"{_X}.attn.proj": f"{_T}.attn.to_out.0",
    f"{_C}.attn.proj": f"{_T}.attn.to_add_out",
    f"{_X}.attn2.proj": f"{_T}.attn2.to_out.0",
    f"{_X}.adaLN_modulation.1": f"{_T}.norm1.linear",
    f"{_C}.adaLN_modulation.1": f"{_T}.norm1_context.linear",
    f"{_X}.mlp.fc1": f"{_T}.ff.net.0.proj",
    f"{_X}.mlp.fc2": f"{_T}.ff.net.2",
    f"{_C}.mlp.fc1": f"{_T}.ff_context.net.0.proj",
    f"{_C}.mlp.fc2": f"{_T}.ff_context.net.2",
    **FINAL,
}
_sd3_pairs = by_rules(_SD3, FINAL_SWAPPED)


def _of_sd3(modules: Collection[str], layout: Layout) -> Iterator[Pair]:
    """The last block's modulation of the text is as the final layer's: a scale and a shift alone,
    which diffusers swaps."""
    last = max((int(m.split(".")[1]) for m in modules if _is_block(m)), default=-1)
    final = f"joint_blocks.{last}.context_block.adaLN_modulation.1"
    for pair in _sd3_pairs(modules, layout):
        swapped = pair.swapped or pair.original == final
        yield Pair(pair.original, pair.diffusers, swapped)


def _is_block(module: str) -> bool:
    return module.startswith(("joint_blocks.", "transformer_blocks."))


SD3 = Family(
    "Stable Diffusion 3",
    has("joint_blocks."),
    has("pos_embed.proj", "transformer_blocks.0.attn.add_q_proj"),
    _of_sd3,
    lambda modules: "original",
)

_WAN: Rules = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
    "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
    "blocks.#.ffn.2": "blocks.#.ffn.net.2",
    "blocks.#.norm3": "blocks.#.norm2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    **{
        f"blocks.#.{own}.{short}": f"blocks.#.{theirs}.{long}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for short, long in (
            ("q", "to_q"),
            ("k", "to_k"),
            ("v", "to_v"),
            ("o", "to_out.0"),
            ("k_img", "add_k_proj"),
            ("v_img", "add_v_proj"),
            ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
            ("norm_k_img", "norm_added_k"),
        )
    },
}
WAN = Family(
    "Wan",
    has("blocks.0.self_attn.q", "blocks.0.cross_attn.q"),
    has("blocks.0.attn1.to_q", "blocks.0.attn2.to_q", "blocks.0.ffn."),
    by_rules(_WAN),
    lambda modules: "original",
)

_Z_IMAGE: Rules = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{
        f"{part}.#.attention.{own}": names
        for part in ("layers", "context_refiner", "noise_refiner")
        for own, names in (
            ("qkv", qkv(f"{part}.#.attention")),
            ("out", f"{part}.#.attention.to_out.0"),
        )
    },
}
Z_IMAGE = Family(
    "Z-Image",
    # As diffusers tells it from Lumina-Image 2, whose modulation has its linear layer second.
    both(
        has("layers.0.attention.qkv", "cap_embedder.", "layers.0.adaLN_modulation.0"),
        lacks("layers.0.adaLN_modulation.1"),
    ),
    has("layers.0.attention.to_q", "all_x_embedder.2-1"),
    by_rules(_Z_IMAGE),
    lambda modules: "diffusers",
)

_TXT, _CONTEXT = "txt_in", "context_embedder"
_REFINER = f"{_TXT}.individual_token_refiner.blocks.#"
_REFINED = f"{_CONTEXT}.token_refiner.refiner_blocks.#"
_HUNYUAN: Rules = {
    f"{_TXT}.input_embedder": f"{_CONTEXT}.proj_in",
    f"{_TXT}.t_embedder.mlp.0": f"{_CONTEXT}.{_EMBED}.timestep_embedder.linear_1",
    f"{_TXT}.t_embedder.mlp.2": f"{_CONTEXT}.{_EMBED}.timestep_embedder.linear_2",
    f"{_TXT}.c_embedder.linear_1": f"{_CONTEXT}.{_EMBED}.text_embedder.linear_1",
    f"{_TXT}.c_embedder.linear_2": f"{_CONTEXT}.{_EMBED}.text_embedder.linear_2",
    f"{_REFINER}.self_attn_qkv": qkv(f"{_REFINED}.attn"),
    f"{_REFINER}.self_attn_proj": f"{_REFINED}.attn.to_out.0",
    f"{_REFINER}.mlp.fc1": f"{_REFINED}.ff.net.0.proj",
    f"{_REFINER}.mlp.fc2": f"{_REFINED}.ff.net.2",
    f"{_REFINER}.adaLN_modulation.1": f"{_REFINED}.norm_out.linear",
    "img_in.proj": "x_embedder.proj",
    "time_in.mlp.0": f"{_EMBED}.timestep_embedder.linear_1",
    "time_in.mlp.2": f"{_EMBED}.timestep_embedder.linear_2",
    "guidance_in.mlp.0": f"{_EMBED}.guidance_embedder.linear_1",
    "guidance_in.mlp.2": f"{_EMBED}.guidance_embedder.linear_2",
    "vector_in.in_layer": f"{_EMBED}.text_embedder.linear_1",
    "vector_in.out_layer": f"{_EMBED}.text_embedder.linear_2",
    "double_blocks.#.img_attn_qkv": qkv("transformer_blocks.#.attn"),
    "double_blocks.#.txt_attn_qkv": qkv("transformer_blocks.#.attn", ADDED),
    "double_blocks.#.img_attn_proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn_proj": "transformer_blocks.#.attn.to_add_out",
    "double_blocks.#.img_mod.linear": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.linear": "transformer_blocks.#.norm1_context.linear",
    "double_blocks.#.img_mlp.fc1": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.fc2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.fc1": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.fc2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.linear1": (
        *qkv("single_transformer_blocks.#.attn"),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.modulation.linear": "single_transformer_blocks.#.norm.linear",
    **FINAL,
}
# What ComfyUI calls them, where that is another name (its HunyuanVideo.process_unet_state_dict).
_BY_COMFYUI = (
    (re.compile(r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.0$"), r"\1.in_layer"),
    (re.compile(r"^(time_in|guidance_in|txt_in\.t_embedder)\.mlp\.2$"), r"\1.out_layer"),
    (re.compile(r"^(txt_in\.c_embedder)\.linear_1$"), r"\1.in_layer"),
    (re.compile(r"^(txt_in\.c_embedder)\.linear_2$"), r"\1.out_layer"),
    (re.compile(r"^(.*_attn)_(qkv|proj)$"), r"\1.\2"),
    (re.compile(r"^(.*mlp)\.fc1$"), r"\1.0"),
    (re.compile(r"^(.*mlp)\.fc2$"), r"\1.2"),
    (re.compile(r"^(.*_mod|.*\.modulation)\.linear$"), r"\1.lin"),
)


def _by_comfyui(module: str) -> str:
    """What ComfyUI calls a module of HunyuanVideo."""
    for shape, name in _BY_COMFYUI:
        if shape.fullmatch(module):
            return shape.sub(name, module)
    return module


_BY_TENCENT = {_by_comfyui(module): module for module in _HUNYUAN}


def _by_tencent(module: str) -> str:
    """The reverse."""
    shape = re.sub(r"(?<=\.)\d+(?=\.)", "#", module, count=1)
    number = re.search(r"(?<=\.)\d+(?=\.)", module)
    return _BY_TENCENT.get(shape, module).replace("#", number[0] if number else "")


HUNYUAN_VIDEO = Family(
    "HunyuanVideo",
    has("double_blocks.0.img_attn_qkv"),
    has("single_transformer_blocks.0.proj_mlp", "context_embedder.proj_in"),
    by_rules(_HUNYUAN, FINAL_SWAPPED),
    lambda modules: "original",
    respelled=_by_comfyui,
)
HUNYUAN_VIDEO_COMFYUI = Family(
    "HunyuanVideo as ComfyUI stores it",
    has("double_blocks.0.img_attn.qkv", "txt_in.individual_token_refiner."),
    lambda modules: False,
    by_rules({_by_comfyui(own): theirs for own, theirs in _HUNYUAN.items()}, FINAL_SWAPPED),
    lambda modules: "original",
    respelled=_by_tencent,
)
