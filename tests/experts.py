"""Experts of two layers in every form that checkpoints and adapters hold them in, all made of the
same matrices: gate above up (2 · I, H), and down (H, I), of each expert."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

E, R, ALPHA = 3, 2, 3.0
Matrices = dict[tuple[int, int, str], torch.Tensor]  # by layer, expert, "gate_up" or "down"
Products = dict[tuple[int, int, str], tuple[torch.Tensor, torch.Tensor]]  # B (out, r), A (r, in)
Tensors = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """``held``: transposed in memory; ``peft``: so says transformers, and PEFT goes by it."""

    model_type: str
    interleaved: bool = False
    held: bool = False
    peft: bool = False
    inside: str = "mlp"


PLAIN = Architecture("qwen3_moe")
MIXTRAL = Architecture("mixtral")
GPT_OSS = Architecture("gpt_oss", interleaved=True, held=True, peft=True)
LLAMA4 = Architecture("llama4_text", held=True, inside="feed_forward")


def matrices(sizes: tuple[int, int], seed: int) -> Matrices:
    h, i = sizes
    noise = torch.Generator().manual_seed(seed)
    return {
        (layer, n, name): torch.randn(shape, generator=noise)
        for layer in range(2)
        for n in range(E)
        for name, shape in (("gate_up", (2 * i, h)), ("down", (h, i)))
    }


def products(like: Matrices, seed: int) -> Products:
    noise = torch.Generator().manual_seed(seed)
    return {
        key: (
            torch.randn(m.shape[0], R, generator=noise),
            torch.randn(R, m.shape[1], generator=noise),
        )
        for key, m in like.items()
    }


def changed(base: Matrices, by: Products) -> Matrices:
    return {key: m + ALPHA / R * by[key][0] @ by[key][1] for key, m in base.items()}


def woven(rows: torch.Tensor, arch: Architecture) -> torch.Tensor:
    """Gate above up, as the architecture has the two in one matrix."""
    if not arch.interleaved:
        return rows
    return torch.stack(rows.chunk(2), 1).reshape(rows.shape)


def _one_by_one(names: tuple[str, str, str], inside: str) -> Callable[..., Tensors]:
    def make(parts: Matrices, arch: Architecture) -> Tensors:
        found = {}
        for (layer, n, name), m in parts.items():
            holder = f"model.layers.{layer}.{inside or arch.inside}.experts.{n}"
            each = m.chunk(2) if name == "gate_up" else (m,)
            for leaf, tensor in zip(
                names[:2] if name == "gate_up" else names[2:], each, strict=True
            ):
                found[f"{holder}.{leaf}"] = tensor.contiguous()
        return found

    return make


def _unsloth(parts: Matrices, arch: Architecture) -> Tensors:
    return {
        f"model.layers.{layer}.mlp.experts.{name}_projs.{n}": woven(m, arch)
        if name == "gate_up"
        else m
        for (layer, n, name), m in parts.items()
    }


ONE_BY_ONE: Mapping[str, Callable[[Matrices, Architecture], Tensors]] = {
    "qwen": _one_by_one(("gate_proj", "up_proj", "down_proj"), ""),
    "mixtral": _one_by_one(("w1", "w3", "w2"), "block_sparse_moe"),
    "unsloth": _unsloth,
}


def fused(parts: Matrices, arch: Architecture, turned: bool) -> Tensors:
    found = {}
    for layer, name in {(layer, name) for layer, _, name in parts}:
        each = [parts[layer, n, name] for n in range(E)]
        each = [woven(m, arch) for m in each] if name == "gate_up" else each
        each = [m.T for m in each] if turned else each
        found[f"model.layers.{layer}.{arch.inside}.experts.{name}_proj"] = torch.stack(each)
    return found


def stored(parts: Matrices, arch: Architecture, form: str) -> Tensors:
    """``form``: one of those one by one, "memory", or "turned": the other way about."""
    if form in ONE_BY_ONE:
        return {f"{k}.weight": v for k, v in ONE_BY_ONE[form](parts, arch).items()}
    return fused(parts, arch, arch.held != (form == "turned"))


def write_base(folder: Path, tensors: Tensors, arch: Architecture, prefix: str = "") -> Path:
    folder.mkdir()
    named = {prefix + k: v.contiguous() for k, v in tensors.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": arch.model_type}))
    return folder


def write_adapter(folder: Path, by: Products, arch: Architecture, form: str, **more: Any) -> Path:
    """``form``: one of those one by one, "peft", or "peft-0.18", which swaps in and out."""
    left, right = ({k: p[i] for k, p in by.items()} for i in (0, 1))
    config: dict[str, Any] = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, **more}
    found: Tensors = {}
    if form in ONE_BY_ONE:
        twice = {k: torch.cat((v, v)) if k[2] == "gate_up" else v for k, v in right.items()}
        lefts, rights = ONE_BY_ONE[form](left, arch), ONE_BY_ONE[form](twice, arch)
        for module, B in lefts.items():
            A = rights[module]
            found[f"{module}.lora_B.weight"] = B
            found[f"{module}.lora_A.weight"] = A[::2] if arch.interleaved and len(A) > R else A[:R]
        config["target_modules"] = sorted({m.rpartition(".")[2] for m in lefts})
    else:
        old = form == "peft-0.18"
        swapped = arch.held != (arch.peft or old)
        config["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
        config["peft_version"] = "0.18.1" if old else "0.21.2"
        for layer in range(2):
            for name, nested in (("gate_up", ".base_layer"), ("down", "")):
                B = [left[layer, n, name] for n in range(E)]
                B = [woven(b, arch) for b in B] if name == "gate_up" else B
                A = [right[layer, n, name] for n in range(E)]
                if swapped:
                    A, B = [b.T for b in B], [a.T for a in A]
                holder = f"model.layers.{layer}.{arch.inside}.experts{nested}"
                found[f"{holder}.lora_A.weight"] = torch.cat(A)
                found[f"{holder}.lora_B.weight"] = torch.stack(B, 2).reshape(len(B[0]), -1)
    folder.mkdir()
    named = {f"base_model.model.{k}": v.clone().contiguous() for k, v in found.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
