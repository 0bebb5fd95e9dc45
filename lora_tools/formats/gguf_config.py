"""config.json out of the fields of a GGUF model.

transformers' own loader (5.23) has most of this table, too, but leaves out what changes results:
the size of Qwen3's heads, soft caps, every scaling of positions. What is not known for certain here
makes ``Unsure``: no config.json is better than one that is nearly right.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lora_tools.formats.gguf_names import Model
from lora_tools.records import TensorSpec

_FIELDS = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_KNOWN = {
    *_FIELDS.values(),
    "vocab_size",
    "tensor_data_layout",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.freq_base",
    "rope.dimension_count",
    *(f"rope.scaling.{x}" for x in ("type", "factor", "original_context_length", "finetuned")),
}
_SIZES = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_SOFT_CAPS = {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_KNOWN_OF = {
    "mixtral": _SIZES,
    "qwen2_moe": _SIZES | {"expert_shared_feed_forward_length"},
    "qwen3_moe": _SIZES,
    "gemma2": _SOFT_CAPS,
    "gemma3_text": _SOFT_CAPS | {"rope.freq_base_swa"},
    "phi3": {"attention.sliding_window", "rope.scaling.attn_factor"},
}
_NARROW = ("qwen2", "qwen2_moe", "phi3", "smollm3")  # whose heads are hidden / heads wide
# llama.cpp knows these two by their depth: their scores are scaled by hidden / heads.
_DEEPEST = {"gemma2": 46, "gemma3_text": 62}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


class Unsure(Exception):
    """The fields do not say for certain what config.json has to."""


class Fields:
    """The fields of one architecture, without its name before them. Raises Unsure where one is
    missing, or no number where one is wanted."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = fields
        self.architecture = str(fields.get("general.architecture", ""))

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or the default."""
        return self._fields.get(f"{self.architecture}.{name}", default)

    def number(self, name: str, default: float | None = None) -> Any:
        """A field that is one number."""
        value = self.get(name, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            [value] = set(value)  # one for each layer, all the same
        if type(value) not in (int, float) or not math.isfinite(value):
            raise Unsure(f"{self.architecture}.{name} is {value!r}, but must be a number")
        return value if type(value) is int else _short(value)

    def named(self, start: str) -> list[str]:
        """Names of fields, without that start."""
        start = f"{self.architecture}.{start}"
        return [name.removeprefix(start) for name in self._fields if name.startswith(start)]

    def token(self, name: str) -> Any:
        """A field of the tokenizer."""
        return self._fields.get(name)


def _short(value: float) -> float:
    """The number of fewest digits that a float32 holds as that: 1e-05 for 9.999999747378752e-06."""
    import struct

    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def config_of(
    fields: Fields,
    model: Model,
    specs: Mapping[str, TensorSpec],
    rope: Mapping[str, Sequence[float]],
    dtype: str,
) -> dict[str, Any]:
    """config.json.

    Args:
        specs: the plain tensors.
        rope: the numbers of those of ``gguf_names.ROPE`` that there are.
        dtype: torch's name of that of the weights.

    Raises:
        Unsure: the fields do not say enough.
    """
    kind, embedding = model.model_type, specs.get("model.embed_tokens.weight")
    unknown = [name for name in fields.named("") if name not in _KNOWN | _KNOWN_OF.get(kind, set())]
    if unknown:
        raise Unsure(f"the field {fields.architecture}.{unknown[0]} is unknown")
    config: dict[str, Any] = {"architectures": [model.classes], "model_type": kind}
    config |= {key: fields.number(name) for key, name in _FIELDS.items()}
    heads, width = config["num_attention_heads"], config["hidden_size"]
    config["num_key_value_heads"] = fields.number("attention.head_count_kv", heads)
    if not (heads > 0 and embedding is not None and embedding.shape[1:] == (width,)):
        raise Unsure("its heads, embedding and width do not fit")
    head = fields.number("attention.key_length", width // heads)
    if fields.number("attention.value_length", head) != head:
        raise Unsure("heads of keys and of values differ in size")
    if kind not in _NARROW:
        config["head_dim"] = head
    elif head * heads != width:
        raise Unsure(f"heads of {head} do not fit a {kind} model")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in specs
    config["rope_theta"] = float(fields.number("rope.freq_base", 10000.0))
    scaling = _scaling(fields, kind, config["rope_theta"], head, rope)
    if scaling:
        config["rope_scaling"] = scaling
    config |= _biases(kind, specs)
    config |= _OWN[kind](fields, config, head) if kind in _OWN else {}
    config |= {key: fields.token(name) for key, name in _TOKENS.items()}
    return {**config, "torch_dtype": dtype}


def _scaling(
    fields: Fields, kind: str, theta: float, head: int, rope: Mapping[str, Sequence[float]]
) -> dict[str, Any] | None:
    """``rope_scaling``, where positions are scaled."""
    said, factor = fields.get("rope.scaling.type", "none"), fields.get("rope.scaling.factor")
    rotary = fields.number("rope.dimension_count", head)
    if rotary != head and kind != "phi3":
        raise Unsure(f"only {rotary} of {head} numbers of a head are rotated")
    if kind == "phi3":
        return _long_rope(fields, rope)
    if "rope_freqs.weight" in rope:
        return _llama3(theta, head, rope["rope_freqs.weight"])
    if said == "none":
        return None
    if said == "linear" and factor:
        return {"rope_type": "linear", "factor": fields.number("rope.scaling.factor")}
    if said == "yarn" and factor:
        return {
            "rope_type": "yarn",
            "factor": fields.number("rope.scaling.factor"),
            "original_max_position_embeddings": fields.number(
                "rope.scaling.original_context_length"
            ),
        }
    raise Unsure(f"positions are scaled by {said!r}")


def _llama3(theta: float, head: int, factors: Sequence[float]) -> dict[str, Any]:
    """Llama 3's, where the factors are those that its constants make."""
    most = _short(max(factors, default=0.0))
    found = {"rope_type": "llama3", "factor": most, **_LLAMA3}
    fits = (head + 1) // 2 == len(factors)  # a head of 2⁶⁰ is made of no file
    wanted = llama3_factors(theta, head, most) if fits else []
    if not fits or not all(
        math.isclose(a, b, rel_tol=1e-4) for a, b in zip(wanted, factors, strict=True)
    ):
        raise Unsure("rope_freqs.weight is not made as Llama 3's is")
    return {**found, "original_max_position_embeddings": _LLAMA3_CONTEXT}


