"""The transformers of LTX-Video and LTX-2, Lumina-Image 2, Cosmos Predict 2 (and Anima), FLUX.3,
Ideogram 4, Krea 2, ACE-Step and MiniMax-H3. diffusers 0.42, ``convert_…_to_diffusers`` of single
files and of adapters."""

from __future__ import annotations

from collections.abc import Collection

from lora_tools.formats.counterparts.family import Family, Rules, both, by_rules, has, lacks, qkv

_CONDITIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "prompt_adaln_single": "prompt_adaln",
    "audio_prompt_adaln_single": "audio_prompt_adaln",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
_CONDITION = ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
_LTX_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn")
_LTX: Rules = {
    "patchify_proj": "proj_in",
    "audio_patchify_proj": "audio_proj_in",
    **{f"{own}.{end}": f"{name}.{end}" for own, name in _CONDITIONS.items() for end in _CONDITION},
    **{
        f"transformer_blocks.#.{attention}.{x}_norm": f"transformer_blocks.#.{attention}.norm_{x}"
        for attention in (*_LTX_ATTENTIONS, "video_to_audio_attn")
        for x in "qk"
    },
}
LTX = Family(
    "LTX-Video",
    has("patchify_proj", "transformer_blocks.0.attn1.to_q"),
    has("proj_in", "time_embed.emb.timestep_embedder", "transformer_blocks.0.attn1.to_q"),
    by_rules(_LTX),
    lambda modules: "original",
)

_CAPTION = "time_caption_embed"
_STACKS = ("layers", "context_refiner", "noise_refiner")
_LUMINA_2: Rules = {
    "cap_embedder.0": f"{_CAPTION}.caption_embedder.0",
    "cap_embedder.1": f"{_CAPTION}.caption_embedder.1",
    "t_embedder.mlp.0": f"{_CAPTION}.timestep_embedder.linear_1",
    "t_embedder.mlp.2": f"{_CAPTION}.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
    **{f"{stack}.#.attention.qkv": qkv(f"{stack}.#.attn") for stack in _STACKS},
    **{
        f"{stack}.#.{own}": name
        for stack in _STACKS
        for own, name in (
            ("attention.out", f"{stack}.#.attn.to_out.0"),
            ("attention.q_norm", f"{stack}.#.attn.norm_q"),
            ("attention.k_norm", f"{stack}.#.attn.norm_k"),
            ("adaLN_modulation.1", f"{stack}.#.norm1.linear"),
            *((f"feed_forward.w{i}", f"{stack}.#.feed_forward.linear_{i}") for i in (1, 2, 3)),
        )
    },
}
LUMINA_2 = Family(
    "Lumina-Image 2",
    both(
        has("layers.0.attention.qkv", "cap_embedder.", "layers.0.adaLN_modulation.1"),
        lacks("layers.0.adaLN_modulation.0"),  # of Z-Image
    ),
    has("layers.0.attn.to_q", f"{_CAPTION}.", "noise_refiner."),
    by_rules(_LUMINA_2, grouped=True),
    lambda modules: "original",
)

_COSMOS_2: Rules = {
    "x_embedder.proj.1": "patch_embed.proj",
    "t_embedder.1.linear_1": "time_embed.t_embedder.linear_1",
    "t_embedder.1.linear_2": "time_embed.t_embedder.linear_2",
    "t_embedding_norm": "time_embed.norm",
    "final_layer.adaln_modulation.1": "norm_out.linear_1",
    "final_layer.adaln_modulation.2": "norm_out.linear_2",
    "final_layer.linear": "proj_out",
    "blocks.#.mlp.layer1": "transformer_blocks.#.ff.net.0.proj",
    "blocks.#.mlp.layer2": "transformer_blocks.#.ff.net.2",
    **{
        f"blocks.#.adaln_modulation_{part}.{i}": f"transformer_blocks.#.norm{n}.linear_{i}"
        for n, part in enumerate(("self_attn", "cross_attn", "mlp"), 1)
        for i in (1, 2)
    },
    **{
        f"blocks.#.{own}.{short}": f"transformer_blocks.#.{theirs}.{long}"
        for own, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for short, long in (
            ("q_proj", "to_q"),
            ("k_proj", "to_k"),
            ("v_proj", "to_v"),
            ("output_proj", "to_out.0"),
            ("q_norm", "norm_q"),
            ("k_norm", "norm_k"),
        )
    },
}
COSMOS_2 = Family(
    "Cosmos Predict 2",
    has("blocks.0.self_attn.q_proj", "x_embedder.proj.1", "t_embedder.1"),
    has("transformer_blocks.0.attn1.to_q", "patch_embed.proj", "time_embed.t_embedder"),
    by_rules(_COSMOS_2),
    lambda modules: "original",
)

_FLUX_3_BLOCK = {
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "v_proj": "attn.to_v",
    "attn_out": "attn.to_out.0",
    "mlp_in": "ff.linear_in",
    "mlp_out": "ff.linear_out",
}
_MODES = ("image", "image_cond")  # those that diffusers has
_FLUX_3: Rules = {
    "txt_in": "context_embedder",
    **{f"emb_in.{mode}": f"x_embedders.{mode}" for mode in _MODES},
    **{
        f"{stage}_stream_modulations.{mode}.lin": f"{stage}_stream_modulations.{mode}.linear"
        for stage in ("early", "single")
        for mode in (*_MODES, "txt")
    },
    "time_in.in_layer": "timestep_embedder.linear_1",
    "time_in.out_layer": "timestep_embedder.linear_2",
    "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
    "ref_time_in.out_layer": "target_timestep_embedder.linear_2",
    "final_layer.image.linear": "proj_out",
    "final_layer.image.adaLN_modulation.1": "norm_out.linear",
    **{
        f"{own}.#.{part}": f"{theirs}.#.{name}"
        for own, theirs in (
            ("single_blocks", "single_transformer_blocks"),
            ("txt_mode_blocks", "txt_mode_blocks"),
            *((f"content_mode_blocks.{mode}", f"mode_blocks.{mode}") for mode in _MODES),
        )
        for part, name in _FLUX_3_BLOCK.items()
    },
}
FLUX_3 = Family(
    "FLUX.3",
    has("content_mode_blocks.", "single_blocks."),
    has("mode_blocks.", "single_transformer_blocks."),
    by_rules(_FLUX_3, ("final_layer.image.adaLN_modulation.1",)),
    lambda modules: "original",
)

