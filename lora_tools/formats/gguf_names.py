"""What llama.cpp calls the tensors of a model, and what its converter does to their numbers.

Each row is what ``convert_hf_to_gguf.py`` (llama.cpp, 2025) does to the architecture; the names are
those of transformers' classes, checked against ``gguf.get_tensor_name_map``. Nothing is guessed: an
architecture or a tensor without a row is refused.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from lora_tools.errors import CheckpointError

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_DENSE = {**_ATTENTION, **_MLP}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# All experts are in one tensor (experts, out, in), and have a name each in a checkpoint.
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    **_ATTENTION,
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}
# Made of the config when it was converted, and no weights: ``gguf_config`` reads them.
ROPE = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclasses.dataclass(frozen=True)
class Model:
    """One architecture.

    Attributes:
        model_type, classes: config.json's.
        block: names of a layer's modules.
        interleaved: rows of q_proj and k_proj stand with the two halves of each rotary head
            interleaved.
        norm_offset: what was added to the weights of norms.
    """

    model_type: str
    classes: str
    block: Mapping[str, str]
    interleaved: bool = False
    norm_offset: float = 0.0


MODELS: dict[str, Model] = {
    "llama": Model("llama", "LlamaForCausalLM", _DENSE, interleaved=True),
    "llama with experts": Model("mixtral", "MixtralForCausalLM", _MIXTRAL, interleaved=True),
    "smollm3": Model("smollm3", "SmolLM3ForCausalLM", _DENSE, interleaved=True),
    "qwen2": Model("qwen2", "Qwen2ForCausalLM", _DENSE),
    "qwen2moe": Model(
        "qwen2_moe", "Qwen2MoeForCausalLM", {**_ATTENTION, **_EXPERTS, **_SHARED_EXPERT}
    ),
    "qwen3": Model("qwen3", "Qwen3ForCausalLM", {**_DENSE, **_QK_NORM}),
    "qwen3moe": Model("qwen3_moe", "Qwen3MoeForCausalLM", {**_ATTENTION, **_QK_NORM, **_EXPERTS}),
    "gemma": Model("gemma", "GemmaForCausalLM", _DENSE, norm_offset=1.0),
    "gemma2": Model("gemma2", "Gemma2ForCausalLM", {**_DENSE, **_FOUR_NORMS}, norm_offset=1.0),
    "gemma3": Model(
        "gemma3_text", "Gemma3ForCausalLM", {**_DENSE, **_QK_NORM, **_FOUR_NORMS}, norm_offset=1.0
    ),
    "phi3": Model(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)")


def model_of(architecture: str, experts: bool) -> Model:
    """The row of ``general.architecture``. Raises CheckpointError where there is none.

    Args:
        experts: whether its layers have several; of Mixtral llama.cpp makes a ``llama``.
    """
    row = MODELS.get(f"{architecture} with experts" if experts else architecture)
    row = row or MODELS.get(architecture)
    if row is None:
        known = ", ".join(name for name in MODELS if " " not in name)
        raise CheckpointError(
            f"a GGUF model of the architecture {architecture!r}, for which the names and the order "
            f"of rows are not known (known: {known}); give the original checkpoint in safetensors"
        )
    return row


def plain_name(model: Model, name: str) -> str:
    """transformers' name of a tensor, with ``{}`` for the number of an expert. Raises
    CheckpointError."""
    module, _, end = name.rpartition(".")
    found = _BLOCK.fullmatch(module)
    inner = model.block.get(found[2]) if found else None
    plain = f"model.layers.{int(found[1])}.{inner}" if found and inner else _GLOBAL.get(module)
    if plain is None or end not in ("weight", "bias"):
        raise CheckpointError(
            f"{name}: unknown in a GGUF model of {model.model_type}; give the original checkpoint "
            "in safetensors"
        )
    return f"{plain}.{end}"
