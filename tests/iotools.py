"""Helpers of the tests of files: hostile safetensors bytes, small checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import lora_tools
from lora_tools.formats.digest import file_sha256

# Options of an export of the checkpoints below that starts neither transformers nor ONNX Runtime.
EXPORT = ["--graph", "graph", "--task", "features", "--no-verify"]


def container(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file of this header (an object, or bytes as they are) and data."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(body).to_bytes(8, "little") + body + data


def entry(dtype: str = "F32", shape: Iterable[int] = (2,), at: Iterable[int] = (0, 8)) -> Any:
    """A header's entry."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(at)}


def weights(seed: int = 0, width: int = 16, layers: int = 2) -> dict[str, torch.Tensor]:
    """A little decoder: an embedding, and per layer two linears, a bias and a norm."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(24, width, generator=noise)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        tensors[f"{layer}.q_proj.weight"] = torch.randn(width, width, generator=noise)
        tensors[f"{layer}.q_proj.bias"] = torch.randn(width, generator=noise)
        tensors[f"{layer}.up_proj.weight"] = torch.randn(2 * width, width, generator=noise)
        tensors[f"{layer}.norm.weight"] = torch.randn(width, generator=noise)
    return tensors


def moved(tensors: Mapping[str, torch.Tensor], seed: int = 1) -> dict[str, torch.Tensor]:
    """The tensors with a rank-1 change on every linear layer."""
    noise = torch.Generator().manual_seed(seed)
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            column = torch.randn(tensor.shape[0], 1, generator=noise)
            row = torch.randn(1, tensor.shape[1], generator=noise)
            result[name] = (tensor + 0.1 * column @ row).to(tensor.dtype)
    return result


def checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> Path:
    """A folder with a config, a tokenizer and the tensors in that many files."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    weight_map = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        mine = {k: v for k, v in tensors.items() if weight_map[k] == file}
        save_file(mine, folder / file, {"format": "pt"})
    write_index(folder, weight_map)
    return folder


def extracted(folder: Path) -> Path:
    """``base`` and ``tuned`` in a folder, of one layer; ``adapter``, extracted of them."""
    base = weights(layers=1)
    checkpoint(folder / "base", base)
    checkpoint(folder / "tuned", moved(base))
    lora_tools.extract(folder / "base", folder / "tuned", folder / "adapter", rank=1)
    return folder


def graph(folder: Path, source: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A folder with a graph that ``export --graph`` uses again for the checkpoint ``source``: each
    of its tensors is an output. Made by hand, which takes no tracing."""
    from onnx import TensorProto, helper

    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = [
        TensorProto(name=name, dims=tensor.shape, data_type=TensorProto.FLOAT)
        for name, tensor in tensors.items()
    ]
    nodes = [helper.make_node("Identity", [w.name], [f"{w.name}.out"]) for w in weights]
    outputs = [
        helper.make_tensor_value_info(f"{w.name}.out", TensorProto.FLOAT, w.dims) for w in weights
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "main", [], outputs, weights),
        producer_name="loratools",
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def tokenizer(folder: Path, vocabulary: int) -> None:
    """A tokenizer of the words w0, w1, …, as transformers loads it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def write_index(folder: Path, weight_map: Any) -> Path:
    """A shard index."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]], r: int = 2, **config: Any) -> Path:
    """A PEFT adapter on these modules, each given with its weight's (out, in)."""
    noise = torch.Generator().manual_seed(5)
    folder.mkdir()
    factors = {}
    for module, (rows, cols) in shapes.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(r, cols, generator=noise)
        factors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, r, generator=noise)
    save_file(factors, folder / "adapter_model.safetensors", {"format": "pt"})
    text = {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": sorted(shapes)}
    (folder / "adapter_config.json").write_text(json.dumps(text | config))
    return folder


def linear_shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The modules that ``moved`` changes, for ``adapter``."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in tensors.items()
        if name.endswith("_proj.weight")
    }


def tree(folder: Path) -> dict[str, str]:
    """Every path below a folder, hidden ones too, with the SHA-256 of each file."""
    return {
        str(path.relative_to(folder)): file_sha256(path) if path.is_file() else "a folder"
        for path in sorted(folder.rglob("*"))
    }


def is_root() -> bool:
    """Whether permissions do not hold us back."""
    return os.geteuid() == 0
