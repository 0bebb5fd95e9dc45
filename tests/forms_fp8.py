"""Small checkpoints in eight-bit floats, stored by hand as their writers do, and their numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lora_tools.formats.quantized.fp8 import FP8
from lora_tools.sources.checkpoints import open_checkpoint
from lora_tools.sources.dequantized import Dequantized
from tests.iotools import checkpoint

Tensors = dict[str, torch.Tensor]
Form = Callable[[Tensors], tuple[Tensors, dict[str, Any], Tensors]]
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu


def blocks(
    w: torch.Tensor, block: tuple[int, int], codes: torch.dtype = E4M3, power: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, scales, numbers in float32) of a matrix, one block after the other."""
    rows, cols = w.shape
    down, across = -(rows // -block[0]), -(cols // -block[1])
    coded, scales = torch.empty(rows, cols, dtype=codes), torch.empty(down, across)
    numbers = torch.empty(rows, cols)
    for i in range(down):
        for j in range(across):
            at = (
                slice(i * block[0], min(rows, (i + 1) * block[0])),
                slice(j * block[1], min(cols, (j + 1) * block[1])),
            )
            scale = w[at].float().abs().max() / torch.finfo(codes).max
            scale = torch.pow(2.0, scale.log2().ceil()) if power else scale
            scales[i, j] = scale
            largest = torch.finfo(codes).max
            coded[at] = (w[at].float() / scale).clamp(-largest, largest).to(codes)
            numbers[at] = coded[at].float() * scale
    return coded, scales, numbers


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def each(
    tensors: Tensors, config: Mapping[str, Any], store: Callable[[str, torch.Tensor], Any]
) -> tuple[Tensors, dict[str, Any], Tensors]:
    """``store`` of (name, weight) gives what is stored, and the numbers in float32."""
    stored, plain = dict(tensors), dict(tensors)
    for name in filter(is_linear, tensors):
        del stored[name]
        made, numbers = store(name, tensors[name])
        stored |= made
        plain[name] = numbers.bfloat16()
    return stored, dict(config), plain


def finegrained(
    block: tuple[int, int] | None, power: torch.dtype | None = None, ending: str = "_scale_inv"
) -> Form:
    """transformers' ``quant_method: fp8``."""
    said: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": block and list(block)}
    if power is not None:
        said["scale_fmt"] = "ue8m0"

    def form(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
        def store(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
            size = block or (w.shape[0], w.shape[1])
            codes, scales, numbers = blocks(w, size, power=power is not None)
            scales = scales if block else scales[0, 0]
            if power is not None and power != torch.float32:
                scales = scales.to(E8M0).view(power)
            key = name + ending if ending[0] == "_" else name.removesuffix(".weight") + ending
            return {name: codes, key: scales}, numbers

        return each(tensors, {"quantization_config": said}, store)

    return form


def scaled(
    config: Mapping[str, Any],
    block: tuple[int, int],
    shape: Callable[[torch.Tensor], torch.Tensor] = lambda scales: scales,
    extra: Callable[[str], Tensors] = lambda module: {},
    names: tuple[str, Mapping[str, torch.Tensor]] = (".weight_scale", {}),
    codes: torch.dtype = E4M3,
) -> Form:
    """A scale for each block (−1: all of a side), by the ending that ``names`` begins with."""

    def form(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
        def store(name: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
            rows, cols = w.shape
            high, wide = block[0] if block[0] > 0 else rows, block[1] if block[1] > 0 else cols
            coded, scales, numbers = blocks(w, (high, wide), codes)
            module = name.removesuffix(".weight")
            return {name: coded, module + names[0]: shape(scales), **extra(module)}, numbers

        stored, said, plain = each(tensors, config, store)
        return stored | names[1], said, plain

    return form


def cast(codes: torch.dtype, everything: bool = False) -> Form:
    """Eight-bit floats without any scale."""

    def form(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
        stored = {n: t.to(codes) if everything or is_linear(n) else t for n, t in tensors.items()}
        plain = {n: t.bfloat16() if t.dtype == codes else t for n, t in stored.items()}
        return stored, {}, plain

    return form


def json_bytes(**said: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


MODELOPT = {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}
FBGEMM = {"quantization_config": {"quant_method": "fbgemm_fp8"}}
VLLM = {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}


def first(scales: torch.Tensor) -> torch.Tensor:
    return scales[0, 0].clone()


def _modelopt(module: str) -> Tensors:
    extra = {f"{module}.input_scale": torch.tensor(0.5)}
    if module.endswith("q_proj"):
        extra |= {f"{module}.k_scale": torch.tensor(1.0), f"{module}.v_scale": torch.tensor(1.0)}
    return extra


def _mark(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """ComfyUI's, whose numbers mean nothing: here NaNs."""
    return {"scaled_fp8": torch.full((2,), 0x7F, dtype=torch.uint8).view(dtype)}


FORMS: dict[str, Form] = {
    "fp8 blocks": finegrained((8, 8)),
    "fp8 ragged blocks": finegrained((12, 10)),
    "fp8 blocks of 128": finegrained((128, 128)),
    "fp8 blocks, ue8m0": finegrained((8, 8), E8M0),
    "fp8 blocks, ue8m0 in bytes": finegrained((8, 8), torch.uint8),
    "fp8 blocks, ue8m0 in float32": finegrained((8, 8), torch.float32),
    "fp8 blocks, named as DeepSeek-V4's": finegrained((8, 8), E8M0, ".scale"),
    "fp8 per tensor, named as Mistral's": finegrained(None, ending=".qscale_weight"),
    "fp8 per tensor": finegrained(None),
    "fp8 static": scaled(VLLM, (-1, -1), first, _modelopt),
    "fbgemm": scaled(FBGEMM, (1, -1)),
    "fp8 channels, no config": scaled({}, (1, -1), lambda s: s[:, 0].clone()),
    "fp8 per tensor, as a vector": scaled({}, (-1, -1), lambda s: s[0].clone()),
    "modelopt": scaled(MODELOPT, (-1, -1), first, _modelopt),
    "modelopt blocks": scaled(MODELOPT, (128, 128), lambda s: s[:, None, :, None].clone()),
    "comfy": scaled({}, (-1, -1), first, lambda m: {f"{m}.scale_input": torch.ones(())},
                    (".scale_weight", _mark(E4M3))),
    "comfy e5m2": scaled({}, (-1, -1), first, names=(".scale_weight", _mark(E5M2)), codes=E5M2),
    "comfy quant": scaled({}, (-1, -1), first, lambda m: {
        f"{m}.comfy_quant": json_bytes(format="float8_e4m3fn", full_precision_matrix_mult=True),
        f"{m}.input_scale": torch.ones(()),
    }),
    "fp8": cast(E4M3),
    "fp8 e5m2": cast(E5M2),
    "fp8 everywhere": cast(E4M3, everything=True),
}  # fmt: skip


def made(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None, **meta: str) -> Path:
    """A checkpoint of these tensors and entries of config.json."""
    checkpoint(folder, {})
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", meta)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return folder


def opened(folder: Path, *args: Any, **meta: str) -> Dequantized[FP8]:
    view = open_checkpoint(made(folder, *args, **meta))
    assert isinstance(view, Dequantized)
    return view


def fp8_config(block: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    entry = {"quant_method": "fp8", "weight_block_size": block, **more}
    return {"quantization_config": entry}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
