"""GGUF models, written as llama.cpp's converter does, with the gguf package's own names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

Array = np.ndarray[Any, Any]
KINDS = gguf.GGMLQuantizationType
# What convert_hf_to_gguf.py writes of a config.json: field, key.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.freq_base": "rope_theta",
    "expert_used_count": "num_experts_per_tok",
}
_EXPERTS = {"block_sparse_moe": ("w1", "w3", "w2"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def interleaved(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as ``LlamaModel.permute`` of llama.cpp puts them."""
    return (
        x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
    )


def fields_of(config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The fields of an architecture, without its name."""
    found = {name: config[key] for name, key in _FIELDS.items() if config.get(key) is not None}
    return {**found, **more}


def stacked(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of a layer in one tensor each."""
    plain = {n: x for n, x in tensors.items() if ".experts." not in n}
    groups: dict[str, list[torch.Tensor]] = {}
    for i in range(len(tensors)):
        for name, x in tensors.items():
            if f".experts.{i}." in name:
                one = name.replace(f".experts.{i}.", ".experts.")
                groups.setdefault(one, []).append(x)
    return plain | {name: torch.stack(each) for name, each in groups.items()}


def gguf_tensors(
    arch: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint as a GGUF of it holds them."""
    number = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    made: dict[str, torch.Tensor] = {}
    for name, x in stacked(tensors).items():
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        if arch in ("llama", "smollm3"):
            if ".q_proj." in name:
                x = interleaved(x, config["num_attention_heads"])
            elif ".k_proj." in name:
                x = interleaved(x, config["num_key_value_heads"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        module, _, end = name.rpartition(".")
        merged = module.replace("block_sparse_moe.experts", "feed_forward.experts")
        found = names.get_name(module) or names.get_name(merged.removeprefix("model."))
        assert found, name
        made[f"{found}.{end}"] = x.squeeze() if "gate_inp_shexp" in found else x
    return made


def write(
    path: Path,
    arch: str,
    fields: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    kind: str | Callable[[str], str] = "F32",
    blocks: Mapping[str, tuple[Array, str]] | None = None,
    general: Mapping[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """A GGUF file.

    Args:
        fields: without the architecture's name; those of lists and strings, too.
        kind: of matrices, of all or by name; vectors are F32.
        blocks: tensors that are stored as these bytes, of that type.
        split: the most tensors of a file, where there are several.
    """
    options = {"split_max_tensors": split} if split else {}
    writer = gguf.GGUFWriter(path, arch, **options)
    for name, value in {f"{arch}.{k}": v for k, v in fields.items()}.items():
        _add(writer, name, value)
    for name, value in (general or {}).items():
        _add(writer, name, value)
    writer.add_token_list([f"w{i}" for i in range(32)])
    for name, x in tensors.items():
        if blocks and name in blocks:
            data, stored = blocks[name]
            writer.add_tensor(name, data, raw_dtype=KINDS[stored])
            continue
        wanted = kind if isinstance(kind, str) else kind(name)
        chosen = KINDS[wanted if x.dim() > 1 and "ffn_gate_inp" not in name else "F32"]
        data = gguf.quants.quantize(x.float().numpy(), chosen)
        writer.add_tensor(name, data, raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: Any, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


def from_folder(
    path: Path, arch: str, folder: Path, config: Mapping[str, Any], kind: Any = "F32", **more: Any
) -> Path:
    """A GGUF of a saved model; ``more``: fields, and ``write``'s options."""
    tensors = load_file(folder / "model.safetensors")
    options = {key: more.pop(key) for key in ("split", "extra", "general") if key in more}
    made = gguf_tensors(arch, tensors, config)
    made |= options.pop("extra", {})
    return write(path, arch, fields_of(config, **more), made, kind, **options)
