"""AWQ's weights of four bits, as AutoAWQ 0.2 and GPTQModel 7.7 store them (version ``gemm``):

===============  =============================================================================
``P.qweight``    I32 (in, out / 8): eight outputs an element, of which nibble i, lowest first, is
                 output 0, 2, 4, 6, 1, 3, 5, 7
``P.qzeros``     I32 (in / group_size, out / 8), likewise
``P.scales``     F16, BF16 or F32 (in / group_size, out)
===============  =============================================================================

Wᵀ[i, o] = (q[i, o] − zero[i // group_size, o]) · scale[i // group_size, o].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_tools.errors import CheckpointError
from lora_tools.formats.names import layout_name
from lora_tools.formats.quantized.packed import FETCH, ORIGINAL, plain_dtype
from lora_tools.formats.quantized.qweights import (
    FLOATS,
    G_IDX,
    QWEIGHT,
    QZEROS,
    SCALES,
    QWeight,
    check,
    layers,
)
from lora_tools.records import TensorSpec

METHODS = ("awq",)
FILES = ("quant_config.json", "quantize_config.json")
_BITS, _EACH = 4, 8


def find_awq(
    specs: Mapping[str, TensorSpec], config: Mapping[str, Any], settings: Mapping[str, Any]
) -> dict[str, QWeight]:
    """Every such weight by its plain name.

    Args:
        config: config.json.
        settings: what it and quant_config.json say of AWQ.

    Raises:
        CheckpointError: tensors that do not fit each other or the settings, and what is not read.
    """
    found: dict[str, QWeight] = {}
    for module, parts in layers(specs, (QWEIGHT, QZEROS, SCALES), (QWEIGHT, QZEROS, SCALES, G_IDX)):
        _refuse_unknown(module, parts, settings)
        inputs, words = parts[QWEIGHT].shape
        size = _group_size(module, inputs, settings)
        groups, out = inputs // size, words * _EACH
        check(parts[QZEROS], ("I32",), (groups, words))
        check(parts[SCALES], FLOATS, (groups, out))
        plain = TensorSpec(f"{module}.weight", plain_dtype(config), (out, inputs))
        if layout_name(plain, config) != "linear":
            raise CheckpointError(
                f"{module}.{QWEIGHT}: AWQ can be read for linear layers only, not for embeddings "
                f"or Conv1D; {ORIGINAL}"
            )
        symmetric = settings.get("zero_point") is False
        found[plain.name] = QWeight(plain, parts, "AWQ of 4 bits", _BITS, size, symmetric=symmetric)
    return found


def _refuse_unknown(
    module: str, parts: Mapping[str, TensorSpec], settings: Mapping[str, Any]
) -> None:
    """Raises CheckpointError for a layout that is not known for certain."""
    keys = ("version", "format", "checkpoint_format")
    said = {str(settings[key]).lower() for key in keys if settings.get(key)}
    bits = settings.get("bits", settings.get("w_bit", _BITS))
    if said - {"gemm"} or bits != _BITS or settings.get("backend") == "llm-awq" or G_IDX in parts:
        form = " or ".join(sorted(said)) or "gemm"
        raise CheckpointError(
            f"{module}.{QWEIGHT}: AWQ of {bits!r} bits in the layout {form}"
            + (f", with {G_IDX}" if G_IDX in parts else "")
            + f", but only four bits in the layout gemm can be read; {ORIGINAL}"
        )


def _group_size(module: str, inputs: int, settings: Mapping[str, Any]) -> int:
    said = settings.get("group_size", settings.get("q_group_size"))
    size = inputs if said == -1 else said
    if type(size) is not int or size < 1 or inputs % size:
        raise CheckpointError(
            f"{module}.{QWEIGHT}: {inputs} inputs cannot be divided into groups of {said!r} "
            f"(group_size); {FETCH}"
        )
    return size
