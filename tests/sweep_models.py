"""Tiny random models of many architectures: two layers, a width of 32, a vocabulary of 96."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import transformers as hf

from .export_models import ARCHITECTURES as EXPORTED
from .test_loading import MOE, OTHERS, ROPE, TEXT, VIEW
from .test_vlm_names import MODELS as VLMS

Make = Callable[[], Any]


def make(kind: str, of: str, **config: Any) -> Any:
    """The model that transformers calls ``kind`` and ``of``, such as Llama, ForCausalLM."""
    return getattr(hf, kind + of)(getattr(hf, f"{kind}Config")(**config))


def rows(of: str, config: dict[str, Any], kinds: dict[str, dict[str, Any]]) -> dict[str, Make]:
    """By transformers' own name of each, with what its config has beside or instead."""
    return {
        kind: functools.partial(make, kind, of, **config | more) for kind, more in kinds.items()
    }


# In the words of GPT-2, of MPT, of BART.
OLD = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PLAIN = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
SIDES = {
    "vocab_size": 96,
    "d_model": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
} | {
    f"{side}_{of}": n
    for side in ("encoder", "decoder")
    for of, n in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
T5 = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MROPE = {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}}
SIGHT = VIEW | {"num_hidden_layers": 1}
STATE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SOUND = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (8, 8),
    "conv_stride": (2, 2),
    "conv_kernel": (3, 3),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}


