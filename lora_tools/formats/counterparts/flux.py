"""FLUX.1 (and Chroma's attention, which is of the same make) and FLUX.2. diffusers 0.42,
``convert_flux_transformer_checkpoint_to_diffusers`` and ``convert_flux2_…``."""

from __future__ import annotations

from lora_tools.formats.counterparts.family import (
    ADDED,
    FINAL,
    FINAL_SWAPPED,
    Family,
    Rules,
    by_rules,
    has,
    qkv,
)

_EMBEDDINGS: Rules = {"img_in": "x_embedder", "txt_in": "context_embedder", **FINAL}
_ATTENTION: Rules = {
    "double_blocks.#.img_attn.qkv": qkv("transformer_blocks.#.attn"),
    "double_blocks.#.txt_attn.qkv": qkv("transformer_blocks.#.attn", ADDED),
    "double_blocks.#.img_attn.proj": "transformer_blocks.#.attn.to_out.0",
    "double_blocks.#.txt_attn.proj": "transformer_blocks.#.attn.to_add_out",
}
_TEXT = "time_text_embed"
_FIRST: Rules = {
    **_EMBEDDINGS,
    **_ATTENTION,
    "time_in.in_layer": f"{_TEXT}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_TEXT}.timestep_embedder.linear_2",
    "vector_in.in_layer": f"{_TEXT}.text_embedder.linear_1",
    "vector_in.out_layer": f"{_TEXT}.text_embedder.linear_2",
    "guidance_in.in_layer": f"{_TEXT}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_TEXT}.guidance_embedder.linear_2",
    "double_blocks.#.img_mod.lin": "transformer_blocks.#.norm1.linear",
    "double_blocks.#.txt_mod.lin": "transformer_blocks.#.norm1_context.linear",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.net.0.proj",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.net.2",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.net.0.proj",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.net.2",
    "single_blocks.#.linear1": (
        *qkv("single_transformer_blocks.#.attn"),
        "single_transformer_blocks.#.proj_mlp",
    ),
    "single_blocks.#.linear2": "single_transformer_blocks.#.proj_out",
    "single_blocks.#.modulation.lin": "single_transformer_blocks.#.norm.linear",
}
_GUIDANCE = "time_guidance_embed"
_SECOND: Rules = {
    **_EMBEDDINGS,
    **_ATTENTION,
    "time_in.in_layer": f"{_GUIDANCE}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_GUIDANCE}.timestep_embedder.linear_2",
    "guidance_in.in_layer": f"{_GUIDANCE}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_GUIDANCE}.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "double_blocks.#.img_mlp.0": "transformer_blocks.#.ff.linear_in",
    "double_blocks.#.img_mlp.2": "transformer_blocks.#.ff.linear_out",
    "double_blocks.#.txt_mlp.0": "transformer_blocks.#.ff_context.linear_in",
    "double_blocks.#.txt_mlp.2": "transformer_blocks.#.ff_context.linear_out",
    "single_blocks.#.linear1": "single_transformer_blocks.#.attn.to_qkv_mlp_proj",
    "single_blocks.#.linear2": "single_transformer_blocks.#.attn.to_out",
}

FLUX_2 = Family(
    "FLUX.2",
    has("double_blocks.", "double_stream_modulation_img.lin"),
    has("single_transformer_blocks.", "double_stream_modulation_img.linear"),
    by_rules(_SECOND, FINAL_SWAPPED),
    lambda modules: "original",
)
FLUX = Family(
    "FLUX",
    lambda modules: (
        any(m.endswith("img_attn.qkv") for m in modules) and not FLUX_2.is_original(modules)
    ),
    lambda modules: (
        any(m.endswith(".proj_mlp") for m in modules)
        and "context_embedder.proj_in" not in modules  # HunyuanVideo
    ),
    by_rules(_FIRST, FINAL_SWAPPED),
    lambda modules: "original",
)
