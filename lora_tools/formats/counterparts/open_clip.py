"""OpenCLIP's text encoder, of SD 2 and SDXL, which diffusers loads as transformers' CLIP. diffusers
0.42, ``convert_open_clip_checkpoint``. (Its two embeddings that are no modules have no pair.)"""

from __future__ import annotations

from lora_tools.formats.counterparts.family import Family, Rules, by_rules, has, qkv

_LAYER, _BLOCK = "text_model.encoder.layers.#", "model.transformer.resblocks.#"
_RULES: Rules = {
    f"{_BLOCK}.attn.in_proj_": qkv(f"{_LAYER}.self_attn", ("q_proj", "k_proj", "v_proj")),
    f"{_BLOCK}.attn.out_proj": f"{_LAYER}.self_attn.out_proj",
    f"{_BLOCK}.mlp.c_fc": f"{_LAYER}.mlp.fc1",
    f"{_BLOCK}.mlp.c_proj": f"{_LAYER}.mlp.fc2",
    f"{_BLOCK}.ln_1": f"{_LAYER}.layer_norm1",
    f"{_BLOCK}.ln_2": f"{_LAYER}.layer_norm2",
    "model.token_embedding": "text_model.embeddings.token_embedding",
    "model.ln_final": "text_model.final_layer_norm",
}
# No adapter has OpenCLIP's names, so that a model in transformers' needs no others.
OPEN_CLIP = Family(
    "OpenCLIP",
    has("model.transformer.resblocks."),
    lambda modules: False,
    by_rules(_RULES),
    lambda modules: "diffusers",
    comfyui="diffusers",
)