def _sees(kind: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Make:
    config = {"text_config": text, "vision_config": vision, **more}
    return functools.partial(make, kind, "ForConditionalGeneration", **config)


_LLAMA = TEXT | {"model_type": "llama"}

DECODERS = {
    "Llama, tied": EXPORTED["Llama"],
    "GPT-2": EXPORTED["GPT-2"],
    "Phi-3": EXPORTED["Phi-3"],
    "Gemma-3": EXPORTED["Gemma-3"],
    "Mistral": EXPORTED["Mistral, sliding window"],
    "GPT-NeoX": OTHERS["GPT-NeoX"],
    "BLOOM": OTHERS["BLOOM"],
} | rows(
    "ForCausalLM",
    TEXT,
    {
        "Llama": {},
        "Qwen2": {},
        "Qwen3": {"head_dim": 8},
        "Gemma": {"head_dim": 8},
        "Gemma2": {"head_dim": 8},
        "Phi": {},
        "Cohere": {},
        "Cohere2": {},
        "Olmo": {},
        "Olmo2": {},
        "Olmo3": {},
        "Granite": {},
        "StableLm": {},
        "Starcoder2": {},
        "Glm": {"head_dim": 8},
        "Glm4": {"head_dim": 8},
        "SmolLM3": {},
        "Nemotron": {},
        "Exaone4": {},
        "Ernie4_5": {"head_dim": 8},
        "Helium": {"head_dim": 8},
        "Apertus": {},
        "Arcee": {},
        "SeedOss": {"head_dim": 8},
        "HunYuanDenseV1": {"head_dim": 8},
        "MiniCPM3": LATENT,
        "Persimmon": {},
        "ModernBertDecoder": {"cls_token_id": 1, "sep_token_id": 2},
        "Lfm2": {"layer_types": ["conv", "full_attention"]},
    },
)
DECODERS |= {
    "Gemma-3n": functools.partial(
        make,
        "Gemma3n",
        "ForCausalLM",
        **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
    ),
    "GPTJ": functools.partial(make, "GPTJ", "ForCausalLM", **OLD, rotary_dim=4),
    "CodeGen": functools.partial(make, "CodeGen", "ForCausalLM", **OLD, rotary_dim=4),
    "GPTBigCode": functools.partial(make, "GPTBigCode", "ForCausalLM", **OLD),
    "CTRL": functools.partial(make, "CTRL", "LMHeadModel", **OLD, dff=48),
    "GPTNeo": functools.partial(
        make,
        "GPTNeo",
        "ForCausalLM",
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "OPT": functools.partial(
        make, "OPT", "ForCausalLM", **PLAIN, ffn_dim=48, word_embed_proj_dim=32
    ),
    "Falcon": functools.partial(make, "Falcon", "ForCausalLM", **PLAIN),
    "MPT": functools.partial(
        make, "Mpt", "ForCausalLM", vocab_size=96, d_model=32, n_layers=2, n_heads=4, max_seq_len=64
    ),
    "XGLM": functools.partial(
        make,
        "XGLM",
        "ForCausalLM",
        vocab_size=96,
        d_model=32,
        num_layers=2,
        attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=64,
    ),
    "BioGPT": functools.partial(make, "BioGpt", "ForCausalLM", **PLAIN),
}
del DECODERS["Gemma-3n"]
_GEMMA3N = {
    "head_dim": 8,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
DECODERS |= {
    "Gemma-3n": functools.partial(
        hf.Gemma3nForCausalLM,
        hf.Gemma3nTextConfig(
            **TEXT, **_GEMMA3N, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0]
        ),
    ),
    "Gemma-4": functools.partial(
        hf.Gemma4ForCausalLM, hf.Gemma4TextConfig(**TEXT, **_GEMMA3N, global_head_dim=8)
    ),
}
EXPERTS = {
    name: OTHERS[name] for name in ("Qwen2-MoE", "DeepSeek-V3", "Granite-MoE", "gpt-oss")
} | {"Mixtral": EXPORTED["Mixtral"]}
EXPERTS |= rows(
    "ForCausalLM",
    MOE,
    {
        "Qwen3Moe": {"num_experts": 3, "head_dim": 8},
        "Olmoe": {"num_experts": 3},
        "Phimoe": {"num_local_experts": 3},
        "Glm4Moe": {"n_routed_experts": 4, "head_dim": 8, "first_k_dense_replace": 1},
        "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
        "DeepseekV2": LATENT | {"n_routed_experts": 4, "first_k_dense_replace": 1},
        "Dots1": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
        "FlexOlmo": {"num_experts": 3},
        "MiniMax": {"num_local_experts": 3, "head_dim": 8, "block_size": 8},
        "HunYuanMoEV1": {"num_experts": 3, "moe_topk": 2, "head_dim": 8},
        "Jamba": {
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        "Qwen3Next": LINEAR_ATTENTION
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "num_experts": 3,
            "shared_expert_intermediate_size": 24,
        },
        "GraniteMoeShared": {"num_local_experts": 3, "shared_intermediate_size": 24},
        "JetMoe": {"num_local_experts": 3, "kv_channels": 8, "num_key_value_heads": 2},
    },
)
EXPERTS |= {
    "DBRX": functools.partial(
        make,
        "Dbrx",
        "ForCausalLM",
        vocab_size=96,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 2, "moe_top_k": 1},
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
    ),
    "Llama-4": functools.partial(
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            **MOE, intermediate_size_mlp=48, num_local_experts=2, head_dim=8, moe_layers=[1]
        ),
    ),
}
STATES = rows(
    "ForCausalLM",
    STATE,
    {
        "Mamba": {},
        "FalconMamba": {},
        "Mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        "Rwkv": {"attention_hidden_size": 32, "intermediate_size": 48, "context_length": 64},
    },
) | rows(
    "ForCausalLM",
    TEXT,
    {
        "FalconH1": {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
        },
        "Bamba": {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "attn_layer_indices": [1],
            "mamba_n_groups": 1,
        },
        "RecurrentGemma": {"lru_width": 32, "block_types": ["recurrent", "attention"]},
        "GraniteMoeHybrid": {
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
        },
    },
)
SEQ2SEQ = (
    {"T5": EXPORTED["T5"]}
    | rows(
        "ForConditionalGeneration",
        SIDES,
        {
            "Bart": {},
            "MBart": {},
            "M2M100": {},
            "Pegasus": {},
            "PLBart": {},
            "Mvp": {},
            "Blenderbot": {},
            "BlenderbotSmall": {},
            "LED": {
                "attention_window": 4,
                "max_encoder_position_embeddings": 64,
                "max_decoder_position_embeddings": 64,
            },
            "BigBirdPegasus": {"attention_type": "original_full"},
            "NllbMoe": {"num_experts": 2, "expert_capacity": 8, "encoder_sparse_step": 2},
        },
    )
    | {"Marian": functools.partial(make, "Marian", "MTModel", **SIDES)}
    | rows(
        "ForConditionalGeneration",
        T5,
        {
            "MT5": {},
            "UMT5": {},
            "LongT5": {"local_radius": 4},
            "SwitchTransformers": {"num_experts": 2, "num_sparse_encoder_layers": 1},
        },
    )
    | {
        "ProphetNet": functools.partial(
            make,
            "ProphetNet",
            "ForConditionalGeneration",
            vocab_size=96,
            hidden_size=32,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            max_position_embeddings=64,
        )
    }
)
ENCODERS = {
    "BERT": EXPORTED["BERT"],
    "BERT, classifier": EXPORTED["BERT, classifier"],
    "RoBERTa": EXPORTED["RoBERTa"],
    "DistilBERT, tagger": EXPORTED["DistilBERT"],
    "DeBERTa-v2": EXPORTED["DeBERTa-v2"],
} | rows(
    "ForMaskedLM",
    PLAIN,
    {
        "Bert": {},
        "XLMRoberta": {},
        "Camembert": {},
        "Electra": {"embedding_size": 16},
        "Albert": {"embedding_size": 16},
        "MPNet": {},
        "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
        "Esm": {"mask_token_id": 3},
        "FNet": {},
        "ConvBert": {"embedding_size": 32},
        "SqueezeBert": {"embedding_size": 32},
        "RoFormer": {"embedding_size": 32},
        "Nystromformer": {},
        "BigBird": {"attention_type": "original_full"},
        "Longformer": {"attention_window": 4},
        "EuroBert": {"num_key_value_heads": 2},
    },
)
ENCODERS |= {
    "DistilBERT": functools.partial(
        make,
        "DistilBert",
        "ForMaskedLM",
        vocab_size=96,
        dim=32,
        hidden_dim=48,
        n_layers=2,
        n_heads=4,
        max_position_embeddings=64,
    ),
    "XLNet": functools.partial(
        make, "XLNet", "LMHeadModel", vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48
    ),
    "Funnel": functools.partial(
        make,
        "Funnel",
        "ForMaskedLM",
        vocab_size=96,
        block_sizes=[1, 1],
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=48,
    ),
    "DeBERTa-v2, classifier": functools.partial(
        make,
        "DebertaV2",
        "ForSequenceClassification",
        **PLAIN,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    ),
    "Llama, classifier": functools.partial(
        make, "Llama", "ForSequenceClassification", **TEXT, num_labels=3
    ),
    "Qwen2, reward": functools.partial(
        make, "Qwen2", "ForSequenceClassification", **TEXT, num_labels=1
    ),
    "Gemma-2, tagger": functools.partial(
        make, "Gemma2", "ForTokenClassification", **TEXT, head_dim=8, num_labels=5
    ),
}
SEEING = {
    name: OTHERS[name]
    for name in ("BEiT", "ViT-MAE", "DINOv2", "Swin", "SegFormer", "DETR", "CLIP", "LLaVA")
} | {"ViT": EXPORTED["ViT"], "Gemma-3, vision": OTHERS["Gemma-3, vision"]}
SEEING |= {name: VLMS[name] for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")}
SEEING |= {
    "SigLIP": functools.partial(make, "Siglip", "Model", text_config=TEXT, vision_config=VIEW),
    "Llama-3.2, vision": _sees(
        "Mllama",
        TEXT | {"cross_attention_layers": [1]},
        {
            "hidden_size": 32,
            "attention_heads": 2,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 16,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
        },
    ),
    "Qwen3.5": _sees(
        "Qwen3_5",
        TEXT
        | LINEAR_ATTENTION
        | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        {
            "depth": 1,
            "hidden_size": 32,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "patch_size": 14,
        },
    ),
    "Idefics3": _sees("Idefics3", _LLAMA, SIGHT),
    "SmolVLM": _sees("SmolVLM", _LLAMA, SIGHT),
    "Mistral-3": _sees(
        "Mistral3", TEXT | {"model_type": "mistral"}, SIGHT | {"model_type": "pixtral"}
    ),
    "InternVL": _sees(
        "InternVL",
        TEXT | {"model_type": "qwen2"},
        SIGHT | {"image_size": [16, 16], "patch_size": [4, 4]},
    ),
    "PaliGemma": _sees(
        "PaliGemma",
        TEXT | {"model_type": "gemma", "head_dim": 8},
        SIGHT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        projection_dim=32,
    ),
    "GLM-4V": _sees(
        "Glm4v",
        TEXT | MROPE,
        {
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "image_size": 28,
            "patch_size": 14,
        },
    ),
    "BLIP-2": _sees(
        "Blip2",
        {"model_type": "opt", **PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32},
        SIGHT,
        qformer_config=PLAIN | {"encoder_hidden_size": 32},
        num_query_tokens=4,
        image_token_index=90,
    ),
    "Florence-2": _sees(
        "Florence2",
        SIDES,
        {
            "embed_dim": [8] * 4,
            "num_heads": [2] * 4,
            "num_groups": [2] * 4,
            "depths": [1] * 4,
            "projection_dim": 32,
            "drop_path_rate": 0.0,
        },
    ),
}
HEARING = {"Whisper": EXPORTED["Whisper"], "wav2vec 2.0": OTHERS["wav2vec 2.0"]}
HEARING |= rows("ForCTC", SOUND, {"Wav2Vec2": {}, "Hubert": {}, "WavLM": {}})
HEARING |= {
    "Qwen2-Audio": functools.partial(
        make,
        "Qwen2Audio",
        "ForConditionalGeneration",
        text_config=TEXT | {"model_type": "qwen2"},
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
        },
    ),
    "AST": functools.partial(
        make,
        "AST",
        "ForAudioClassification",
        **{k: v for k, v in VIEW.items() if k != "image_size"},
        max_length=24,
        num_mel_bins=16,
    ),
    "Speech2Text": functools.partial(
        make,
        "Speech2Text",
        "ForConditionalGeneration",
        **{k: v for k, v in SIDES.items() if k != "max_position_embeddings"},
        input_feat_per_channel=8,
        conv_channels=16,
        max_source_positions=64,
        max_target_positions=64,
    ),
    "Moonshine": functools.partial(
        make,
        "Moonshine",
        "ForConditionalGeneration",
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=2,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        decoder_start_token_id=1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}
GROUPS = {
    "decoder": DECODERS,
    "mixture of experts": EXPERTS,
    "state space": STATES,
    "encoder–decoder": SEQ2SEQ,
    "encoder": ENCODERS,
    "vision": SEEING,
    "audio": HEARING,
}
ALL: dict[str, tuple[str, Make]] = {
    name: (group, made) for group, rows_ in GROUPS.items() for name, made in rows_.items()
}
