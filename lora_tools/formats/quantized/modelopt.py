"""NVFP4 as NVIDIA's ModelOpt stores it.

====================  ============================================================================
``P.weight``          U8 (out, in / 2), two E2M1 a byte, the lower four bits first
``P.weight_scale``    F8_E4M3 (out, in / 16)
``P.weight_scale_2``  F32 (): W = code · weight_scale · weight_scale_2
``P.input_scale``     F32 (), of activations, where these are quantized
====================  ============================================================================

``hf_quant_config.json``, or ``quantization_config`` in config.json, says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.packed import (
    ACTIVATIONS,
    AGAIN,
    ORIGINAL,
    Packed,
    entry_of,
    plain_dtype,
    with_activations,
)
from lora_tools.records import TensorSpec

CODES, SCALE, WHOLE = "weight", "weight_scale", "weight_scale_2"
GROUP = 16
LABEL = "NVFP4"
_METHODS = (None, "modelopt", "modelopt_fp4", "modelopt_mixed", "nvfp4")
_ALGORITHMS = (None, "NVFP4", "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION")


@dataclasses.dataclass(frozen=True)
class NVFP4(Packed):
    """A weight in NVFP4.

    Attributes:
        shared: the ``weight_scale_2`` to encode with, in common with other layers; None: its own.
    """

    shared: float | None = None


def find_nvfp4(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], file: Mapping[str, Any]
) -> dict[str, Packed]:
    """The weights that are stored so, by name; none where config.json names another scheme.

    Args:
        file: what ``FILE`` holds; {} where there is none.

    Raises:
        CheckpointError: parts are missing, of other shapes, or lie beside others that change what
            the weight is.
    """
    said = entry_of(config)
    if said.get("quant_method") not in _METHODS:
        return {}
    found, inner = {}, file.get("quantization")
    for spec in specs.values():
        module, _, leaf = spec.name.rpartition(".")
        if leaf != CODES or spec.dtype != "U8":
            continue
        scale, whole = (specs.get(f"{module}.{part}") for part in (SCALE, WHOLE))
        if whole is not None and (scale is None or scale.dtype == "F8_E4M3"):
            found[spec.name] = _weight(spec, scale, whole, plain_dtype(config))
    if found:
        for each in (said, inner if isinstance(inner, Mapping) else {}):
            _check_said(each, [name.rpartition(".")[0] for name in found])
        _check_beside(found, specs)
    return with_activations(found, specs)


def _weight(codes: TensorSpec, scale: TensorSpec | None, whole: TensorSpec, dtype: str) -> Packed:
    *lead, half = codes.shape or (0,)
    shape = (*lead, 2 * half)
    if len(shape) != 2 or not codes.numel or shape[-1] % GROUP:
        raise CheckpointError(f"{codes}: expected U8 (out, in / 2) of NVFP4; {AGAIN}")
    wanted = (*lead, shape[-1] // GROUP)
    if scale is None or scale.shape != wanted:
        found = list(scale.shape) if scale else "none"
        raise CheckpointError(
            f"{codes.name}_scale: expected F8_E4M3 {list(wanted)} beside a weight {list(shape)} of "
            f"NVFP4, found {found}; {AGAIN}"
        )
    if whole.dtype != "F32" or whole.numel != 1:
        raise CheckpointError(f"{whole}: expected one number in F32; {AGAIN}")
    parts = {CODES: codes, SCALE: scale, WHOLE: whole}
    return NVFP4(TensorSpec(codes.name, dtype, shape), parts, LABEL)


def _check_said(said: Mapping[str, Any], modules: Collection[str]) -> None:
    """Raises CheckpointError where a config says something else than the tensors."""
    layers = said.get("quantized_layers")
    for module in modules:
        mine = layers.get(module) if isinstance(layers, Mapping) else None
        mine = mine if isinstance(mine, Mapping) else said
        algorithm, size = mine.get("quant_algo"), mine.get("group_size")
        if algorithm not in _ALGORITHMS:
            raise CheckpointError(
                f"{module}.{CODES}: stored as {LABEL}, but quant_algo says {algorithm!r:.40}; "
                f"{ORIGINAL}"
            )
        if size not in (None, GROUP):
            raise CheckpointError(
                f"{module}.{CODES}: {LABEL} in groups of {size!r:.40} cannot be read; {ORIGINAL}"
            )


def _check_beside(found: Mapping[str, Packed], specs: Mapping[str, TensorSpec]) -> None:
    """Raises CheckpointError for a tensor of a weight's module that is not known: scales of inputs
    (``pre_quant_scale``), low-rank parts, …"""
    modules = {name.rpartition(".")[0] for name in found}
    known = {CODES, SCALE, WHOLE, "bias", *ACTIVATIONS}
    for name in specs:
        module, _, leaf = name.rpartition(".")
        inside = next((m for m in (module, module.rpartition(".")[0]) if m in modules), None)
        if inside is not None and (inside != module or leaf not in known):
            raise CheckpointError(
                f"{name}: is beside a weight in {LABEL}, and its effect is not known; {ORIGINAL}"
            )
