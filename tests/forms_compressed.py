"""Small checkpoints as compressed-tensors, ModelOpt and gpt-oss store them, and their numbers.

What compressed-tensors stores is made and read back by that package itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
    maybe_pad_tensor_for_block_quant,
)

Tensors = dict[str, torch.Tensor]
Form = Callable[[Tensors], tuple[Tensors, dict[str, Any], Tensors]]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def scheme_of(form: str, **weights: Any) -> QuantizationScheme:
    """A config group for all linear layers."""
    return QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)


def extremes(x: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest of what shares a scale, as the package's observers keep them."""
    if args.strategy == "tensor":
        return x.min()[None], x.max()[None]
    if args.strategy == "channel":
        return x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if args.strategy == "block":
        assert args.block_structure is not None
        high, wide = args.block_structure
        x = maybe_pad_tensor_for_block_quant(x, (high, wide))
        x = x.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        return x.amin((1, 3)), x.amax((1, 3))
    x = x.unflatten(-1, (-1, args.group_size))
    return x.amin(-1), x.amax(-1)


def compress(x: torch.Tensor, scheme: QuantizationScheme, scales: torch.dtype) -> Tensors:
    """What the package stores of a weight in float32, by names in its module."""
    args = scheme.weights
    assert args is not None
    narrow = x if args.scale_dtype is not None else x.to(scales)
    whole = generate_gparam(x.min(), x.max()) if args.strategy == "tensor_group" else None
    scale, zeros = calculate_qparams(*extremes(narrow, args), args, global_scale=whole)
    state = {"weight": x.clone(), "weight_scale": scale, "weight_zero_point": zeros}
    if args.symmetric:
        del state["weight_zero_point"]
    if whole is not None:
        state["weight_global_scale"] = whole
    return {n: t.data for n, t in compressor(scheme).compress(state, scheme).items()}


def decompress(state: Mapping[str, torch.Tensor], scheme: QuantizationScheme) -> torch.Tensor:
    """The weight, as the package reads it."""
    return compressor(scheme).decompress(dict(state), scheme)["weight"]  # type: ignore[no-any-return]


def compressor(scheme: QuantizationScheme) -> Any:
    assert scheme.format is not None
    return BaseCompressor.get_value_from_registry(scheme.format)


def config_of(groups: Mapping[str, QuantizationScheme], **more: Any) -> dict[str, Any]:
    """The entries of config.json that the package writes."""
    form = next(iter(groups.values())).format if len(groups) == 1 else "mixed-precision"
    whole = QuantizationConfig(
        config_groups=dict(groups), format=form, quantization_status="compressed", **more
    )
    entry = json.loads(json.dumps(whole.to_dict()))  # as it is in a file: no enumerations
    return {"dtype": "bfloat16", "quantization_config": entry}


def stored_as(schemes: Mapping[str, QuantizationScheme], **config: Any) -> Form:
    """Each linear layer by the scheme of the ending that its module's name has."""

    def make(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
        stored, plain = dict(tensors), dict(tensors)
        for name in filter(is_linear, tensors):
            module = name.removesuffix(".weight")
            scheme = next((s for end, s in schemes.items() if module.endswith(end)), None)
            if scheme is None:
                continue
            state = compress(stored.pop(name).float(), scheme, torch.bfloat16)
            plain[name] = decompress(state, scheme).bfloat16()
            stored |= {f"{module}.{part}": tensor for part, tensor in state.items()}
        groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes.values())}
        return stored, config_of(groups, **config), plain

    return make


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def one(form: str, **weights: Any) -> Form:
    """All of them by one scheme."""
    return stored_as({"": scheme_of(form, **weights)})


def mixed(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
    """Two schemes, told apart by names; caches and inputs with scales of their own."""
    eight = scheme_of("float-quantized", num_bits=8, type="float", strategy="channel")
    four = scheme_of("pack-quantized", num_bits=4, strategy="group", group_size=8)
    eight.targets, four.targets = ["re:.*q_proj$"], ["Linear"]
    made = stored_as({"q_proj": eight, "up_proj": four}, ignore=["lm_head", "re:.*router$"])
    stored, config, plain = made(tensors)
    stored["model.layers.0.k_scale"] = torch.ones(1)
    stored["model.layers.0.q_proj.input_scale"] = torch.ones(1)
    stored["model.layers.0.q_proj.input_zero_point"] = torch.zeros(1, dtype=torch.int8)
    return stored, config, plain


def unpacked_e2m1(packed: torch.Tensor) -> torch.Tensor:
    """The numbers of two codes a byte, one after the other."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return values[codes.long()]


def modelopt(tensors: Tensors) -> tuple[Tensors, dict[str, Any], Tensors]:
    """NVFP4 as ModelOpt stores it, by the definition of its numbers."""
    stored, plain = dict(tensors), dict(tensors)
    noise = torch.Generator().manual_seed(3)
    for name in filter(is_linear, tensors):
        rows, cols = tensors[name].shape
        codes = torch.randint(0, 256, (rows, cols // 2), generator=noise).to(torch.uint8)
        scale = torch.rand(rows, cols // 16, generator=noise).to(torch.float8_e4m3fn)
        whole = torch.tensor(0.037)
        stored |= {name: codes, f"{name}_scale": scale, f"{name}_scale_2": whole}
        stored[name.replace("weight", "input_scale")] = torch.tensor(0.5)
        each = (scale.float() * whole).repeat_interleave(16, 1)
        plain[name] = (unpacked_e2m1(codes) * each).bfloat16()
    entry = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    return stored, {"dtype": "bfloat16", "quantization_config": entry}, plain


FORMS: dict[str, Form] = {
    "int4 in groups": one("pack-quantized", num_bits=4, strategy="group", group_size=8),
    "int4 with zero points": one(
        "pack-quantized", num_bits=4, strategy="group", group_size=4, symmetric=False
    ),
    "int3 with zero points": one("pack-quantized", num_bits=3, strategy="channel", symmetric=False),
    "int8 packed": one("pack-quantized", num_bits=8, strategy="tensor"),
    "int8": one("int-quantized", num_bits=8, strategy="channel"),
    "int8 with zero points": one("int-quantized", num_bits=8, strategy="channel", symmetric=False),
    "naive int8": one("naive-quantized", num_bits=8, strategy="group", group_size=8),
    "fp8": one("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8 by channels": one("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8 in blocks": one(
        "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[12, 5]
    ),
    "nvfp4": one(
        "nvfp4-pack-quantized",
        num_bits=4,
        type="float",
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
    ),
    "mixed": mixed,
    "modelopt": modelopt,
}


def microscaling(form: str, bits: int) -> Form:
    """In groups of 32 with scales that are powers of two: of layers whose inputs are as many."""
    return one(
        form, num_bits=bits, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8
    )


# Of layers with a multiple of 32 inputs.
WIDE_FORMS: dict[str, Form] = {
    "mxfp4": microscaling("mxfp4-pack-quantized", 4),
    "mxfp6": microscaling("mxfp6-pack-quantized", 6),
    "mxfp8": microscaling("mxfp8-quantized", 8),
}
