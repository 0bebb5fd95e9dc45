"""FP8 as ComfyUI's files have it: one scale a weight, and a mark.

=======================================  =======================================================
``P.weight``                             F8_E4M3 or F8_E5M2
``P.scale_weight``, ``P.scale_input``    F32 scalars, of files with a tensor ``scaled_fp8``, whose
                                         dtype is the codes' and whose numbers mean nothing
``P.weight_scale``, ``P.input_scale``    F32 scalars, of newer files, where
``P.comfy_quant``                        U8, JSON with ``format``; or one text for all layers,
                                         ``_quantization_metadata`` of the file's metadata
=======================================  =======================================================

W = code · scale; eight-bit floats without a scale are numbers: where a layer of a file with scales
has none, ComfyUI's ``scaled_fp8_ops`` keeps the parameter that it made, a 1. What files of other
formats hold (NVFP4 and MXFP8 with scales in a kernel's order, int8, rotated weights) is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.quantized.fp8 import FP8, fp8_weight, is_codes, refuse_orphans, scale_of
from lora_tools.formats.quantized.packed import (
    ORIGINAL,
    entry_of,
    plain_dtype,
    put_aside,
    with_activations,
)
from lora_tools.formats.safetensors_file import strict_json
from lora_tools.records import TensorSpec

METADATA = "_quantization_metadata"
MARK, LAYER = "scaled_fp8", "comfy_quant"
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_HARMLESS = {"format", "full_precision_matrix_mult", "orig_dtype"}  # W does not depend on them
_LONGEST = 1 << 16  # bytes of a layer's JSON


def shows(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> bool:
    """Whether a checkpoint bears one of ComfyUI's marks."""
    return METADATA in metadata or any(
        name.rpartition(".")[2] in (MARK, LAYER, "scale_weight") for name in specs
    )


def find_comfy(
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], memoryview],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> dict[str, FP8]:
    """Every weight of eight-bit floats of a file of ComfyUI's, by name; none where it bears no
    mark, or holds a format that is not read.

    Args:
        read: a tensor's bytes; asked for the layers' JSON only.

    Raises:
        CheckpointError: a mark is not what is known here, a scale is missing or left over, or
            it does not fit its weight.
    """
    if entry_of(config) or not shows(specs, metadata):
        return {}
    marks = [spec for spec in specs.values() if spec.name.rpartition(".")[2] in (MARK, LAYER)]
    said = _layers(marks, read, metadata)
    if any(text.get("format") not in FORMATS for text in said.values()):
        return {}
    dtype, found = plain_dtype(config), {}
    for spec in specs.values():
        if is_codes(spec, specs):
            found[spec.name] = fp8_weight(spec, scale_of(spec, specs, config), dtype, config)
    _check(said, found, specs)
    found = with_activations(found, specs)
    for mark in marks if found else ():
        weight = mark.name.removesuffix(LAYER) + "weight"
        owner = weight if weight in found else next(iter(found))
        found[owner] = put_aside(found[owner], mark)
    refuse_orphans(found, specs)
    return found


def _layers(
    marks: list[TensorSpec], read: Callable[[str], memoryview], metadata: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """What is said of each layer, by its module's name. Raises CheckpointError."""
    said: dict[str, Any] = {}
    if METADATA in metadata:
        text = strict_json(metadata[METADATA])
        layers = text.get("layers") if isinstance(text, dict) else None
        if not isinstance(layers, dict):
            raise CheckpointError(f"{METADATA} in the file's metadata does not name layers")
        said.update(layers)
    for mark in marks:
        if mark.name.endswith(MARK):
            continue
        if mark.dtype != "U8" or mark.numel > _LONGEST:
            raise CheckpointError(f"{mark}: bytes of JSON are expected")
        try:
            text = strict_json(bytes(read(mark.name)))
        except CheckpointError as error:
            raise CheckpointError(f"{mark.name}: {error}") from None
        said[mark.name.removesuffix(LAYER).removesuffix(".")] = text
    for layer, text in said.items():
        if not isinstance(text, dict):
            raise CheckpointError(f"{layer}: a format is expected of {LAYER}, found {text!r:.100}")
    return said


def _check(
    said: Mapping[str, Mapping[str, Any]], found: Mapping[str, FP8], specs: Mapping[str, TensorSpec]
) -> None:
    """Raises CheckpointError where what is said of a layer is not what lies there."""
    for layer, text in said.items():
        name = f"{layer}.weight"
        if name not in specs and name not in found:
            full = [key for key in found if key.endswith(f".{name}")]  # without its prefix
            name = full[0] if len(full) == 1 else name
        unknown = set(text) - _HARMLESS
        if unknown:
            raise CheckpointError(
                f"{name}: {sorted(unknown)[0]!r} in its format is unknown, and may change the "
                f"meaning of its codes; {ORIGINAL}"
            )
        weight = found.get(name)
        if weight is None or len(weight.specs) < 2:
            lies = specs.get(name) or "no such tensor"
            raise CheckpointError(
                f"{name}: {text['format']} and a {name}_scale are expected, found {lies}"
                + (" without it" if weight else "")
            )
        if weight.specs[""].dtype != FORMATS[text["format"]]:
            raise CheckpointError(f"{weight.specs['']}: {FORMATS[text['format']]} is expected")
