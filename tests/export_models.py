"""Tiny random models of the architectures that export is tried on: a layer or two, or in one or two
of each kind enough that some are repeated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from .models import perturb, save

_ENCODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 8}
_SHALLOW = _DECODER | {"num_hidden_layers": 2}


def _gpt2() -> Any:
    config = hf.GPT2Config(
        vocab_size=96,
        n_positions=64,
        n_embd=32,
        n_layer=5,
        n_head=4,
        n_inner=48,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.GPT2LMHeadModel(config)


def _t5() -> Any:
    config = hf.T5Config(
        vocab_size=96,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = hf.WhisperConfig(
        vocab_size=96,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=20,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config)


def _phi3() -> Any:
    return hf.Phi3ForCausalLM(
        hf.Phi3Config(**_SHALLOW, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )


def _mixtral() -> Any:
    config = hf.MixtralConfig(**_SHALLOW, num_local_experts=4, num_experts_per_tok=2)
    return hf.MixtralForCausalLM(config)


def _gemma3(layers: int = 2) -> Any:
    config = hf.Gemma3TextConfig(
        **_DECODER | {"num_hidden_layers": layers},
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        query_pre_attn_scalar=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.Gemma3ForCausalLM(config)


def _deberta(layers: int) -> Any:
    config = hf.DebertaV2Config(
        **_ENCODER | {"num_hidden_layers": layers},
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        type_vocab_size=0,
    )
    return hf.DebertaV2Model(config)


def _vit() -> Any:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=5,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=3,
    )
    return hf.ViTForImageClassification(config)


def _resnet() -> Any:
    config = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return hf.ResNetForImageClassification(config)


def _convnext() -> Any:
    config = hf.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32, num_labels=3
    )
    return hf.ConvNextForImageClassification(config)


ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "BERT": lambda: hf.BertModel(hf.BertConfig(**_ENCODER)),
    "BERT, classifier": lambda: hf.BertForSequenceClassification(
        hf.BertConfig(**_ENCODER | {"num_hidden_layers": 2})
    ),
    "RoBERTa": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**_ENCODER)),
    "DistilBERT": lambda: hf.DistilBertForTokenClassification(
        hf.DistilBertConfig(
            vocab_size=96, dim=32, hidden_dim=48, n_layers=5, n_heads=4, max_position_embeddings=64
        )
    ),
    "DeBERTa-v2": lambda: _deberta(2),
    "GPT-2": _gpt2,
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "Mistral, sliding window": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(**_SHALLOW, sliding_window=8)
    ),
    "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_SHALLOW)),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SHALLOW)),
    "Gemma-3": _gemma3,
    "Phi-3": _phi3,
    "Mixtral": _mixtral,
    "T5": _t5,
    "Whisper": _whisper,
    "ViT": _vit,
    "ResNet": _resnet,
    "ConvNeXt": _convnext,
}


def _gpt_neox() -> Any:
    config = hf.GPTNeoXConfig(
        **_ENCODER | {"num_hidden_layers": 1}, rotary_pct=0.5, bos_token_id=1, eos_token_id=2
    )
    return hf.GPTNeoXForCausalLM(config)


def _falcon() -> Any:
    config = hf.FalconConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        multi_query=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return hf.FalconForCausalLM(config)


def _deepseek() -> Any:
    config = hf.DeepseekV3Config(
        **_ENCODER | {"num_hidden_layers": 1, "num_key_value_heads": 4},
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=0,
    )
    return hf.DeepseekV3ForCausalLM(config)


def _gpt_oss() -> Any:
    config = hf.GptOssConfig(
        **_SHALLOW,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        eos_token_id=2,
        pad_token_id=0,
    )
    return hf.GptOssForCausalLM(config)


# Decoders whose attention is of a kind of its own: what of it is fused is right.
FAMILIES: dict[str, Callable[[], Any]] = {
    "Gemma-2, softcap": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **_SHALLOW,
            sliding_window=8,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
        )
    ),
    "Phi, partial rotary": lambda: hf.PhiForCausalLM(
        hf.PhiConfig(
            **_ENCODER | {"num_hidden_layers": 1, "num_key_value_heads": 2},
            partial_rotary_factor=0.5,
        )
    ),
    "GPT-NeoX": _gpt_neox,
    "Falcon, one key": _falcon,
    "gpt-oss, sinks": _gpt_oss,
    "DeepSeek-V3": _deepseek,
    "Bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    ),
}


# Whose layers repeat in ways of their own: two by two, with constants of each layer's, and with an
# output that is the graph's.
REPEATING: dict[str, Callable[[], Any]] = {
    "Gemma-3 of eight layers": lambda: _gemma3(8),
    "DeBERTa-v2 of five layers": lambda: _deberta(5),
    "BERT": ARCHITECTURES["BERT"],
}


ALL = ARCHITECTURES | REPEATING | FAMILIES


def one_layer(family: str, folder: Path, **fields: Any) -> Path:
    """A decoder of that family with a single layer, where its depth does not matter."""
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(**_DECODER | {"num_hidden_layers": 1} | fields)
    model = getattr(hf, f"{family}ForCausalLM")(config)
    perturb(model, 0.1, 0)
    return save(model.eval(), folder)


def make(name: str, folder: Path, seed: int = 0) -> Path:
    """The model of that architecture, every parameter random, saved to a folder."""
    torch.manual_seed(seed)
    model = ALL[name]()
    perturb(model, 0.1, seed)
    return save(model.eval(), folder)
