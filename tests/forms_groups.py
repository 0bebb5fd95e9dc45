"""Small checkpoints as GPTQ, AWQ, bitsandbytes (int8) and MLX store them: packed here number by
number, from the formats' descriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]
Form = Callable[[Tensors], tuple[Tensors, dict[str, Any], Tensors]]
# A linear layer: (module, its plain weight) → its stored tensors, and what they stand for in
# float32.
Layer = Callable[[str, torch.Tensor], tuple[Tensors, torch.Tensor]]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, n) whole numbers → (rows, ⌈n · bits / 32⌉) int32: each row as one long number."""
    packed = []
    for row in codes.tolist():
        number = sum(int(code) << (bits * i) for i, code in enumerate(row))
        count = -(len(row) * bits // -32)
        packed.append(np.frombuffer(number.to_bytes(4 * count, "little"), "<i4"))
    return torch.from_numpy(np.stack(packed))


def gptq_layer(
    bits: int = 4, group: int = 8, *, order: bool = False, v2: bool = False, index: bool = True
) -> Layer:
    """Zero points of every value that can be stored; ``order``: groups of inputs that do not lie
    side by side; without ``index``, no g_idx."""

    def layer(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = w.shape
        noise = torch.Generator().manual_seed(out * inputs + bits)
        size = inputs if group == -1 else group
        g_idx = torch.arange(inputs) // size
        if order:
            g_idx = g_idx[torch.randperm(inputs, generator=noise)]
        groups = int(g_idx.max()) + 1
        zeros = torch.randint(0 if v2 else 1, 2**bits, (groups, out), generator=noise)
        scales = (0.01 + torch.rand(groups, out, generator=noise)).half()
        steps = w.T / scales.float()[g_idx] + zeros[g_idx]
        codes = steps.round().clamp(0, 2**bits - 1).to(torch.int64)
        stored = {
            f"{module}.qweight": words(codes.T, bits).T.contiguous(),
            f"{module}.qzeros": words(zeros if v2 else zeros - 1, bits),
            f"{module}.scales": scales,
        }
        if index:
            stored[f"{module}.g_idx"] = g_idx.to(torch.int32)
        return stored, ((codes - zeros[g_idx]).float() * scales.float()[g_idx]).T.contiguous()

    return layer


def awq_layer(group: int = 8, symmetric: bool = False) -> Layer:
    def layer(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = w.shape
        noise = torch.Generator().manual_seed(out * inputs)
        size = inputs if group == -1 else group
        each = torch.arange(inputs) // size
        zeros = torch.randint(0, 16, (inputs // size, out), generator=noise)
        zeros = torch.full_like(zeros, 8) if symmetric else zeros
        scales = (0.01 + torch.rand(zeros.shape, generator=noise)).half()
        codes = (w.T / scales.float()[each] + zeros[each]).round().clamp(0, 15).to(torch.int64)
        at = [8 * (i // 8) + AWQ_ORDER[i % 8] for i in range(out)]
        stored = {
            f"{module}.qweight": words(codes[:, at], 4),
            f"{module}.qzeros": words(zeros[:, at], 4),
            f"{module}.scales": scales,
        }
        return stored, ((codes - zeros[each]).float() * scales.float()[each]).T.contiguous()

    return layer


def int8_layer(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    absmax = w.half().abs().amax(1).float()
    codes = (w.half() * (127 / absmax[:, None])).round().to(torch.int8)
    stored = {
        f"{module}.weight": codes,
        f"{module}.SCB": absmax,
        f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return stored, codes * absmax[:, None] * 7.874015718698502e-3


def mlx_layer(bits: int = 4, group: int = 16, dtype: torch.dtype = torch.bfloat16) -> Layer:
    def layer(module: str, w: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        parts = w.float().reshape(-1, group)
        low, high = parts.amin(1, keepdim=True), parts.amax(1, keepdim=True)
        scales, biases = ((high - low) / (2**bits - 1)).to(dtype), low.to(dtype)
        steps = (parts - biases.float()) / scales.float()
        codes = steps.round().clamp(0, 2**bits - 1)
        plain = codes * scales.float() + biases.float()
        packed = words(codes.reshape(-1, w.shape[-1]).to(torch.int64), bits).view(torch.uint32)
        shape = (*w.shape[:-1], w.shape[-1] // group)
        stored = {
            f"{module}.weight": packed.reshape(*w.shape[:-1], -1),
            f"{module}.scales": scales.reshape(shape),
            f"{module}.biases": biases.reshape(shape),
        }
        return stored, plain.reshape(w.shape)

    return layer


def form(
    layer: Layer, config: dict[str, Any], dtype: torch.dtype, embeddings: bool = False
) -> Form:
    """A checkpoint whose linear layers (and ``embeddings``) are stored so."""

    def made(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
        stored, plain = dict(tensors), dict(tensors)
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") or (embeddings and "embed_tokens" in name):
                parts, numbers = layer(name.removesuffix(".weight"), tensor.float())
                del stored[name]
                stored |= parts
                plain[name] = numbers.to(dtype)
        return stored, config, plain

    return made


def gptq_config(bits: int = 4, group: int = 8, **more: Any) -> dict[str, Any]:
    entry = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, **more}
    return {"quantization_config": entry, "torch_dtype": "float16"}


AWQ_CONFIG: dict[str, Any] = {
    "quantization_config": {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 8,
        "version": "gemm",
        "zero_point": True,
    },
    "torch_dtype": "float16",
}
INT8_CONFIG: dict[str, Any] = {
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torch_dtype": "bfloat16",
}
MLX_CONFIG: dict[str, Any] = {"quantization": {"group_size": 16, "bits": 4}}
V2 = {"checkpoint_format": "gptq_v2"}
F16, BF16 = torch.float16, torch.bfloat16

FORMS: dict[str, Form] = {
    "gptq": form(gptq_layer(), gptq_config(), F16),
    "gptq of 8 bits, act-order": form(
        gptq_layer(8, order=True), gptq_config(8, desc_act=True), F16
    ),
    "gptq v2 of 2 bits, no groups": form(gptq_layer(2, -1, v2=True), gptq_config(2, -1, **V2), F16),
    "gptq without g_idx": form(gptq_layer(index=False), gptq_config(), F16),
    "awq": form(awq_layer(), AWQ_CONFIG, F16),
    "int8": form(int8_layer, INT8_CONFIG, BF16),
    "mlx": form(mlx_layer(), MLX_CONFIG, BF16, embeddings=True),
}