_IDEOGRAM_4: Rules = {
    "layers.#.attention.qkv": qkv("layers.#.attention"),
    "layers.#.attention.o": "layers.#.attention.to_out.0",
}
IDEOGRAM_4 = Family(
    "Ideogram 4",
    has("layers.0.attention.qkv", "llm_cond_proj"),
    has("layers.0.attention.to_q", "llm_cond_proj"),
    by_rules(_IDEOGRAM_4),
    lambda modules: "original",
)

_KREA_2_ATTENTION = {"wq": "to_q", "wk": "to_k", "wv": "to_v", "wo": "to_out.0", "gate": "to_gate"}
_KREA_2: Rules = {
    "first": "img_in",
    "last.linear": "final_layer.linear",
    "tmlp.0": "time_embed.linear_1",
    "tmlp.2": "time_embed.linear_2",
    "tproj.1": "time_mod_proj",
    "txtmlp.1": "txt_in.linear_1",
    "txtmlp.3": "txt_in.linear_2",
    "txtfusion.projector": "text_fusion.projector",
    **{
        f"{own}.#.{part}": f"{theirs}.#.{name}"
        for own, theirs in (
            ("blocks", "transformer_blocks"),
            ("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks"),
            ("txtfusion.refiner_blocks", "text_fusion.refiner_blocks"),
        )
        for part, name in (
            *((f"attn.{a}", f"attn.{b}") for a, b in _KREA_2_ATTENTION.items()),
            *((f"mlp.{part}", f"ff.{part}") for part in ("gate", "up", "down")),
        )
    },
}
KREA_2 = Family(
    "Krea 2",
    has("blocks.0.attn.wq", "txtfusion."),
    has("transformer_blocks.0.attn.to_gate", "text_fusion."),
    by_rules(_KREA_2),
    lambda modules: "original",
)

_ACE_STEP: Rules = {
    f"layers.#.{attention}.{own}": f"layers.#.{attention}.{theirs}"
    for attention in ("self_attn", "cross_attn")
    for own, theirs in (
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("o_proj", "to_out.0"),
        ("q_norm", "norm_q"),
        ("k_norm", "norm_k"),
    )
}
ACE_STEP = Family(
    "ACE-Step 1.5",
    has("layers.0.cross_attn.q_proj", "condition_embedder"),
    has("layers.0.cross_attn.to_q", "condition_embedder"),
    by_rules(_ACE_STEP),
    lambda modules: "original",
)

_MINIMAX_H3: Rules = {
    "video_patch_proj": "proj_in",
    "audio_patch_proj": "audio_proj_in",
    "condition_proj": "context_embedder",
    "time_embedder.proj_in": "time_embedder.linear_1",
    "time_embedder.proj_out": "time_embedder.linear_2",
    "final_layer.norm": "norm_out.norm",
    "final_layer.adaln_proj.linear": "norm_out.linear",
    "final_layer.video_out": "proj_out",
    "final_layer.audio_out": "audio_proj_out",
    "blocks.#.adaln_proj.linear": "transformer_blocks.#.adaln_proj.linear",
    "blocks.#.norm1": "transformer_blocks.#.norm1",
    "blocks.#.norm2": "transformer_blocks.#.norm2",
    **{
        f"{own}.#.{part}": names
        for own, theirs in (
            ("blocks", "transformer_blocks"),
            ("token_refiner.blocks", "token_refiner.refiner_blocks"),
        )
        for part, names in (
            ("attn.qkv_proj", qkv(f"{theirs}.#.attn")),
            ("attn.out_proj", f"{theirs}.#.attn.to_out.0"),
            ("mlp.fc1", f"{theirs}.#.ff.net.0.proj"),
            ("mlp.fc2", f"{theirs}.#.ff.net.2"),
        )
    },
}
# SwiGLU has its gate first there, and its value first in diffusers.
_MINIMAX_H3_SWAPPED = ("blocks.#.mlp.fc1", "token_refiner.blocks.#.mlp.fc1")


def _is_minimax_h3(modules: Collection[str]) -> bool:
    own = has("video_patch_proj")(modules) or has("token_refiner.blocks.")(modules)
    return own and any(m.endswith("blocks.0.attn.qkv_proj") for m in modules)


MINIMAX_H3 = Family(
    "MiniMax-H3",
    _is_minimax_h3,
    has("transformer_blocks.0.attn.to_q", "audio_proj_in", "token_refiner."),
    # The shards of MiniMaxAI have q, k and v of the first head before those of the second; single
    # files that others published have all of q first.
    by_rules(_MINIMAX_H3, _MINIMAX_H3_SWAPPED, unordered=True),
    lambda modules: "original",
)

RECENT = (LTX, LUMINA_2, COSMOS_2, FLUX_3, IDEOGRAM_4, KREA_2, ACE_STEP, MINIMAX_H3)
