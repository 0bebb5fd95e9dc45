"""Names of modules as files of adapters have them, for each converter of diffusers' (0.42)
``lora_conversion_utils``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

D, M = 12, 48  # of a model's width, and of its MLP's


@dataclasses.dataclass(frozen=True)
class Case:
    """A converter, and names of modules as the files have it.

    Attributes:
        modules: → (outputs, inputs), or all dimensions of a convolution's weight.
        beside: modules that the model has besides, by which it is known.
        variants: prefix, the two factors' names, whether there is an alpha, whether names are flat.
        original: whether there is a layout of the makers to be merged into.
    """

    converter: str
    modules: Mapping[str, tuple[int, ...]]
    variants: tuple[tuple[str, str, bool, bool], ...]
    beside: tuple[str, ...] = ()
    original: bool = True


def of(rows: int, columns: int, *names: str) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, (rows, columns))


DOTTED, KOHYA = ("diffusion_model.", "AB", False, False), ("lora_unet_", "du", True, True)
BARE_KOHYA = ("lora_unet_", "du", False, True)
BOTH = (DOTTED, ("diffusion_model.", "du", True, False))
DEFAULT = ("", "default", False, False)
DOWN_UP = ("diffusion_model.", "du", False, False)
BARE, TRANSFORMER = ("", "AB", False, False), ("transformer.", "AB", False, False)
CONDITIONAL = ("conditional_transformer.", "AB", False, False)
PEFT_DOTTED = ("base_model.model.diffusion_model.", "AB", False, False)
PEFT = ("base_model.model.", "AB", False, False)
_DOUBLE = {
    **of(3 * D, D, *(f"double_blocks.{i}.{k}_attn.qkv" for i in (0, 1) for k in ("img", "txt"))),
    **of(D, D, *(f"double_blocks.{i}.{k}_attn.proj" for i in (0, 1) for k in ("img", "txt"))),
}
FLUX = {
    **_DOUBLE,
    **of(M, D, "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.0"),
    **of(D, M, "double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.2"),
    **of(6 * D, D, "double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin"),
    **of(3 * D + M, D, "single_blocks.0.linear1"),
    **of(D, D + M, "single_blocks.0.linear2"),
    **of(3 * D, D, "single_blocks.0.modulation.lin"),
}
FLUX_ENDS = {
    **of(D, 6, "img_in", "txt_in", "time_in.in_layer", "vector_in.in_layer"),
    **of(D, D, "time_in.out_layer", "vector_in.out_layer"),
    **of(D, D, "guidance_in.in_layer", "guidance_in.out_layer"),
}
FLUX_LAST = {**of(2 * D, D, "final_layer.adaLN_modulation.1"), **of(6, D, "final_layer.linear")}
FLUX_2 = {
    **_DOUBLE,
    **of(2 * M, D, "double_blocks.0.img_mlp.0", "double_blocks.0.txt_mlp.0"),
    **of(D, M, "double_blocks.0.img_mlp.2", "double_blocks.0.txt_mlp.2"),
    **of(3 * D + 2 * M, D, "single_blocks.0.linear1"),
    **of(D, D + M, "single_blocks.0.linear2"),
    **of(D, 6, "img_in", "txt_in", "time_in.in_layer"),
    **of(D, D, "time_in.out_layer"),
    **of(6, D, "final_layer.linear"),
}
# Without final_layer.adaLN_modulation.1: diffusers swaps the halves of its weight and not those of
# its lora_B. (Of HunyuanVideo's it swaps those of lora_A too; and it cuts lora_A of self_attn_qkv.)
FLUX_2_MORE = {
    **of(D, D, "guidance_in.in_layer", "guidance_in.out_layer"),
    **of(6 * D, D, "double_stream_modulation_img.lin", "double_stream_modulation_txt.lin"),
    **of(3 * D, D, "single_stream_modulation.lin"),
}
WAN = {
    **of(
        D,
        D,
        *(f"blocks.{i}.{a}_attn.{x}" for i in (0, 1) for a in ("self", "cross") for x in "qkvo"),
    ),
    **of(D, D, *(f"blocks.{i}.cross_attn.{x}_img" for i in (0, 1) for x in "kv")),
    **of(M, D, "blocks.0.ffn.0", "blocks.1.ffn.0"),
    **of(D, M, "blocks.0.ffn.2", "blocks.1.ffn.2"),
}
WAN_ENDS = {
    **of(6 * D, D, "time_projection.1"),
    **of(4, D, "head.head"),
    **of(D, D, "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
    **of(D, D, "img_emb.proj.1", "img_emb.proj.3"),
}
LUMINA_2 = {
    name: shape
    for stack in ("layers", "context_refiner", "noise_refiner")
    for name, shape in {
        **of(D + 8, D, f"{stack}.0.attention.qkv"),
        **of(D, D, f"{stack}.0.attention.out"),
        **of(M, D, f"{stack}.0.feed_forward.w1", f"{stack}.0.feed_forward.w3"),
        **of(D, M, f"{stack}.0.feed_forward.w2"),
        **({} if stack == "context_refiner" else of(4 * D, D, f"{stack}.0.adaLN_modulation.1")),
    }.items()
}
HUNYUAN = {
    **of(3 * D, D, "double_blocks.0.img_attn_qkv", "double_blocks.0.txt_attn_qkv"),
    **of(D, D, "double_blocks.0.img_attn_proj", "double_blocks.0.txt_attn_proj"),
    **of(6 * D, D, "double_blocks.0.img_mod.linear", "double_blocks.0.txt_mod.linear"),
    **of(M, D, "double_blocks.0.img_mlp.fc1", "double_blocks.0.txt_mlp.fc1"),
    **of(D, M, "double_blocks.0.img_mlp.fc2", "double_blocks.0.txt_mlp.fc2"),
    **of(3 * D + M, D, "single_blocks.0.linear1"),
    **of(D, D + M, "single_blocks.0.linear2"),
    **of(3 * D, D, "single_blocks.0.modulation.linear"),
    **of(D, 6, "txt_in.input_embedder", "vector_in.in_layer"),
    **of(D, D, "time_in.mlp.0", "guidance_in.mlp.2", "txt_in.t_embedder.mlp.0"),
    **of(D, D, "txt_in.c_embedder.linear_2"),
    **of(D, D, "txt_in.individual_token_refiner.blocks.0.self_attn_proj"),
    **of(M, D, "txt_in.individual_token_refiner.blocks.0.mlp.fc1"),
    **of(2 * D, D, "txt_in.individual_token_refiner.blocks.0.adaLN_modulation.1"),
    **of(4, D, "final_layer.linear"),
}
LTX = of(
    D,
    D,
    *(f"transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")),
)
LTX_2 = {
    **LTX,
    **of(D, D, "transformer_blocks.0.audio_to_video_attn.to_q", "audio_patchify_proj"),
    **of(D, 6, "patchify_proj", "adaln_single.emb.timestep_embedder.linear_1"),
    **of(D, D, "adaln_single.emb.timestep_embedder.linear_2", "audio_adaln_single.linear"),
    **of(6 * D, D, "adaln_single.linear", "audio_prompt_adaln_single.linear"),
    **of(D, D, "av_ca_video_scale_shift_adaln_single.linear", "prompt_adaln_single.linear"),
    **of(D, D, "av_ca_audio_scale_shift_adaln_single.emb.timestep_embedder.linear_1"),
    **of(D, D, "av_ca_a2v_gate_adaln_single.linear", "av_ca_v2a_gate_adaln_single.linear"),
}
QWEN = {
    **of(D, D, *(f"transformer_blocks.0.attn.{x}" for x in ("to_q", "add_k_proj", "to_out.0"))),
    **of(D, D, "transformer_blocks.0.attn.to_add_out", "img_in", "txt_in", "norm_out.linear"),
    **of(M, D, "transformer_blocks.0.img_mlp.net.0.proj"),
    **of(D, M, "transformer_blocks.1.txt_mlp.net.2"),
    **of(6 * D, D, "transformer_blocks.0.img_mod.1", "time_text_embed.timestep_embedder.linear_1"),
}
Z_IMAGE = {
    **of(3 * D, D, "layers.0.attention.qkv", "noise_refiner.0.attention.qkv"),
    **of(D, D, "layers.0.attention.out", "context_refiner.0.attention.out"),
    **of(M, D, "layers.0.feed_forward.w1"),
    **of(4 * D, D, "layers.0.adaLN_modulation.0"),
}
Z_IMAGE_CUT = {
    **of(D, D, *(f"layers.0.attention.to_{x}" for x in ("q", "k", "v", "out.0"))),
    **of(M, D, "layers.0.feed_forward.w1"),
}
ANIMA = {
    **of(
        D,
        D,
        *(
            f"blocks.0.{a}_attn.{x}_proj"
            for a in ("self", "cross")
            for x in ("q", "k", "v", "output")
        ),
    ),
    **of(M, D, "blocks.0.mlp.layer1"),
    **of(D, M, "blocks.0.mlp.layer2"),
    **of(D, D, "blocks.0.adaln_modulation_self_attn.1", "blocks.0.adaln_modulation_mlp.2"),
    **of(D, 6, "x_embedder.proj.1", "t_embedder.1.linear_1"),
    **of(6, D, "final_layer.linear", "final_layer.adaln_modulation.2"),
}
IDEOGRAM_4 = {
    **of(3 * D, D, "layers.0.attention.qkv", "layers.1.attention.qkv"),
    **of(D, D, "layers.0.attention.o"),
    **of(M, D, "layers.0.feed_forward.w1", "layers.0.feed_forward.w3"),
    **of(D, M, "layers.0.feed_forward.w2"),
    **of(4 * D, D, "layers.0.adaln_modulation"),
}
KREA_2 = {
    **of(D, D, *(f"blocks.0.attn.{x}" for x in ("wq", "wo", "gate"))),
    **of(4, D, "blocks.0.attn.wk", "blocks.0.attn.wv"),
    **of(M, D, "blocks.0.mlp.gate", "blocks.0.mlp.up", "txtfusion.refiner_blocks.1.mlp.up"),
    **of(D, M, "blocks.0.mlp.down"),
    **of(D, D, "txtfusion.layerwise_blocks.0.attn.wq", "tmlp.0", "tmlp.2", "txtmlp.1", "txtmlp.3"),
    **of(D, D, "first", "tproj.1", "last.linear"),
    **of(1, 6, "txtfusion.projector"),
}
ACE_STEP = of(
    D,
    D,
    *(
        f"layers.{i}.{a}.{x}_proj"
        for i in (0, 1)
        for a in ("self_attn", "cross_attn")
        for x in "qkvo"
    ),
)
FLUX_3 = {
    **of(
        D,
        D,
        *(
            f"{b}.0.{x}"
            for b in ("content_mode_blocks.image", "txt_mode_blocks", "single_blocks")
            for x in ("q_proj", "k_proj", "v_proj", "attn_out")
        ),
    ),
    **of(2 * M, D, "single_blocks.0.mlp_in", "content_mode_blocks.image.0.mlp_in"),
    **of(D, M, "single_blocks.0.mlp_out"),
}
MINIMAX_H3 = {
    **of(3 * D, D, "blocks.0.attn.qkv_proj", "token_refiner.blocks.0.attn.qkv_proj"),
    **of(D, D, "blocks.0.attn.out_proj", "blocks.0.adaln_proj.linear", "condition_proj"),
    **of(2 * M, D, "blocks.0.mlp.fc1", "token_refiner.blocks.0.mlp.fc1"),
    **of(D, M, "blocks.0.mlp.fc2"),
    **of(D, 6, "video_patch_proj", "audio_patch_proj", "time_embedder.proj_in"),
    **of(6, D, "final_layer.video_out", "final_layer.audio_out", "final_layer.adaln_proj.linear"),
}
Z_PADS = ("cap_embedder.0", "x_embedder", "all_x_embedder.2-1", "layers.0.adaLN_modulation.0")
CASES = {
    "flux": Case("_convert_kohya_flux", {**FLUX, **FLUX_ENDS}, (KOHYA, BARE_KOHYA)),
    "flux, last": Case("_convert_kohya_flux", {**FLUX, **FLUX_LAST}, (BARE_KOHYA, DOWN_UP)),
    "kontext": Case(
        "_convert_fal_kontext",
        {k: v for k, v in FLUX.items() if "blocks.1" not in k} | of(6, D, "final_layer.linear"),
        (PEFT,),
    ),
    "flux2": Case("_convert_non_diffusers_flux2", {**FLUX_2, **FLUX_2_MORE}, (DOTTED, DOWN_UP)),
    "flux2, kohya": Case(
        "_convert_kohya_flux2",
        FLUX_2,
        (KOHYA, BARE_KOHYA),
        ("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    ),
    "flux3": Case("_convert_non_diffusers_flux3", FLUX_3, (DOTTED, BARE)),
    "hunyuan": Case("_convert_hunyuan_video", HUNYUAN, (DOTTED, TRANSFORMER, BARE)),
    "lumina2": Case(
        "_convert_non_diffusers_lumina2",
        LUMINA_2,
        (DOTTED,),
        ("cap_embedder.0", "x_embedder", "time_caption_embed.caption_embedder.0"),
    ),
    "wan": Case("_convert_non_diffusers_wan", WAN, BOTH),
    "wan, ends": Case("_convert_non_diffusers_wan", {**WAN, **WAN_ENDS}, (DOTTED,)),
    "wan, musubi": Case("_convert_musubi_wan", WAN, (KOHYA,)),
    "hidream": Case(
        "_convert_non_diffusers_hidream",
        of(D, D, "double_stream_blocks.0.block.attn1.to_q", "caption_projection.0.linear"),
        (DOTTED,),
    ),
    "ltxv": Case("_convert_non_diffusers_ltxv", LTX, (DOTTED,)),
    "ltx2": Case("_convert_non_diffusers_ltx2", LTX_2, (DOTTED,)),
    "qwen": Case(
        "_convert_non_diffusers_qwen",
        QWEN,
        (*BOTH, KOHYA, BARE_KOHYA, DEFAULT, ("diffusion_model.", "AB", True, False)),
    ),
    "anima": Case("_convert_non_diffusers_anima", ANIMA, (DOTTED,)),
    "z-image": Case("_convert_non_diffusers_z_image", Z_IMAGE, (KOHYA, BARE_KOHYA), Z_PADS),
    "z-image, cut": Case(
        "_convert_non_diffusers_z_image",
        Z_IMAGE_CUT,
        (*BOTH, KOHYA, DEFAULT),
        Z_PADS,
        original=False,
    ),
    "ideogram4": Case(
        "_convert_non_diffusers_ideogram4", IDEOGRAM_4, (*BOTH, CONDITIONAL), ("llm_cond_proj",)
    ),
    "krea2": Case("_convert_non_diffusers_krea2", KREA_2, (DOTTED, PEFT_DOTTED, PEFT)),
    "ace-step": Case("_convert_non_diffusers_ace_step", ACE_STEP, (PEFT,), ("condition_embedder",)),
    "minimax": Case(
        "_convert_non_diffusers_minimax_h3", MINIMAX_H3, (*BOTH, KOHYA, BARE), original=False
    ),
}
