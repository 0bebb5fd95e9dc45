"""Fused experts in MXFP4, as gpt-oss's checkpoints hold them and transformers loads them.

``…experts.gate_up_proj`` and ``…experts.down_proj``, (E, in, out) where they are plain, are

=============  ===================================================================================
``N_blocks``   U8 (E, out, in / 32, 16), two E2M1 a byte, the lower four bits first
``N_scales``   U8 (E, out, in / 32), E8M0: 2^(scale − 127) of 32 numbers
=============  ===================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.packed import AGAIN, Packed, entry_of, plain_dtype
from lora_tools.records import TensorSpec

BLOCKS, SCALES = "blocks", "scales"
GROUP = 32
LABEL = "MXFP4"
_EXPERTS = re.compile(r"(.+\.)?experts\.(gate_up|down)_proj")
_POWERS = ("U8", "F8_E8M0")


def find_mxfp4(specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> dict[str, Packed]:
    """Experts that are stored so, by their plain names; none where config.json names another
    scheme.

    Raises:
        CheckpointError: blocks without scales or the other way round, or shapes that do not fit.
    """
    if entry_of(config).get("quant_method") not in (None, "mxfp4"):
        return {}
    found = {}
    for spec in specs.values():
        name, _, part = spec.name.rpartition("_")
        if part in (BLOCKS, SCALES) and spec.dtype in _POWERS and _EXPERTS.fullmatch(name):
            parts = {each: specs.get(f"{name}_{each}") for each in (BLOCKS, SCALES)}
            found[name] = _weight(name, plain_dtype(config), parts)
    return found


def _weight(name: str, dtype: str, parts: Mapping[str, TensorSpec | None]) -> Packed:
    blocks, scales = parts[BLOCKS], parts[SCALES]
    if blocks is None or scales is None:
        missing = SCALES if scales is None else BLOCKS
        raise CheckpointError(
            f"{name}_{missing}: is missing beside the other part of {name} in MXFP4; is the "
            "download complete?"
        )
    shape = blocks.shape
    if blocks.dtype != "U8" or len(shape) != 4 or shape[3] != GROUP // 2 or not blocks.numel:
        raise CheckpointError(
            f"{blocks}: expected U8 (experts, out, groups, {GROUP // 2}) of MXFP4; {AGAIN}"
        )
    if scales.dtype not in _POWERS or scales.shape != shape[:3]:
        raise CheckpointError(
            f"{scales}: expected U8 {list(shape[:3])} beside {blocks.name} {list(shape)}; {AGAIN}"
        )
    plain = TensorSpec(name, dtype, (shape[0], shape[2] * GROUP, shape[1]))
    return Packed(plain, {BLOCKS: blocks, SCALES: scales}, LABEL)


def why_not(plain: TensorSpec) -> str:
    """Why a tensor cannot be stored so, in a few words; "" where it can."""
    if not _EXPERTS.fullmatch(plain.name) or len(plain.shape) != 3 or not plain.is_float:
        return "no fused experts"
    if plain.shape[1] % GROUP or not plain.numel:
        return f"{plain.shape[1]} inputs are not a multiple of {GROUP}"
    return ""


def mxfp4_weight(plain: TensorSpec) -> Packed:
    """Fused experts with the tensors that will be stored of them (see ``why_not``)."""
    experts, inputs, outputs = plain.shape
    shape = (experts, outputs, inputs // GROUP)
    blocks = TensorSpec(f"{plain.name}_{BLOCKS}", "U8", (*shape, GROUP // 2))
    scales = TensorSpec(f"{plain.name}_{SCALES}", "U8", shape)
    return Packed(plain, {BLOCKS: blocks, SCALES: scales}, LABEL)


def quantization_config() -> dict[str, Any]:
    """The entry ``quantization_config`` of config.json, as gpt-oss's own has it: all but its
    experts is plain."""
    plain = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens")
    return {"modules_to_not_convert": [*plain, "lm_head"], "quant_method": "mxfp4"}