def llama3_factors(theta: float, head: int, factor: float) -> list[float]:
    """What Llama 3 divides its frequencies by (``rope_type: llama3`` of transformers), with its
    constants: (head / 2)."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    made = []
    for i in range(0, head, 2):
        turns = _LLAMA3_CONTEXT / (2 * math.pi * theta ** (i / head))
        if turns < low:
            made.append(factor)
        elif turns > high:
            made.append(1.0)
        else:
            smooth = (turns - low) / (high - low)
            made.append(1 / ((1 - smooth) / factor + smooth))
    return made


def _long_rope(fields: Fields, rope: Mapping[str, Sequence[float]]) -> dict[str, Any] | None:
    long, short = (rope.get(f"rope_factors_{which}.weight") for which in ("long", "short"))
    if not (long and short):
        return None
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "long_factor": [_short(x) for x in long],
        "short_factor": [_short(x) for x in short],
    }


def _biases(kind: str, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """Which layers have biases, where the class does not say."""
    there = {name.split(".", 3)[-1] for name in specs if name.endswith(".bias")}
    own = {f"self_attn.{x}_proj.bias" for x in "qkv"} if kind.startswith("qwen2") else set()
    attention = {f"self_attn.{x}_proj.bias" for x in "qkvo"}
    if own and there == own:
        return {}
    if there == attention and kind in ("llama", "qwen3", "qwen3_moe"):
        return {"attention_bias": True}
    if there or own:
        raise Unsure(f"its biases are not a {kind} model's: {', '.join(sorted(there)) or 'none'}")
    return {}


def _gemma(fields: Fields, config: Mapping[str, Any], head: int) -> dict[str, Any]:
    """Of Gemma 2 and 3."""
    kind = config["model_type"]
    deepest = config["num_hidden_layers"] == _DEEPEST[kind]
    scalar = config["hidden_size"] // config["num_attention_heads"] if deepest else head
    found = {
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "sliding_window": fields.number(
            "attention.sliding_window", 4096 if kind == "gemma2" else None
        ),
    }
    if kind == "gemma3_text":
        found["rope_local_base_freq"] = float(fields.number("rope.freq_base_swa", 10000.0))
    return found


def _phi3(fields: Fields, config: Mapping[str, Any], head: int) -> dict[str, Any]:
    return {
        "sliding_window": fields.get("attention.sliding_window") or None,
        "original_max_position_embeddings": fields.number(
            "rope.scaling.original_context_length", config["max_position_embeddings"]
        ),
        "partial_rotary_factor": fields.number("rope.dimension_count", head) / head,
    }


def _qwen2_moe(fields: Fields, config: Mapping[str, Any], head: int) -> dict[str, Any]:
    return {
        **_experts(fields, "num_experts"),
        "moe_intermediate_size": fields.number("expert_feed_forward_length"),
        "shared_expert_intermediate_size": fields.number("expert_shared_feed_forward_length"),
        "norm_topk_prob": False,
    }


def _qwen3_moe(fields: Fields, config: Mapping[str, Any], head: int) -> dict[str, Any]:
    return {
        **_experts(fields, "num_experts"),
        "moe_intermediate_size": fields.number("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _mixtral(fields: Fields, config: Mapping[str, Any], head: int) -> dict[str, Any]:
    return _experts(fields, "num_local_experts")


def _experts(fields: Fields, name: str) -> dict[str, Any]:
    return {
        name: fields.number("expert_count"),
        "num_experts_per_tok": fields.number("expert_used_count"),
    }


_OWN = {
    "gemma2": _gemma,
    "gemma3_text": _gemma,
    "phi3": _phi3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
}
