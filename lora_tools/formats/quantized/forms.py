"""The stored number formats that ``quantize`` writes, by the names of ``--scheme``.

A form says in which row of ``sources.schemes`` its weights are found again, what is stored of a
weight, and what config.json says for the loaders that it is written for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lora_tools.formats.quantized import compressed_tensors, fp8, mxfp4
from lora_tools.formats.quantized.bitsandbytes import (
    QUANT_TYPES,
    STORAGES,
    QuantizedTensor,
    QuantState,
    quantization_config,
    quantized_tensor,
)
from lora_tools.formats.quantized.loaded_in_four_bits import loader_skips, skip_entry
from lora_tools.formats.quantized.packed import PackedWeight
from lora_tools.records import TensorSpec


def _fits(spec: TensorSpec) -> str:
    return ""


@dataclasses.dataclass(frozen=True)
class Form:
    """One of them.

    Attributes:
        name: that of ``--scheme``.
        scheme: the name of its row in ``sources.schemes``.
        lay_out: (weight, whether it is a Conv1D's): what is stored of it. Raises CheckpointError.
        settings: (modules of linear layers that stay): config.json's ``quantization_config``.
        unfit: why a weight of that shape has to stay; "" where it has not.
        entry: what to list for a linear layer that stays.
        skips: whether a loader takes a module for one of those in its list.
        turns: whether Conv1D layers are written, too, whose weights are stored transposed.
        tells_all: whether every linear layer that stays is listed, whatever transformers makes of
            it, and fused experts, too: other loaders, or its own, would quantize them.
        experts: what becomes of experts that are stored one by one and that transformers fuses:
            True: they are written as linear layers are, all or none. None: so, and they must be.
            False: they stay.
        singles: the form of a checkpoint that has such experts, where loaders take another of it.
        fused: by ``model_type``, the forms of models whose own loaders take fused experts.
        only_fused: this is one of those: fused experts are written, and all else stays.
        note: what is to be known of a checkpoint with experts in it.
        parts_experts: whether transformers looks for fused experts one by one in such a checkpoint
            (``sources.four_bit_layers``).
        joins: whether the layers of one module that take the same inputs have a scale in common
            (``Scheme.shared``).
        needs_config: what the numbers stand for is said in config.json alone.
    """

    name: str
    scheme: str
    lay_out: Callable[[TensorSpec, bool], PackedWeight]
    settings: Callable[[Sequence[str]], dict[str, Any]]
    unfit: Callable[[TensorSpec], str] = _fits
    entry: Callable[[str], str] = skip_entry
    skips: Callable[[str, Collection[str]], bool] = loader_skips
    turns: bool = False
    tells_all: bool = False
    experts: bool | None = False
    singles: Form | None = None
    fused: Mapping[str, Form] = dataclasses.field(default_factory=dict)
    only_fused: bool = False
    note: str = ""
    parts_experts: bool = False
    joins: bool = False
    needs_config: bool = True


def four_bits(
    quant_type: str,
    blocksize: int = 64,
    double: bool = True,
    compute_dtype: str = "bfloat16",
    storage: str = "uint8",
) -> Form:
    """bitsandbytes' four bits, with its settings (see ``formats.quantized.bitsandbytes``)."""
    return Form(
        quant_type,
        "bitsandbytes",
        functools.partial(_four_bit_tensor, quant_type, blocksize, double, STORAGES[storage]),
        functools.partial(quantization_config, quant_type, double, compute_dtype, storage),
        turns=True,
        parts_experts=True,
        needs_config=False,
    )


def _four_bit_tensor(
    quant_type: str, blocksize: int, double: bool, storage: str, spec: TensorSpec, conv1d: bool
) -> QuantizedTensor:
    shape = spec.shape[::-1] if conv1d else spec.shape
    state = QuantState(quant_type, blocksize, spec.dtype, shape, 0.0 if double else None)
    packed = quantized_tensor(spec.name, state, storage)
    return dataclasses.replace(packed, transposed=conv1d)


def _fp8_blocks() -> Form:
    """DeepSeek's form of FP8, ``weight_scale_inv``: transformers' and vLLM's ``fp8``."""
    return Form(
        "fp8-block", "fp8", _fp8_weight, _fp8_settings, _partial_block, tells_all=True, experts=True
    )


def _fp8_weight(spec: TensorSpec, conv1d: bool) -> PackedWeight:
    down, across = (-(n // -side) for n, side in zip(spec.shape, fp8.BLOCK, strict=True))
    codes = dataclasses.replace(spec, dtype="F8_E4M3")
    scale = TensorSpec(f"{spec.name}_scale_inv", "F32", (down, across))
    return fp8.fp8_weight(codes, scale, spec.dtype, {"quantization_config": _fp8_settings(())})


def _fp8_settings(skip: Sequence[str]) -> dict[str, Any]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(skip),
        "quant_method": "fp8",
        "weight_block_size": list(fp8.BLOCK),
    }


def _partial_block(spec: TensorSpec) -> str:
    """transformers takes a block for a weight's rows over its scales' rows, and vLLM's kernels take
    whole ones where layers are split or joined."""
    high, wide = fp8.BLOCK
    if spec.shape[0] % high or spec.shape[1] % wide:
        return f"{list(spec.shape)} cannot be divided into blocks of {high} x {wide}"
    return ""


def _compressed(name: str, stored: str = "", **more: Any) -> Form:
    """One of compressed-tensors' forms. Its list of layers is of whole names, or of patterns."""
    settings = compressed_tensors.settings_for(stored or name)
    return Form(
        name,
        "compressed-tensors",
        functools.partial(_compressed_weight, settings),
        functools.partial(compressed_tensors.quantization_config, settings),
        functools.partial(compressed_tensors.why_not, settings=settings),
        _ignored,
        _is_ignored,
        tells_all=True,
        experts=True if name == "fp8-channel" else None,
        parts_experts=True,
        joins=name == "nvfp4",
        **more,
    )


def _of_gpt_oss() -> Form:
    """MXFP4 as gpt-oss's own checkpoints and their loaders have it: its experts, and no other."""
    return Form(
        "mxfp4",
        "mxfp4",
        lambda spec, _: mxfp4.mxfp4_weight(spec),
        lambda _: mxfp4.quantization_config(),
        mxfp4.why_not,
        experts=None,
        only_fused=True,
    )


# transformers' ``CompressedTensorsDequantize`` takes codes and scales of an expert for all of it.
_NO_GLOBAL_SCALE = (
    "vLLM reads experts in NVFP4; transformers 5.23 ignores their global scales, so its numbers "
    "are wrong"
)


_EXPERTS = r"re:.*\.experts(\..*)?$"


def _compressed_weight(
    settings: compressed_tensors.Settings, spec: TensorSpec, conv1d: bool
) -> PackedWeight:
    return compressed_tensors.compressed_weight(spec, settings)


def _ignored(module: str) -> str:
    return _EXPERTS if ".experts." in f"{module}." else module


def _is_ignored(module: str, ignore: Collection[str]) -> bool:
    return module in ignore


FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        *map(four_bits, QUANT_TYPES),
        _fp8_blocks(),
        _compressed("fp8-channel"),
        _compressed("nvfp4", note=_NO_GLOBAL_SCALE),
        _compressed("mxfp4", fused={"gpt_oss": _of_gpt_oss()}),
        _compressed("int8", singles=_compressed("int8", "int8-packed")),
        _compressed("int4"),
    )
}
